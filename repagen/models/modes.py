"""Eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(*parts: nn.Module) -> Iterator[None]:
    """Put modules and all within them into eval mode; each gets its own mode back afterwards."""
    modes = {module: module.training for part in parts for module in part.modules()}
    try:
        for part in parts:
            part.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
