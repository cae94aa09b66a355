"""How read-outs are trained: all at once by L-BFGS, or in seeded batches by AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from repagen.errors import UserError
from repagen.randomness import derived_seed, generator_for

WEIGHT_DECAY = 1e-3  # of the full-batch fit: half of it times the squared parameters is added to the loss
TOLERANCE = 1e-7  # of the full-batch fit, on each component of the gradient
LEARNING_RATE = 5e-3  # of AdamW, falling to 0 as a cosine
ADAM_WEIGHT_DECAY = 0.05


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Make modules built within start from weights that depend on (seed, purpose) alone; the global state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, purpose))
        yield


def check_positive(**values: float) -> None:
    """Check that each of the named values is above 0.

    Raises:
        UserError: naming the first that is not.
    """
    for name, value in values.items():
        if value <= 0:
            raise UserError(f"{name}: must be above 0, got {value}")


@torch.enable_grad()
def fit_full_batch(modules: Sequence[nn.Module], loss: Callable[[], torch.Tensor], iterations: int) -> bool:
    """Minimise a loss over the whole training set plus the decay of all parameters but biases, by L-BFGS.

    Returns:
        Whether no component of the gradient is above `TOLERANCE` at the end.
    """
    named = [pair for module in modules for pair in module.named_parameters()]
    parameters = [parameter for _, parameter in named]
    decaying = [parameter for name, parameter in named if name.split(".")[-1] != "bias"]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        max_eval=10 * iterations,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-15,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        squares = torch.stack([parameter.square().sum() for parameter in decaying])
        value = loss() + WEIGHT_DECAY / 2 * squares.sum()
        value.backward()
        return value

    optimizer.step(closure)
    closure()  # the gradient where it ended, which the line search may have left
    return max(float(p.grad.abs().max()) for p in parameters if p.grad is not None) <= TOLERANCE


@torch.enable_grad()
def fit_batches(
    module: nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], batches: Sequence[torch.Tensor]
) -> None:
    """Take one step of AdamW for the loss of each batch of sample numbers."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=ADAM_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(batches))
    for batch in batches:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        schedule.step()


def seeded_batches(count: int, batch_size: int, *, epochs: int, seed: int, purpose: str) -> list[torch.Tensor]:
    """Return the sample numbers of each batch: `epochs` passes over 0 ... count - 1, each in an order of its own."""
    orders = [torch.randperm(count, generator=generator_for(seed, purpose, epoch)) for epoch in range(epochs)]
    return [batch for order in orders for batch in order.split(batch_size)]
