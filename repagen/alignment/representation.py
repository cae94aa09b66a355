"""`RepresentationAlignment`: taps a generator's blocks from outside and compares them with frozen encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from repagen.alignment.losses import cosine_loss, spatial_cosine_loss
from repagen.alignment.projectors import ProjectorKind, make_projector
from repagen.alignment.token_grid import infer_grid, resize_tokens
from repagen.errors import UserError

LossKind = Literal["cosine", "spatial_cosine"]
_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cosine": cosine_loss,
    "spatial_cosine": spatial_cosine_loss,
}


@dataclass(frozen=True)
class AlignmentTarget:
    """One encoder to align with.

    Attributes:
        dim: width of the encoder's tokens.
        block: which of the generator's `blocks` is aligned, counted from 1; its output is taken.
        projector: "mlp" (REPA), "conv" (iREPA) or "linear".
        loss: "cosine" (REPA) or "spatial_cosine" (iREPA).
        projector_dim: hidden width of the MLP.
        kernel_size: side of the convolution.
    """

    dim: int
    block: int = 8
    projector: ProjectorKind = "mlp"
    loss: LossKind = "cosine"
    projector_dim: int = 2048
    kernel_size: int = 3


class _Record:
    """Block outputs of one forward pass. Copies of a tapped model get an empty record, not this one's tensors."""

    def __init__(self) -> None:
        self.active = False
        self.grid: tuple[int, int] = (0, 0)
        self.tokens: dict[int, torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"active": False, "grid": self.grid, "tokens": {}}


class _Tap:
    """Forward hook of one block."""

    def __init__(self, record: _Record, block: int) -> None:
        self.record = record
        self.block = block

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.record.active:
            self.record.tokens[self.block] = output


class RepresentationAlignment(nn.Module):
    """Projectors and losses of REPA (Yu et al. 2025) and its descendants, for any model with `blocks`.

        with alignment.capture(model):
            prediction = model(x_t, t, class_labels=labels).sample
        loss = flow_loss + weight * alignment.loss([encoder(images).tokens])

    The generator holds no trace of it in its weights. The state dict holds the projectors only.

    Args:
        hidden_size: width of the tokens of the generator's `blocks`.
        targets: one entry per encoder.
    """

    def __init__(self, hidden_size: int, targets: Sequence[AlignmentTarget]) -> None:
        super().__init__()
        if not targets:
            raise UserError("alignment: no targets; name at least one encoder, or leave alignment out")
        self.hidden_size = hidden_size
        self.targets = tuple(targets)
        self.projectors = nn.ModuleList(
            make_projector(target.projector, hidden_size, target.dim, target.projector_dim, target.kernel_size)
            for target in self.targets
        )
        self._record = _Record()

    def attach(self, model: nn.Module) -> None:
        """Hook the aligned blocks of a model; done once, by the first `capture` at the latest.

        A model that is compiled should be attached before its first compiled forward pass, which otherwise may have
        been traced without the hooks.

        Args:
            model: has `blocks` and `token_grid`; may be wrapped by DistributedDataParallel or `torch.compile`.

        Raises:
            UserError: a target names a block that the model does not have, or the widths differ.
        """
        network = _unwrap(model)
        self._check_blocks(network)
        self._record.grid = network.token_grid
        for index in sorted({target.block for target in self.targets}):
            block = network.blocks[index - 1]
            taps = [hook for hook in block._forward_hooks.values() if isinstance(hook, _Tap)]
            if not any(tap.record is self._record for tap in taps):
                block.register_forward_hook(_Tap(self._record, index))

    def _check_blocks(self, network: Any) -> None:
        depth = len(network.blocks)
        for number, target in enumerate(self.targets):
            if not 1 <= target.block <= depth:
                raise UserError(
                    f"alignment: targets.{number}.block is {target.block}, but the model has blocks 1..{depth}"
                )
        width = network.config.hidden_size
        if width != self.hidden_size:
            raise UserError(f"alignment: hidden_size is {self.hidden_size}, but the model's blocks are {width} wide")

    @contextmanager
    def capture(self, model: nn.Module) -> Iterator[None]:
        """Keep the aligned blocks' outputs of the forward pass run inside, for `loss` and `projections`.

        Raises:
            UserError: as `attach`.
        """
        self.attach(model)
        self._record.tokens.clear()
        self._record.active = True
        try:
            yield
        finally:
            self._record.active = False

    def projections(self) -> list[torch.Tensor]:
        """Projected tokens of the last captured pass, one (B, N, dim) per target.

        Raises:
            UserError: nothing was captured.
        """
        return [
            projector(self._captured(target.block).to(_dtype_of(projector)), self._record.grid)
            for target, projector in zip(self.targets, self.projectors, strict=True)
        ]

    def _captured(self, block: int) -> torch.Tensor:
        if block not in self._record.tokens:
            raise UserError(
                f"alignment: no output of block {block} was captured; run the model inside `with alignment.capture"
                "(model):`, and call alignment.attach(model) before the first pass of a compiled model"
            )
        return self._record.tokens[block]

    def project(
        self, model: nn.Module, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Run the model and project: x (B, C, h, w), t (B,) in [0, 1] => one (B, N, dim) per target."""
        with self.capture(model):
            model(x, t, class_labels=class_labels)
        return self.projections()

    def loss(
        self,
        target_tokens: Sequence[torch.Tensor],
        target_grids: Sequence[tuple[int, int]] | None = None,
    ) -> torch.Tensor:
        """Mean over encoders of the loss of the last captured pass.

        Args:
            target_tokens: one (B, N, dim) per target, any dtype, row-major without prefix tokens. Where an encoder's
                grid is not the generator's, its tokens are resized bilinearly to it.
            target_grids: rows and columns of each encoder's grid; by default the grid of the generator, or the grid
                of the given number of tokens that has the same shape.

        Returns:
            Scalar float32, without the weight.

        Raises:
            UserError: nothing captured, targets that do not fit in number, batch, width, or grid.
        """
        if len(target_tokens) != len(self.targets):
            raise UserError(f"alignment: {len(self.targets)} targets need as many tensors, got {len(target_tokens)}")
        grids = target_grids or [infer_grid(tokens.shape[1], self._record.grid) for tokens in target_tokens]
        losses = []
        for target, projection, tokens, grid in zip(
            self.targets, self.projections(), target_tokens, grids, strict=True
        ):
            if tokens.shape[0] != projection.shape[0] or tokens.shape[-1] != target.dim:
                raise UserError(
                    f"alignment: expected target tokens of shape ({projection.shape[0]}, tokens, {target.dim}), "
                    f"got {tuple(tokens.shape)}"
                )
            fitted = resize_tokens(tokens.detach(), grid, self._record.grid)
            losses.append(_LOSSES[target.loss](projection, fitted))
        return torch.stack(losses).mean()

    def forward(
        self,
        target_tokens: Sequence[torch.Tensor],
        target_grids: Sequence[tuple[int, int]] | None = None,
    ) -> torch.Tensor:
        """`loss`, as a module call, which is what DistributedDataParallel synchronises."""
        return self.loss(target_tokens, target_grids)


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _unwrap(model: Any) -> Any:
    while not hasattr(model, "blocks") and hasattr(model, "module"):
        model = model.module
    return model
