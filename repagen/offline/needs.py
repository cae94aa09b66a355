"""What a configuration needs from elsewhere, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from repagen.data import DataConfig
from repagen.encoders.files import hub_id
from repagen.evaluation.extractor import ExtractorRule
from repagen.evaluation.protocol import EvaluationProtocol
from repagen.training.decoder_config import TrainedAutoencoderConfig
from repagen.training.discriminator import AdversarialConfig
from repagen.training.evaluation_config import EvaluationConfig
from repagen.training.finetune_config import FinetuneConfig, FinetuneDecoderConfig
from repagen.training.frozen import BUNDLED_ENCODERS
from repagen.training.generator_config import (
    AlignmentTargetConfig,
    AttentionAlignmentConfig,
    AutoencoderConfig,
    ClassTokenConfig,
    TransformerConfig,
)
from repagen.training.perceptual import LpipsConfig
from repagen.training.text_to_image_config import TextConfig

BLANK = "./to-be-given"
"""Stands in a configuration where a recipe leaves a required path to the user."""

NeedKind = Literal["encoder", "text_encoder", "model", "dataset", "file", "path", "statistics"]


@dataclass(frozen=True)
class Need:
    """One thing that a recipe does not hold itself.

    Attributes:
        kind: `encoder` (the weights of a vision encoder on the Hub), `text_encoder` (the weights and the tokenizer of
            a text encoder on the Hub), `model` (a pipeline, autoencoder, generator or
            adapter on the Hub), `dataset` (on the Hub), `file` (of `PUBLISHED_FILES`), `path` (on this machine, or
            left to the user: nothing to fetch, but it may refer to an encoder), `statistics` (a file that only the
            user can get).
        name: Hub id, name of a published file, path, or the file's name.
        why: the key that asks for it.
        revision: branch, tag or commit on the Hub; None is the main branch.
        subfolder: the only one that is needed; None: all of them.
        advice: `statistics`: what it is and how it is got.
    """

    kind: NeedKind
    name: str
    why: str
    revision: str | None = None
    subfolder: str | None = None
    advice: str = ""

    @property
    def on_hub(self) -> bool:
        """Whether it is a Hub repository."""
        return self.kind in ("encoder", "text_encoder", "model", "dataset")

    @property
    def identity(self) -> tuple[str, str, str | None, str | None]:
        """What needs of several keys have in common when one copy serves them all."""
        return self.kind, self.name, self.revision, self.subfolder


def needs_of_config(config: Any, *, with_data: bool = False) -> list[Need]:
    """Collect what a training run of a configuration reads beside its own files, each thing once for every key.

    Bundled encoders and what a weight of 0 switches off are no needs. The extractor of `evaluation` is one whether or
    not figures are made during training: the released pipeline is measured by it.

    Args:
        config: of any training program.
        with_data: the dataset too.

    Raises:
        UserError: for a name that is neither a path nor an id.
    """
    found = [need for key, section in _sections(config, "") for need in _of_section(section, key)]
    if config.data.kind == "latents":  # the cache holds the tokens that hidden states are aligned with
        found = [need for need in found if not need.why.startswith("alignment.")]
    return found + (list(_of_data(config.data)) if with_data else [])


def needs_of_protocol(name: str, protocol: EvaluationProtocol) -> list[Need]:
    """Collect what evaluating by a protocol takes: extractors, and the statistics that it compares with."""
    found = [
        need
        for number, space in enumerate(protocol.spaces)
        for need in _of_rule(space.extractor, f"{name}:spaces.{number}")
    ]
    if protocol.reference.kind == "statistics":
        first = protocol.reference.description.split(" ")[0]
        file = first if first.endswith(".npz") else f"{name}.npz"
        found.append(Need("statistics", file, f"{name}:reference", advice=protocol.reference.description))
    return found


def _sections(section: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every section of a configuration with its key, outer ones first."""
    yield key, section
    if isinstance(section, list):
        children: Iterator[tuple[object, Any]] = iter(enumerate(section))
    else:
        children = ((field.name, getattr(section, field.name)) for field in dataclasses.fields(section))
    for name, child in children:
        if dataclasses.is_dataclass(child) or isinstance(child, list):
            yield from _sections(child, f"{key}.{name}" if key else str(name))


def _of_section(section: Any, key: str) -> Iterator[Need]:
    reader = _READERS.get(type(section))
    for need in reader(section) if reader else ():
        yield dataclasses.replace(need, why=".".join(filter(None, (key, need.why))))


def _of_encoder(section: Any) -> Iterator[Need]:
    yield from _encoder(section.encoder, "encoder", section.revision)


def _of_autoencoder(section: AutoencoderConfig) -> Iterator[Need]:
    yield _model(section.path, "path", section.revision, section.subfolder)


def _of_transformer(section: TransformerConfig) -> Iterator[Need]:
    if section.pretrained is not None:
        yield _model(section.pretrained, "pretrained", section.revision)


def _of_text(section: TextConfig) -> Iterator[Need]:
    names = [section.encoder] if isinstance(section.encoder, str) else section.encoder or []
    for name in names:
        if name in BUNDLED_ENCODERS:
            continue
        if _is_path(name):
            yield Need("path", name, "encoder")
        else:
            yield Need("text_encoder", hub_id(name), "encoder", section.revision)


def _of_finetuning(section: FinetuneConfig | FinetuneDecoderConfig) -> Iterator[Need]:
    yield _model(section.pipeline, "pipeline", section.revision)


def _of_trained_autoencoder(section: TrainedAutoencoderConfig) -> Iterator[Need]:
    if section.encoder is not None:
        yield from _encoder(section.encoder, "encoder", section.revision)
    if section.pretrained is not None:
        yield _model(section.pretrained, "pretrained")


def _of_lpips(section: LpipsConfig) -> Iterator[Need]:
    if section.weight > 0:
        yield Need("file", "lpips-vgg", "") if section.trunk is None else Need("path", section.trunk, "trunk")
        if section.heads is not None:
            yield Need("path", section.heads, "heads")


def _of_adversarial(section: AdversarialConfig) -> Iterator[Need]:
    if section.weight > 0 and section.discriminator == "dino":
        yield from _encoder(section.backbone, "backbone")


def _of_evaluation(section: EvaluationConfig) -> Iterator[Need]:
    for space in section.named_protocol()[1].spaces:
        if space.extractor.kind == "inception" and section.extractor_weights is not None:
            yield Need("path", section.extractor_weights, "extractor_weights")
        else:
            yield from _of_rule(space.extractor, "extractor" if section.extractor else "protocol")
    words = section.reference_words
    if words and "=" not in words[0]:
        yield Need("path", words[0], "reference")


def _of_rule(rule: ExtractorRule, why: str) -> Iterator[Need]:
    if rule.kind == "inception":
        yield Need("file", "inception", why)
    elif rule.kind == "timm" and "/" not in rule.model and not Path(rule.model).is_dir():
        yield from _encoder(f"timm:{rule.model}", why)
    else:
        yield from _encoder(rule.model, why)


def _of_data(section: DataConfig) -> Iterator[Need]:
    if section.path is None or section.kind in ("digits", "shapes"):
        return
    if section.kind == "datasets" and not _is_path(section.path):
        yield Need("dataset", section.path, "data.path", section.revision)
    else:
        yield Need("path", section.path, "data.path")


_READERS: dict[type, Callable[[Any], Iterator[Need]]] = {
    AutoencoderConfig: _of_autoencoder,
    TransformerConfig: _of_transformer,
    TextConfig: _of_text,
    TrainedAutoencoderConfig: _of_trained_autoencoder,
    AlignmentTargetConfig: _of_encoder,
    AttentionAlignmentConfig: _of_encoder,
    ClassTokenConfig: _of_encoder,
    LpipsConfig: _of_lpips,
    AdversarialConfig: _of_adversarial,
    EvaluationConfig: _of_evaluation,
    FinetuneConfig: _of_finetuning,
    FinetuneDecoderConfig: _of_finetuning,
}
"""Sections of configurations that name things from elsewhere => how they are read."""


def _encoder(name: str, why: str, revision: str | None = None) -> Iterator[Need]:
    if name in BUNDLED_ENCODERS:
        return
    if _is_path(name):
        yield Need("path", name, why)
    else:
        yield Need("encoder", hub_id(name), why, revision)


def _model(name: str, why: str, revision: str | None = None, subfolder: str | None = None) -> Need:
    if _is_path(name):
        return Need("path", name, why, subfolder=subfolder)
    return Need("model", name, why, revision, subfolder)


def _is_path(name: str) -> bool:
    """Whether a name means a place on this machine, there or not; an id is `timm:NAME` or has the form org/name."""
    if Path(name).expanduser().exists():
        return True
    return not name.startswith("timm:") and (name.startswith((".", "/", "~")) or name.count("/") != 1)
