"""What `repagen stats` and `repagen cache` share: their arguments and their process group."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare dataset, autoencoder and how both are run through."""
    parser.add_argument("data", nargs="+", metavar="data.KEY=VALUE", help="the dataset, such as data.path=photos")
    parser.add_argument("--autoencoder", required=True, metavar="PATH", help="folder or Hub id of the autoencoder")
    parser.add_argument("--batch-size", type=positive, default=32, help="images per forward pass (%(default)s)")
    parser.add_argument("--num-workers", type=_not_negative, default=0, help="loader processes (%(default)s)")


@contextmanager
def command_device() -> Iterator[torch.device]:
    """Start accelerate's process group where a launcher asks for one; yield this process's device."""
    from accelerate import PartialState

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        yield state.device
    finally:
        state.destroy_process_group()  # a process that leaves it standing aborts at exit


def positive(text: str) -> int:
    """Read a number above 0, as a type of argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} given; allowed: 1 or more")
    return value


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number
