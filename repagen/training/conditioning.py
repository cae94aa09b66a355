"""What a generator is conditioned on in training: the classes of its data, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from repagen.flow.conditions import ConditionDropout, Conditions
from repagen.pipelines.class_to_image import ClassToImagePipeline
from repagen.training.run import Batch


class Conditioning(Protocol):
    """How samples become conditions of the generator, and what its pipeline is."""

    @property
    def shown(self) -> Sequence[Any]:
        """What the sample grids are of: classes or prompts, which take turns; none = unconditional."""

    @property
    def dropout(self) -> ConditionDropout:
        """Of the conditions."""

    @property
    def model_arguments(self) -> Mapping[str, Any]:
        """Constructor arguments of the network that follow from the conditions."""

    @property
    def fingerprints(self) -> Mapping[str, Any]:
        """What identifies frozen models that make them."""

    def conditions(self, batch: Batch) -> Conditions:
        """What the generator is told of the samples of a micro-batch, before any of it is dropped."""

    def guides(self, model: Any) -> bool:
        """Whether a network knows a null condition that can guide it."""

    def pipeline(self, **parts: Any) -> Any:
        """A pipeline of the parts that all have: `transformer`, `vae`, `scheduler` and `sampling_defaults`."""


@dataclass(frozen=True)
class ClassConditioning:
    """Labels of the data.

    Attributes:
        class_names: of the labels, in order; empty = unconditional.
        label_dropout: share of labels that become the null label.
        shown: see `Conditioning`.
    """

    class_names: Sequence[str]
    label_dropout: float
    shown: Sequence[int]

    @classmethod
    def of_all(cls, class_names: Sequence[str], label_dropout: float) -> ClassConditioning:
        """All classes take turns in the sample grids."""
        return cls(class_names, label_dropout, range(len(class_names)))

    @property
    def dropout(self) -> ConditionDropout:
        """See `Conditioning`."""
        return ConditionDropout.of_classes(len(self.class_names), self.label_dropout)

    @property
    def model_arguments(self) -> Mapping[str, Any]:
        """See `Conditioning`."""
        count = len(self.class_names)
        return {"num_classes": count, "class_dropout_prob": self.label_dropout if count else 0.0}

    @property
    def fingerprints(self) -> Mapping[str, Any]:
        """See `Conditioning`: labels come with the data."""
        return {}

    def conditions(self, batch: Batch) -> Conditions:
        """See `Conditioning`."""
        return Conditions(labels=batch["label"]) if self.class_names else Conditions()

    def guides(self, model: Any) -> bool:
        """See `Conditioning`: by its null row."""
        return bool(model.config.class_dropout_prob)

    def pipeline(self, **parts: Any) -> Any:
        """See `Conditioning`."""
        names = {str(label): name for label, name in enumerate(self.class_names)}
        return ClassToImagePipeline(id2label=names or None, **parts)
