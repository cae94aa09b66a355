"""Guidance as functions on predictions: extrapolate from a weak one through a strong one, in an interval of times."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from repagen.errors import UserError

# Sampler times are float32, so an end of the interval that lies on the grid is met only up to its rounding.
_TIME_TOLERANCE = 1e-6


@dataclass(frozen=True)
class GuidanceInterval:
    """Times at which guidance acts, both ends included, in the library's direction (t = 1 is noise).

    Source: guidance interval (2404.07724).

    Attributes:
        low: in [0, 1].
        high: in [low, 1].
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        """Refuse ends out of order or out of range.

        Raises:
            UserError: not 0 <= low <= high <= 1.
        """
        if not 0 <= self.low <= self.high <= 1:
            raise UserError(
                f"guidance_interval is ({self.low}, {self.high}); give (low, high) with 0 <= low <= high <= 1, "
                "where t = 0 is data and t = 1 is noise"
            )

    def contains(self, t: torch.Tensor | float) -> bool:
        """Whether the one time t lies inside."""
        return self.low - _TIME_TOLERANCE <= float(t) <= self.high + _TIME_TOLERANCE


def guide(weak: torch.Tensor, strong: torch.Tensor, scale: float) -> torch.Tensor:
    """Extrapolate: weak + scale (strong - weak), shape (B, ...); scale 0 is weak, 1 is strong.

    With the null class' prediction as `weak` this is classifier-free guidance (2207.12598); with a weaker model's
    prediction for the same class it is autoguidance (2406.02507).
    """
    return weak + scale * (strong - weak)
