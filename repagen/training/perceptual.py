"""The perceptual part of the decoder's loss: what of it is configured, and opening it."""

from __future__ import annotations

from dataclasses import dataclass

from repagen.config import require
from repagen.errors import naming
from repagen.evaluation.metrics.perceptual import PerceptualDistance


@dataclass
class LpipsConfig:
    """The perceptual part of the decoder's loss.

    Attributes:
        weight: of LPIPS beside the L1 loss; 0 = without LPIPS, and no weights are needed.
        start_epoch: epochs of the dataset before it begins; RAE 0.
        start_step: the same in optimiser steps; takes the place of `start_epoch`.
        trunk: local VGG16 state dict; None = torchvision's in the torch cache.
        heads: local file of the linear heads; None = the one in the installed `lpips` package.
    """

    weight: float = 1.0
    start_epoch: float = 0.0
    start_step: int | None = None
    trunk: str | None = None
    heads: str | None = None

    def validate(self) -> None:
        """Check the ranges."""
        require(self.weight >= 0, "weight", self.weight, "at least 0")
        require(self.start_epoch >= 0, "start_epoch", self.start_epoch, "at least 0")
        require(self.start_step is None or self.start_step >= 0, "start_step", self.start_step, "at least 0")

    def open(self) -> PerceptualDistance | None:
        """Load the network from its files; None where the weight is 0.

        Raises:
            UserError: as `PerceptualDistance.from_files`, in the words of this configuration.
        """
        if self.weight == 0:
            return None
        with naming({"LPIPS trunk": "lpips.trunk", "LPIPS heads": "lpips.heads"}):
            return PerceptualDistance.from_files(self.trunk, self.heads)
