"""The classes of a fine-tuned generator: which stay, which are new and where these begin, and the data's labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from repagen.config import nearest
from repagen.errors import UserError, naming
from repagen.pipelines.labels import classes_named, resolve_class_labels
from repagen.training.finetune_config import FinetuneConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassPlan:
    """The classes of a generator after fine-tuning: some of its own in a new order, then new ones.

    Attributes:
        kept: ids that the classes which stay had.
        new: names of the new classes.
        names: id => name of every class that has one.
        of_data: label of the data => id.
        sources: new class => id that the class had whose embedding it begins with.
    """

    kept: list[int]
    new: list[str]
    names: dict[int, str]
    of_data: list[int]
    sources: dict[str, int]

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 = unconditional."""
        return len(self.kept) + len(self.new)

    @property
    def new_ids(self) -> range:
        """Ids of the new classes."""
        return range(len(self.kept), self.num_classes)

    @property
    def class_names(self) -> list[str]:
        """Name of every class, or else its id as text."""
        return [self.names.get(label, str(label)) for label in range(self.num_classes)]

    @property
    def id2label(self) -> dict[str, str] | None:
        """As a pipeline stores it."""
        return {str(label): name for label, name in self.names.items()} or None


def plan_classes(
    config: FinetuneConfig, num_classes: int, id2label: Mapping[str, str] | None, data_names: Sequence[str]
) -> ClassPlan:
    """Match the classes of the data with those of a pipeline, by name.

    Args:
        config: which stay, and where new ones begin.
        num_classes: of the pipeline's generator.
        id2label: id, as text => name, of the pipeline.
        data_names: of the data's labels, in order; empty without classes.

    Raises:
        UserError: names the key: classes that do not exist, or another number than expected; data without classes for
            a generator that has some, or the other way round; nothing to train; names of the data that mean two
            classes, or that differ in case only.
    """
    _refuse_one_sided(config, num_classes, data_names)
    known = _known(data_names, num_classes, id2label)
    kept = _kept(config, num_classes, id2label, list(known.values()))
    new = [name for name in data_names if name not in known]
    place = {old: label for label, old in enumerate(kept)}
    place_of_new = {name: len(kept) + number for number, name in enumerate(new)}
    old_names = {label: str(id2label[str(old)]) for old, label in place.items() if id2label and str(old) in id2label}
    plan = ClassPlan(
        kept=kept,
        new=new,
        names={**old_names, **{label: name for name, label in place_of_new.items()}},
        of_data=[place[known[name]] if name in known else place_of_new[name] for name in data_names],
        sources=_sources(config, num_classes, id2label, new),
    )
    _refuse_unexpected(config, plan)
    _tell_merged(plan, data_names)
    return plan


def new_rows(table: torch.Tensor, plan: ClassPlan, num_classes: int) -> torch.Tensor:
    """Embeddings (R, D) that the new classes begin with: of one class, or the mean of all classes.

    Args:
        table: (num_classes [+ null row], D), as the generator has it.
        plan: of the classes.
        num_classes: of the generator; without any, new ones begin with the null row.
    """
    mean = table[:num_classes].mean(0) if num_classes else table[-1]
    rows = [table[plan.sources[name]] if name in plan.sources else mean for name in plan.new]
    return torch.stack(rows) if rows else table[:0]


def _refuse_one_sided(config: FinetuneConfig, num_classes: int, data_names: Sequence[str]) -> None:
    place = config.data.path or config.data.kind
    if num_classes and not data_names:
        raise UserError(
            f"data.path: {place} has no classes, but {config.pipeline} has {num_classes}; put the images into one "
            "folder a class, or take an unconditional pipeline"
        )
    if data_names and not num_classes:
        raise UserError(
            f"data.path: {place} has {len(data_names)} classes, but {config.pipeline} is unconditional; put the "
            "images into one flat folder, or take a pipeline with classes"
        )


def _known(data_names: Sequence[str], num_classes: int, id2label: Mapping[str, str] | None) -> dict[str, int]:
    """Name => id of the classes of the data that the pipeline has."""
    known: dict[str, int] = {}
    folded: dict[str, str] = {}
    for name in data_names:
        other = folded.setdefault(name.strip().lower(), name)
        if other != name:
            raise UserError(
                f"data: the classes {other!r} and {name!r} differ in case only; rename one, or put them together"
            )
        ids = [label for label in classes_named(name, id2label) if label < num_classes]
        if len(ids) > 1:
            raise UserError(
                f"data: {name!r} names the pipeline's classes {ids}; rename this class of the data, and begin it with "
                f"one of them by labels.start_from.NAME={ids[0]}"
            )
        if ids:
            known[name] = ids[0]
    return known


def _kept(
    config: FinetuneConfig, num_classes: int, id2label: Mapping[str, str] | None, known: Sequence[int]
) -> list[int]:
    keep = config.labels.keep
    if keep is None:
        keep = "all" if config.mode != "full" or config.prior.images_per_class else "none"
    if keep == "all":
        return list(range(num_classes))
    with naming({"class_labels": "labels.keep"}):
        named = [] if keep == "none" else resolve_class_labels(keep, num_classes, id2label)
    return list(dict.fromkeys([*named, *known]))


def _sources(
    config: FinetuneConfig, num_classes: int, id2label: Mapping[str, str] | None, new: Sequence[str]
) -> dict[str, int]:
    sources = {}
    for name, source in config.labels.start_from.items():
        if name not in new:
            raise UserError(
                f"labels.start_from.{name}: no new class of the data{nearest(name, new)}; new are: "
                f"{', '.join(new[:10]) or 'none'}"
            )
        with naming({"class_labels": f"labels.start_from.{name}"}):
            sources[name] = resolve_class_labels(source, num_classes, id2label)[0]
    return sources


def _refuse_unexpected(config: FinetuneConfig, plan: ClassPlan) -> None:
    if config.num_classes not in ("auto", plan.num_classes):
        raise UserError(
            f"num_classes: {config.num_classes} expected, but {len(plan.kept)} classes stay and {len(plan.new)} are "
            f"new; set num_classes={plan.num_classes} or auto, or change labels.keep"
        )
    if config.mode == "labels" and not plan.new:
        raise UserError(
            f"mode: labels trains the rows of new classes, and {config.pipeline} "
            + ("knows all classes of the data; rename them, or" if plan.num_classes else "is unconditional;")
            + " take mode=full or mode=lora"
        )
    if config.prior.images_per_class and not plan.kept:
        raise UserError("prior.images_per_class: no class of the pipeline stays; leave it out")
    if config.prior.images_per_class and set(plan.of_data) >= set(range(len(plan.kept))):
        raise UserError("prior.images_per_class: the data has every class that stays, none is drawn; leave it out")


def _tell_merged(plan: ClassPlan, data_names: Sequence[str]) -> None:
    for label in sorted(set(plan.of_data)):
        merged = [name for name, own in zip(data_names, plan.of_data, strict=True) if own == label]
        if len(merged) > 1:
            logger.warning("%s of the data are one class of the pipeline, %r", " and ".join(merged), plan.names[label])
