"""Joining the processes that `accelerate launch` or torchrun started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator


@contextmanager
def all_processes() -> Iterator[None]:
    """Let all processes of a launcher take part in what is done inside, on CPUs too; without a launcher, this one."""
    accelerator = Accelerator()
    yield
    accelerator.end_training()  # not after an error: the others may never come
