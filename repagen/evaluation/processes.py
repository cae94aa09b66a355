"""What `accelerate launch` or torchrun asks of us: joining the processes that it started, and a place they share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

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


@contextmanager
def kept_or_temporary(folder: str | Path | None) -> Iterator[Path]:
    """Yield the given folder, or one that all processes see under one name that is gone afterwards."""
    if folder is not None:
        yield Path(folder)
        return
    state = PartialState()
    own = TemporaryDirectory(prefix="repagen-features-") if state.is_main_process else None
    name = [own.name if own else ""]
    if state.num_processes > 1:
        broadcast_object_list(name)
    try:
        yield Path(name[0])
        state.wait_for_everyone()  # a process that fails alone must not wait for the others
    finally:
        if own:
            own.cleanup()
