"""Times of the flow: the shift that moves them towards noise, and the law they are drawn from in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch

from repagen.errors import UserError

Time = TypeVar("Time", torch.Tensor, float)


@dataclass(frozen=True)
class TimeShift:
    """Monotone map of [0, 1] onto itself, S(t) = alpha t / (1 + (alpha - 1) t).

    On the logit scale it is a translation: logit S(t) = logit t + ln alpha. One object serves training and sampling.
    Source: SD3 (2403.03206, equation 23), RAE (2510.11690, section 4).

    Attributes:
        alpha: > 0; above 1 moves times towards noise, 1 leaves them.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        """Refuse an alpha that is no shift.

        Raises:
            UserError: alpha is not a positive finite number.
        """
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise UserError(f"the time shift's alpha is {self.alpha}; give a positive number (1 = no shift)")

    @classmethod
    def for_latent_shape(cls, shape: Sequence[int], base_dimension: int = 4096) -> TimeShift:
        """Shift for latents of shape (C, h, w): alpha = sqrt(C h w / base_dimension), RAE's rule with base 4096."""
        return cls(math.sqrt(math.prod(shape) / base_dimension))

    def __call__(self, t: Time) -> Time:
        """Shift times t in [0, 1]; a tensor of any shape or a number."""
        return self.alpha * t / (1 + (self.alpha - 1) * t)

    def inverse(self, t: Time) -> Time:
        """Undo the shift: `shift.inverse(shift(t))` is t."""
        return t / (self.alpha - (self.alpha - 1) * t)


@dataclass(frozen=True)
class TimeDistribution:
    """Law of training times, sampled through its inverse distribution function, then shifted.

    Attributes:
        kind: "uniform" on [0, maximum], or "logit_normal": sigmoid of a normal, truncated to [0, maximum].
        mean, std: of the normal, in logits; "uniform" ignores them.
        maximum: upper end before the shift, in (0, 1]; RAE trains on [0, 0.999].
        shift: applied last.
    """

    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    maximum: float = 1.0
    shift: TimeShift = field(default_factory=TimeShift)

    def __post_init__(self) -> None:
        """Refuse parameters that define no law.

        Raises:
            UserError: unknown kind, std not positive, maximum outside (0, 1].
        """
        if self.kind not in ("uniform", "logit_normal"):
            raise UserError(f"the time distribution's kind is {self.kind!r}; allowed: uniform, logit_normal")
        if not self.std > 0:
            raise UserError(f"the time distribution's std is {self.std}; give a positive number")
        if not 0 < self.maximum <= 1:
            raise UserError(f"the time distribution's maximum is {self.maximum}; give a number in (0, 1]")

    def from_uniform(self, u: torch.Tensor) -> torch.Tensor:
        """Map uniform numbers (B,) in [0, 1) to times (B,), float32, in [0, S(maximum)]. Increasing in u."""
        u = u.to(torch.float32)
        t = u * self.maximum if self.kind == "uniform" else self._truncated_logit_normal(u)
        return self.shift(t)

    def _truncated_logit_normal(self, u: torch.Tensor) -> torch.Tensor:
        maximum = torch.tensor(self.maximum, dtype=torch.float64)
        mass_below_maximum = torch.special.ndtr((torch.logit(maximum) - self.mean) / self.std).item()
        t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u * mass_below_maximum))
        return t.clamp(max=self.maximum)
