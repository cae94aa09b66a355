"""One tokenizer and one network that read prompts: the part of which a `TextEncoder` has one or several."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repagen.encoders.backbones import architecture, quiet_transformers, transformers_config
from repagen.encoders.files import TEXT_FILES, FoundFiles, find_encoder
from repagen.encoders.spec import TextEncoderSpec
from repagen.encoders.text_families import TEXT_FAMILIES, TextFamily, text_family_of
from repagen.encoders.weights import load_network, refuse_not_finite, weights_sha256
from repagen.errors import UserError, one_line, refusing, require_unicode
from repagen.hub.places import repository_command

logger = logging.getLogger(__name__)

_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
_PLACE = "{prompt}"
_SHOWN = 80  # characters of what a prompt lost
_PROBE = "A red CUBE, 2 пса & 三只猫 🐈."  # what tokenizers of one vocabulary may read in different ways


class TextTower(nn.Module):
    """A frozen network over token ids, with its tokenizer.

    Args:
        spec: what it is; `spec.max_length` tokens are read of each prompt.
        model: the network; None builds it with random weights.
        tokenizer: of transformers; None where only weights are to be held.

    Attributes:
        width: D of a token's state.

    Raises:
        UserError: for a family, a layer, a length or a template that does not fit.
    """

    def __init__(self, spec: TextEncoderSpec, model: Any = None, tokenizer: Any = None) -> None:
        super().__init__()
        self.family = text_family(spec)
        config = tower_config(spec)
        check_reading(spec, config)
        self.spec = spec
        self.model = model if model is not None else kept_part(self.family, _build(self.family, config))
        self.tokenizer = tokenizer
        self.width: int = config.hidden_size
        self._vocabulary: int = config.vocab_size
        self._layer = from_end(spec.hidden_layer, config)
        self._fed_length = getattr(config, self.family.positions_key) if self.family.sees_padding else spec.max_length
        self._told = False
        self._fingerprint: str | None = None
        self.requires_grad_(False)
        self.eval()

    def tokenize(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids (B, n), filled up on the right, and a mask (B, n), True at the prompts' own tokens.

        A prompt without any token (an empty one, where the tokenizer adds none) becomes one padding token, which
        counts as its own. A prompt of more than `max_length` tokens loses its end, which is named once.

        Raises:
            UserError: for a text that is none of Unicode, and ids beyond the network's vocabulary.
        """
        if self.tokenizer is None:
            raise UserError(f"text encoder {label(self.spec)}: there is no tokenizer; load it by from_pretrained")
        rows = self._rows([self._text(prompt) for prompt in prompts])
        padding = next(
            (one for one in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if one is not None), 0
        )
        ids = torch.full((len(rows), self._fed_length), padding, dtype=torch.long)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for index, row in enumerate(row or [padding] for row in rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = True
        if len(rows) and int(ids.max()) >= self._vocabulary:
            raise UserError(
                f"text encoder {label(self.spec)}: its tokenizer gives the id {int(ids.max())}, its network has "
                f"{self._vocabulary} tokens; the tokenizer belongs to another network"
            )
        return ids, mask

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states (B, max_length, D) float32, zero where the mask is False, and the mask (B, max_length).

        Args:
            ids, mask: of `tokenize`, on the device of the weights.
        """
        length = self.spec.max_length
        if not len(ids):
            return torch.zeros(0, length, self.width, device=ids.device), mask[:, :length]
        output = self.model(
            input_ids=ids,
            attention_mask=None if self.family.sees_padding else mask.long(),
            output_hidden_states=self._layer != -1,
            **self.family.arguments,
        )
        states = output.last_hidden_state if self._layer == -1 else output.hidden_states[self._layer]
        mask = mask[:, :length]
        return states[:, :length].float().masked_fill(~mask[..., None], 0.0), mask

    def fingerprint(self) -> str:
        """Return a sha256 over the weights; see `VisionEncoder.fingerprint`."""
        if self._fingerprint is None:
            self._fingerprint = weights_sha256(self.model)
        return self._fingerprint

    def _text(self, prompt: str) -> str:
        text = prompt.lower() if self.family.lower_case else prompt
        return text if self.spec.template is None else self.spec.template.replace(_PLACE, text)

    def _rows(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, at most `max_length`."""
        if not texts:
            return []
        length = self.spec.max_length
        with refusing(f"text encoder {label(self.spec)}: a prompt cannot be split into tokens"), quiet_transformers():
            rows = self.tokenizer(texts).input_ids
            if max(map(len, rows)) <= length:
                return list(rows)
            kept = self.tokenizer(texts, truncation=True, max_length=length).input_ids
        if not self._told:
            self._told = True
            self._tell_loss(*max(zip(rows, kept, strict=True), key=lambda pair: len(pair[0])), len(texts))
        return list(kept)

    def _tell_loss(self, row: list[int], kept: list[int], count: int) -> None:
        """Name what a prompt lost; its tokens before and after, and how many prompts there were."""
        same = next((k for k, (one, other) in enumerate(zip(row, kept, strict=False)) if one != other), len(kept))
        end = self.tokenizer.decode(row[same:], skip_special_tokens=True)
        logger.warning(
            "text encoder %s reads %d tokens of a prompt (max_length), and one has %d: its last %d are lost (%r%s); "
            "said once, for the longest of these %d prompts",
            label(self.spec), self.spec.max_length, len(row), len(row) - len(kept), end[:_SHOWN],
            " ..." if len(end) > _SHOWN else "", count,
        )  # fmt: skip

    def train(self, mode: bool = True) -> TextTower:
        """Stay in eval mode, whatever `mode` says."""
        super().train(False)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move and cast the weights; computed buffers (rotary frequencies) keep float32, as in a model loaded so."""
        exact = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self.get_buffer(name)
            if moved.dtype != torch.float32:
                parent, _, leaf = name.rpartition(".")
                self.get_submodule(parent)._buffers[leaf] = buffer.to(moved.device)
        return self


def prompt_list(prompts: Sequence[str]) -> list[str]:
    """Return prompts as a list; one text alone counts as one prompt.

    Raises:
        UserError: for anything but texts, or one that cannot be written as UTF-8.
    """
    if not isinstance(prompts, Iterable):
        raise UserError(f"prompts must be texts, got {type(prompts).__name__}")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"prompts must be texts, got {type(text).__name__} at {index}")
        require_unicode(text, f"prompt {index}")
    return texts


def label(spec: TextEncoderSpec) -> str:
    """Name a text encoder in messages."""
    return repr(spec.name_or_path or spec.family)


def text_family(spec: TextEncoderSpec) -> TextFamily:
    """Return the family of a spec.

    Raises:
        UserError: it is none.
    """
    if spec.family not in TEXT_FAMILIES:
        raise UserError(f"text encoder: family {spec.family!r} is none of {', '.join(TEXT_FAMILIES)}")
    return TEXT_FAMILIES[spec.family]


def tower_config(spec: TextEncoderSpec) -> Any:
    """Build the transformers config of a spec's network.

    Raises:
        UserError: for an unknown family, or a config that does not fit it.
    """
    return transformers_config(text_family(spec), spec.config, f"text encoder {label(spec)}:config")


def check_reading(spec: TextEncoderSpec, config: Any) -> None:
    """Refuse a layer, a length or a template that does not fit a network's config.

    Raises:
        UserError: naming it and what is allowed.
    """
    where, depth = f"text encoder {label(spec)}", config.num_hidden_layers
    layer, length = spec.hidden_layer, spec.max_length
    if type(layer) is not int or not -depth <= layer < depth:
        raise UserError(
            f"{where}: hidden_layer {layer!r} must be -1 (the last, after the final norm) or a block's index in "
            f"[{-depth}, {depth})"
        )
    key = text_family(spec).positions_key
    most = getattr(config, key) if key else None
    if type(length) is not int or length < 1 or (most is not None and length > most):
        bound = f" and at most {most}, the positions this network has" if most is not None else ""
        raise UserError(f"{where}: max_length {length!r} must be a whole number of at least 1{bound}")
    if spec.template is not None and spec.template.count(_PLACE) != 1:
        raise UserError(f"{where}: template {spec.template!r} must hold {_PLACE} once, where the prompt goes")


def from_end(layer: int, config: Any) -> int:
    """Return a block's index counted from the end, -1 for the last, whichever way it was given."""
    depth: int = config.num_hidden_layers
    return layer % depth - depth


def kept_part(family: TextFamily, model: Any) -> Any:
    """Return the module of a family's model that reads text."""
    return model.get_submodule(family.part) if family.part else model


def _build(family: TextFamily, config: Any) -> Any:
    import transformers

    return getattr(transformers, family.model_class)(config, **family.constructor)


# --- files -----------------------------------------------------------------------------------------------------------


def load_tower(
    source: str | os.PathLike[str],
    *,
    hidden_layer: int = -1,
    max_length: int | None = None,
    template: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    local_files_only: bool = False,
) -> TextTower:
    """Load one text encoder from a folder of transformers' layout or the Hub; see `TextEncoder.from_encoder`.

    Raises:
        UserError: one line for a wrong path, a closed or unreachable repository, an unsupported model type, weights
            that are missing, misshapen or not finite, a tokenizer that cannot be read, a reading that does not fit.
    """
    files = find_encoder(source, revision, local_files_only, TEXT_FILES)
    family = text_family_of(files.config.get("model_type"), files.name)
    nested = files.config.get("text_config")
    description = nested if isinstance(nested, dict) else files.config
    config = transformers_config(family, description, f"{files.name}:config.json")
    spec = TextEncoderSpec(
        family=family.name,
        config=architecture(config),
        max_length=max_length if max_length is not None else _default_length(family, config),
        hidden_layer=hidden_layer,
        template=template,
        name_or_path=files.repo_id or files.name,
        revision=files.revision,
    )
    check_reading(spec, config)
    tokenizer = load_tokenizer(files.folder, files.name, files.repo_id)
    return TextTower(spec, _load_model(family, spec, files, dtype), tokenizer)


def _default_length(family: TextFamily, config: Any) -> int:
    bounds = [getattr(config, family.positions_key)] if family.positions_key else []
    return min([family.max_length, *bounds])


def _load_model(family: TextFamily, spec: TextEncoderSpec, files: FoundFiles, dtype: torch.dtype) -> Any:
    weights = files.weights(family)
    model = kept_part(family, load_network(family, spec.config, weights, files.name, dtype))
    refuse_not_finite(model, weights, files.name)
    return model


def load_tokenizer(folder: Path, name: str, repo_id: str | None = None) -> Any:
    """Load a tokenizer from its folder; no code of it is run.

    Args:
        folder: with its files.
        name: the encoder, for messages.
        repo_id: the Hub repository that has them.

    Raises:
        UserError: it is not there, cannot be read, or needs a package that is not installed.
    """
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in _VOCABULARIES):
        fetching = f"; fetch it with {repository_command(repo_id)}" if repo_id else ""
        raise UserError(f"{folder}: no tokenizer ({', '.join(_VOCABULARIES)}) of text encoder {name!r}{fetching}")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever strange files make of the readers
        raise UserError(f"{folder}: tokenizer of text encoder {name!r} cannot be read: {one_line(error)}") from error
    for passing in ("is_local", "local_files_only"):  # it would save how it was loaded
        tokenizer.init_kwargs.pop(passing, None)
    return tokenizer


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash what a tokenizer makes of texts: its vocabulary, and its reading of one text in several scripts."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer(_PROBE).input_ids]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
