"""Model cards: typed facts in, Markdown with the Hub's front matter out.

A card is written before anybody knows where it will be published, so it names the repository by `PLACEHOLDER`;
publishing puts the real name in (`addressed`). A path of this machine never gets in (`without_local_paths`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

CardKind = Literal["class_to_image", "text_to_image", "autoencoder", "transformer", "adapter", "part"]

PLACEHOLDER = "ORG/NAME"
"""Stands for the repository in a card that is not published yet."""

BASE_PLACEHOLDER = "ORG/BASE"
"""Stands for the pipeline that an adapter belongs to, where that is none of the Hub."""

UNKNOWN_LICENCE = "unknown"
"""As the Hub writes a licence that nobody stated."""

CARD_TEMPLATE = "model_card.md"
SAMPLES_FILE = "samples.png"

# The Hub's nearest task, also for images of classes: it has none of its own for them.
_IMAGE_TASK = "unconditional-image-generation"
_TEXT_TASK = "text-to-image"
_LISTED_CLASSES = 20
# An absolute path of at least two parts; not the end of a Hub id, an address or a fraction.
_PATH = re.compile(
    r"(?<![\w/.:~-])~?(?:/[^\s/,;:'\"()\[\]{}|`]+){2,}/?"
    r"|\bfile:/[^\s,;'\"()\[\]{}|`]+"
    r"|\b[A-Za-z]:[\\/](?![\\/])[^\s,;:'\"()\[\]{}|`]+"  # of Windows
)


@dataclass(frozen=True, kw_only=True)
class LicenceFact:
    """The licence of one part.

    Attributes:
        part: what it is to the model: "encoder".
        name: of the part, such as a Hub id.
        licence: as its authors state it, or `UNKNOWN_LICENCE`.
        consequence: what follows for whoever uses the model; empty where nothing does.
    """

    part: str
    name: str
    licence: str
    consequence: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure with all that it depends on.

    Attributes:
        metric: as the result file names it.
        value: of the metric.
        protocol: it was measured by.
        num_samples: images of the model.
        num_reference: images it is compared with; None where that is not known.
        extractor: of features, with the hash of its weights.
        reference: hash of what it is compared with.
        step: optimiser steps of the weights that were measured.
        comparable: whether it may stand beside figures made elsewhere by the same protocol.
    """

    metric: str
    value: float
    protocol: str
    num_samples: int
    num_reference: int | None
    extractor: str
    reference: str
    step: int | None
    comparable: bool


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """All that a card says.

    Attributes:
        kind: chooses the template.
        class_name: of what `from_pretrained` loads.
        summary: one or two sentences.
        parts: part => description.
        class_names: of the classes, by their ids; those that an adapter adds.
        num_classes: of the pipeline, of an adapter with its own; 0 is unconditional, None not known.
        example: class that the lines ask for, by name or id.
        prompt: that they ask for, of a model or adapter that takes text; None for one that does not.
        tags: that say what kind of model it is.
        library: that holds the class: ours, or diffusers.
        base_model: Hub id of what was fine-tuned or adapted.
        base_revision: its commit.
        datasets: Hub ids.
        licence: of the weights, as the Hub writes it.
        licences: of the parts.
        encoder_outside: the encoder is not among the files.
        recipe: title, paper and the like.
        config: the resolved configuration.
        data: of the training, by name.
        training: facts by name.
        figures: of evaluations.
        remarks: on the figures: what was left out, why they are not comparable.
        samples: file beside the card with a grid of images; None without one.
        samples_show: what is on it.
        limits: sentences.
    """

    kind: CardKind
    class_name: str
    summary: str
    parts: Mapping[str, str] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    num_classes: int | None = 0
    example: str | int = 0
    prompt: str | None = None
    tags: Sequence[str] = ()
    library: Literal["repagen", "diffusers"] = "repagen"
    base_model: str | None = None
    base_revision: str | None = None
    datasets: Sequence[str] = ()
    licence: str = UNKNOWN_LICENCE
    licences: Sequence[LicenceFact] = ()
    encoder_outside: bool = False
    recipe: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    figures: Sequence[Figure] = ()
    remarks: Sequence[str] = ()
    samples: str | None = None
    samples_show: str = "images of this model"
    limits: Sequence[str] = ()


def carried_folder(kind: CardKind) -> Path:
    """The folder with what a repository of a kind carries beside its weights: its card's template, scripts.

    That is `pipelines/<kind>` of a checkout; a wheel holds a copy in `repagen/hub/carried`.
    """
    installed = Path(__file__).with_name("carried") / kind
    return installed if installed.is_dir() else Path(__file__).parents[2] / "pipelines" / kind


def render_card(facts: CardFacts) -> str:
    """Return the card as Markdown; the repository is called `PLACEHOLDER`."""
    from huggingface_hub import ModelCard

    ours = facts.library == "repagen"
    base = f'"{facts.base_model or BASE_PLACEHOLDER}"'
    card = ModelCard.from_template(
        _front_matter(facts),
        template_path=str(carried_folder(facts.kind) / CARD_TEMPLATE),
        repository=PLACEHOLDER,
        summary=without_local_paths(facts.summary),
        class_name=f"repagen.{facts.class_name}" if ours else facts.class_name,
        imports="import repagen\nimport torch" + ("" if ours else f"\nfrom {facts.library} import {facts.class_name}"),
        call=_call(facts),
        text=facts.prompt is not None,
        classes_known=facts.num_classes is not None or facts.prompt is not None,
        base_class=f"repagen.{'ClassToImagePipeline' if facts.prompt is None else 'TextToImagePipeline'}",
        latent_shape="*autoencoder.latent_shape" if ours else "autoencoder.config.latent_channels, 32, 32",
        encoder_outside=facts.encoder_outside,
        base_call=base + (f', revision="{facts.base_revision}"' if facts.base_model and facts.base_revision else ""),
        base_known=facts.base_model is not None,
        base_placeholder=BASE_PLACEHOLDER,
        samples=facts.samples,
        samples_show=facts.samples_show,
        sections="\n\n".join(section for section in _sections(facts) if section),
    )
    return str(card).rstrip("\n") + "\n"


def _call(facts: CardFacts) -> str:
    """Arguments of the pipeline's call in the card's lines."""
    if facts.prompt is not None:
        return repr(facts.prompt)
    return "" if facts.num_classes == 0 else f"class_labels=[{facts.example!r}]"


def class_to_ask_for(class_names: Sequence[str], label: int = 0) -> str | int:
    """A class as a call names it: by its first name, where that is no other's too, else by its id.

    Args:
        class_names: of all classes, by their ids; none where they have no names.
        label: its id.
    """
    names = [[part.strip() for part in name.split(",")] for name in class_names]
    if not names or names[label][0] in ("", str(label)):
        return label
    alike = sum(part.casefold() == names[label][0].casefold() for parts in names for part in parts)
    return names[label][0] if alike == 1 else label


def addressed(card: str, repo_id: str, revision: str | None = None) -> str:
    """Put the repository into a card: its name, and in calls that load it the branch."""
    if revision not in (None, "main"):
        load = rf'((?:from_pretrained|load_lora_weights)\("{PLACEHOLDER}")(?:, revision="[^"\n]*")?'
        card = re.sub(load, lambda found: f'{found[1]}, revision="{revision}"', card)
    return card.replace(PLACEHOLDER, repo_id)


def without_local_paths(value: Any) -> Any:
    """Return text, or a tree of lists and dicts, where each path of this machine is cut to its last part.

    Hub ids, addresses and relative paths stay; "word=/a path/with spaces" and a text that is a path are cut whole.
    """
    if isinstance(value, Mapping):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_local_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    whole = re.fullmatch(r"([\w.-]+=)?((?:~|/|file:/|[A-Za-z]:[\\/])[^\n]*[\\/][^\n\\/]+)[\\/]?", value)
    if whole is not None:
        return (whole[1] or "") + _last_part(whole[2])
    return _PATH.sub(lambda found: _last_part(found[0]), value)


def _last_part(path: str) -> str:
    return ".../" + re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _front_matter(facts: CardFacts) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    images = facts.kind in ("class_to_image", "text_to_image", "adapter")
    task = _IMAGE_TASK if facts.prompt is None else _TEXT_TASK
    by_class = "image generation" if facts.num_classes == 0 else "class-conditional image generation"
    results = [
        EvalResult(
            task_type=task,
            task_name=by_class if facts.prompt is None else "text-to-image generation",
            dataset_type=facts.datasets[0] if facts.datasets else "other",
            dataset_name=without_local_paths(facts.data.get("path") or facts.data.get("kind") or "not stated"),
            metric_type=figure.metric,
            metric_name=f"{figure.metric}, protocol {figure.protocol}",
            metric_value=figure.value,
            metric_args=without_local_paths(
                {
                    "protocol": figure.protocol,
                    "num_samples": figure.num_samples,
                    "num_reference": figure.num_reference,
                    "extractor": figure.extractor,
                    "reference_sha256": figure.reference,
                    "step": figure.step,
                    "comparable": figure.comparable,
                }
            ),
        )
        for figure in facts.figures
    ]
    return ModelCardData(
        library_name="repagen",
        license=facts.licence,
        pipeline_tag=task if images else None,
        tags=["diffusers", "repagen", *facts.tags],
        base_model=facts.base_model,
        base_model_relation=("adapter" if facts.kind == "adapter" else "finetune") if facts.base_model else None,
        datasets=list(facts.datasets) or None,
        eval_results=results or None,
        model_name=PLACEHOLDER if results else None,
    )


def _sections(facts: CardFacts) -> list[str]:
    return [
        _table("Parts", facts.parts),
        _classes(facts),
        _recipe(facts),
        _table("Data", facts.data),
        _table("Training", facts.training),
        _results(facts),
        _licences(facts),
        _bullets("Limits", facts.limits),
    ]


def _cell(value: object) -> str:
    """As one cell of a table, or one line of a list."""
    return " ".join(str(without_local_paths(str(value))).split()).replace("|", "\\|").replace("<", "&lt;")


def _rows(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _table(title: str, values: Mapping[str, str]) -> str:
    return f"## {title}\n\n{_rows(['', ''], list(values.items()))}" if values else ""


def _bullets(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {_cell(line)}" for line in lines)]) if lines else ""


def _classes(facts: CardFacts) -> str:
    if not facts.class_names:
        return ""
    shown = [f"`{name}`" for name in map(_cell, facts.class_names[:_LISTED_CLASSES])]
    more = len(facts.class_names) - len(shown)
    listed = ", ".join(shown) + (f" and {more} more" if more > 0 else "")
    where = "added by the adapter" if facts.kind == "adapter" else "all are in `model_index.json`, by id"
    title = "1 class" if len(facts.class_names) == 1 else f"{len(facts.class_names)} classes"
    return f"## Classes\n\n{title} ({where}): {listed}."


def _recipe(facts: CardFacts) -> str:
    if not facts.recipe and not facts.config:
        return ""
    import yaml

    head = _rows(["", ""], list(facts.recipe.items())) + "\n\n" if facts.recipe else ""
    text = yaml.safe_dump(without_local_paths(facts.config), sort_keys=False, allow_unicode=True, width=1000)
    folded = f"<details><summary>the resolved configuration</summary>\n\n````yaml\n{text}````\n\n</details>"
    return f"## Recipe\n\n{head}{folded if facts.config else ''}".rstrip()


def _results(facts: CardFacts) -> str:
    if not facts.figures:
        return "## Results\n\nNo evaluation belongs to these weights."
    head = ["metric", "value", "protocol", "N", "reference images", "extractor", "reference sha256", "step"]
    rows = [
        (
            figure.metric + ("" if figure.comparable else " (not comparable)"),
            f"{figure.value:.6g}",
            figure.protocol,
            figure.num_samples,
            "unknown" if figure.num_reference is None else figure.num_reference,
            figure.extractor,
            figure.reference[:16],
            "" if figure.step is None else figure.step,
        )
        for figure in facts.figures
    ]
    remarks = "\n".join(f"- {_cell(remark)}" for remark in facts.remarks)
    return f"## Results\n\n{_rows(head, rows)}" + (f"\n\n{remarks}" if remarks else "")


def _licences(facts: CardFacts) -> str:
    unstated = "its owner has not stated one (in this card's front matter), so nobody else has leave to use it"
    known = facts.licence != UNKNOWN_LICENCE
    weights = LicenceFact(
        part="weights", name="this model", licence=facts.licence, consequence="" if known else unstated
    )
    rows = [(one.part, one.name, one.licence, one.consequence) for one in (weights, *facts.licences)]
    return "## Licences\n\n" + _rows(["part", "name", "licence", "what follows"], rows)
