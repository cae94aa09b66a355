"""What decides a sampling besides noise and classes, and the defaults that a pipeline carries for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from repagen.errors import UserError
from repagen.flow.guidance import GUIDANCE_METHODS, GuidanceInterval, GuidanceMethod


@dataclass(frozen=True)
class SamplingOptions:
    """The sampler's steps and the guidance of one call.

    Attributes:
        num_inference_steps: in the scheduler's counting.
        guidance_scale: weak + scale (strong - weak); 1 or less leaves guidance and its evaluations out.
        guidance_interval: (low, high) in t, both ends included; no weak prediction is made outside.
        guidance_channels: guide only the first so many channels of the latent; None guides all.
        guidance_method: whose prediction is the weak one; None: autoguidance where the pipeline holds a second model,
            else classifier-free guidance.
        zero_init_steps: the velocity of the first so many steps is 0 where guidance is on (the zero-init of CFG-Zero*,
            2503.18886, as SVG samples); they evaluate nothing.
        num_loops: loops of a looped generator; None: as many as it was trained with.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_channels: int | None = None
    guidance_method: GuidanceMethod | None = None
    zero_init_steps: int = 0
    num_loops: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no model takes.

        Raises:
            UserError: names the option and what is allowed.
        """
        if not (is_number(self.guidance_scale) and math.isfinite(self.guidance_scale)):
            raise UserError(f"guidance_scale is {self.guidance_scale!r}; give a finite number")
        interval: Any = self.guidance_interval
        if not (isinstance(interval, (tuple, list)) and len(interval) == 2 and all(map(is_number, interval))):
            raise UserError(f"guidance_interval is {interval!r}; give (low, high)")
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))  # JSON knows lists only
        GuidanceInterval(*self.guidance_interval)
        if self.guidance_method not in (None, *GUIDANCE_METHODS):
            allowed = ", ".join(GUIDANCE_METHODS)
            raise UserError(f"guidance_method is {self.guidance_method!r}; allowed: {allowed}")
        least_of = {"num_inference_steps": 1, "guidance_channels": 1, "zero_init_steps": 0, "num_loops": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and not (is_number(value, Integral) and value >= least):
                raise UserError(f"{name} is {value!r}; give a whole number, at least {least}")

    @classmethod
    def resolve(cls, defaults: Mapping[str, Any] | None, given: Mapping[str, Any]) -> SamplingOptions:
        """Return what was given, completed by a pipeline's defaults, completed by the library's.

        Args:
            defaults: of the pipeline, option => value.
            given: option => value; None counts as not given.

        Raises:
            UserError: an unknown option, or a value that no model takes.
        """
        names = [field.name for field in fields(cls)]
        for place, options in (("sampling_defaults", defaults or {}), ("the sampling options", given)):
            if not isinstance(options, Mapping):
                raise UserError(f"{place}: must be options and their values, got {options!r}")
            unknown = sorted(set(options) - set(names))
            if unknown:
                raise UserError(f"{place}: {', '.join(unknown)} is unknown; allowed: {', '.join(names)}")
        chosen = {**(defaults or {}), **{name: value for name, value in given.items() if value is not None}}
        return cls(**{name: value for name, value in chosen.items() if value is not None})


def is_number(value: Any, kind: type = Real) -> bool:
    """Whether a value is a number of a kind of `numbers`, of Python or numpy; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)
