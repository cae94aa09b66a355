"""Joining the processes that `accelerate launch` or torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from repagen.errors import UserError


@contextmanager
def all_processes() -> Iterator[None]:
    """Let all processes of a launcher take part in what is done inside, on CPUs too; without a launcher, this one.

    Raises:
        UserError: when processes were started that did not find each other.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise UserError(
            f"{started} processes were started, but this one knows of {accelerator.num_processes}; start them with "
            "`accelerate launch --multi_gpu` or torchrun"
        )
    yield
    accelerator.end_training()  # not after an error: the others may never come
