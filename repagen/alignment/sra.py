"""Self-representation alignment (SRA, Jiang et al. 2025, arXiv 2505.02831): the generator follows its own average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from repagen.alignment.plugin import (
    AlignmentBatch,
    AlignmentTerm,
    Record,
    blocks_of,
    check_width,
    listen,
    require_flow,
    unwrap,
)
from repagen.alignment.projectors import dtype_of, linear_stack
from repagen.errors import UserError
from repagen.flow.path import interpolate
from repagen.randomness import uniform_per_sample


class SelfAlignment(AlignmentTerm):
    """Smooth L1 between an early block's projected output and a late block of the averaged generator at less noise.

    The teacher sees t' = max(0, t - U(0, max_time_gap)) on the path of the same latent, noise and label, null label
    included, one draw a sample. Its output is neither projected nor differentiated. Published for SiT-XL/2 (the
    released code): blocks 8 and 20, gap 0.2, beta 0.05, weight 0.2 at 256 px for 150 epochs, then slowly falling.

    Args:
        hidden_size: width of the tokens of the generator's `blocks`.
        block: of the student, counted from 1.
        teacher_block: of the teacher, counted from 1.
        max_time_gap: largest difference of the times.
        beta: difference from which the loss grows linearly.
    """

    name = "self_alignment"
    needs = frozenset({"teacher"})

    def __init__(
        self,
        hidden_size: int,
        block: int = 8,
        teacher_block: int = 20,
        max_time_gap: float = 0.2,
        beta: float = 0.05,
    ) -> None:
        super().__init__()
        if not 0 <= max_time_gap <= 1:
            raise UserError(f"alignment: self_alignment.max_time_gap must lie in [0, 1], got {max_time_gap}")
        if beta <= 0:
            raise UserError(f"alignment: self_alignment.beta must be above 0, got {beta}")
        self.hidden_size = hidden_size
        self.block = block
        self.teacher_block = teacher_block
        self.max_time_gap = max_time_gap
        self.beta = beta
        self.projector = linear_stack([hidden_size, 2 * hidden_size, hidden_size])
        self._teacher_record = Record()

    def tapped(self, network: Any) -> Mapping[int, nn.Module]:
        """See `AlignmentTerm.tapped`."""
        require_flow(network, self.name)
        if getattr(network.config, "class_token_dim", 0):
            raise UserError("alignment: self_alignment fits no generator with class_token_dim; leave one of them out")
        check_width(network, self.hidden_size)
        names = ("self_alignment.block", "self_alignment.teacher_block")
        blocks_of(network, [self.block, self.teacher_block], names.__getitem__)
        return blocks_of(network, [self.block], names.__getitem__)

    def teacher_tokens(self, batch: AlignmentBatch) -> torch.Tensor:
        """Tokens (B, N, hidden_size) of the teacher's block at less noise; runs the teacher, without gradient.

        Raises:
            UserError: the batch has no teacher.
        """
        teacher = batch.need("teacher", self.name)
        listen(unwrap(teacher).blocks[self.teacher_block - 1], self._teacher_record, self.teacher_block)
        gap = self.max_time_gap * uniform_per_sample(batch.draws(self.name)).to(batch.t)
        t = (batch.t - gap).clamp(min=0)
        with torch.no_grad(), self._teacher_record.recording():
            teacher(interpolate(batch.latents, batch.noise, t), t, **batch.conditions.arguments)
        return self._teacher_record.values[self.teacher_block]

    def batch_loss(self, batch: AlignmentBatch, output: Any) -> torch.Tensor:
        """See `AlignmentTerm.batch_loss`."""
        return self.loss(self.teacher_tokens(batch))

    def loss(self, teacher_tokens: torch.Tensor) -> torch.Tensor:
        """Mean smooth L1 of the last captured pass to the teacher's tokens (B, N, hidden_size), a scalar float32.

        Raises:
            UserError: nothing was captured.
        """
        tokens = self.captured_tokens(self.block)
        projection = self.projector(tokens.to(dtype_of(self.projector)))
        target = teacher_tokens[:, : tokens.shape[1]].detach()
        return F.smooth_l1_loss(projection.float(), target.float(), beta=self.beta)
