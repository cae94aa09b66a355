"""Weight of the alignment loss over training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from repagen.errors import UserError


@dataclass(frozen=True)
class AlignmentSchedule:
    """How the weight of the alignment loss changes.

    Attributes:
        kind: "constant" (REPA); "cutoff", the weight up to `end_step` and 0 from there on (HASTE, Wang et al. 2025);
            "cosine", half a cosine from the weight down to 0 at `end_step`.
        weight: the weight at step 0 (REPA 0.5, iREPA 1.0).
        end_step: step from which the weight is 0, for "cutoff" and "cosine".
    """

    kind: Literal["constant", "cutoff", "cosine"] = "constant"
    weight: float = 0.5
    end_step: int | None = None

    def validate(self) -> None:
        """Refuse contradictory values.

        Raises:
            UserError: naming the field.
        """
        if self.kind != "constant" and (self.end_step is None or self.end_step <= 0):
            raise UserError(f"end_step: the schedule {self.kind!r} needs a step above 0, got {self.end_step}")
        if self.weight < 0:
            raise UserError(f"weight: the weight of the alignment loss may not be negative, got {self.weight}")

    def __post_init__(self) -> None:
        self.validate()


def alignment_weight(step: int, schedule: AlignmentSchedule) -> float:
    """Weight of the alignment loss at an optimiser step, counted from 0."""
    if schedule.kind == "constant":
        return schedule.weight
    assert schedule.end_step is not None  # validated on construction
    if step >= schedule.end_step:
        return 0.0
    if schedule.kind == "cutoff":
        return schedule.weight
    return schedule.weight * 0.5 * (1 + math.cos(math.pi * step / schedule.end_step))
