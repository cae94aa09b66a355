"""What a generator is told of each sample beside latent and time: a class, a text, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from repagen.randomness import uniform_per_sample


@dataclass(frozen=True)
class Conditions:
    """The conditions of a batch; what is None the generator does not take.

    Attributes:
        labels: class ids (B,), the null label where a sample has no class.
        text: token embeddings (B, L, D) float32 of prompts.
        text_mask: (B, L) bool, True = a real token; a row without any has no prompt, and the generator's own learned
            null token takes its place.
    """

    labels: torch.Tensor | None = None
    text: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None

    @property
    def arguments(self) -> dict[str, torch.Tensor]:
        """The conditions as arguments of a generator's call."""
        named = {
            "class_labels": self.labels,
            "encoder_hidden_states": self.text,
            "encoder_attention_mask": self.text_mask,
        }
        return {name: value for name, value in named.items() if value is not None}

    def replaced(self, chosen: torch.Tensor, other: Conditions) -> Conditions:
        """Give other conditions to some samples.

        Args:
            chosen: (B,) bool.
            other: of one row, which all chosen samples get; has what these have.
        """
        return Conditions(
            **{
                field.name: _replaced(getattr(self, field.name), chosen, getattr(other, field.name))
                for field in fields(self)
            }
        )


@dataclass(frozen=True)
class ConditionDropout:
    """Tells a share of the samples nothing, so that the model learns what classifier-free guidance (2207.12598) needs.

    Attributes:
        probability: of a sample to be told nothing.
        null: the conditions, of one row, that say nothing.
    """

    probability: float
    null: Conditions

    @classmethod
    def of_classes(cls, num_classes: int, probability: float) -> ConditionDropout:
        """Replace labels by the null label, `num_classes`; 0 classes = unconditional."""
        return cls(probability, Conditions(labels=torch.tensor([num_classes])) if num_classes else Conditions())

    def __call__(self, conditions: Conditions, generators: Sequence[torch.Generator]) -> Conditions:
        """Drop conditions by a draw a sample, from its own generator."""
        return conditions.replaced(uniform_per_sample(generators) < self.probability, self.null)


def _replaced(own: Any, chosen: torch.Tensor, other: Any) -> Any:
    if own is None:
        return None
    return torch.where(chosen.view(-1, *[1] * (own.ndim - 1)), other.to(own), own)
