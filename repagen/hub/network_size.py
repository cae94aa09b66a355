"""Networks of configs from elsewhere: none may be larger than the weights that come with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from repagen.errors import UserError


def refuse_oversized(build: Callable[[], Any], folder: Path, config: str) -> None:
    """Refuse a config whose network has more numbers than its weights have bits, before it takes memory or time.

    The network is built without memory, and no further than to the first number too many.

    Args:
        build: makes the network.
        folder: with its weights, of which only the sizes are read; without any nothing is refused.
        config: place of its description, for messages.

    Raises:
        UserError: naming both sizes.
    """
    size = sum(path.stat().st_size for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    if not size:
        return
    thread, count = threading.get_ident(), 0

    def add(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        if parameter is None or threading.get_ident() != thread:
            return
        count += parameter.numel()
        if count > 8 * size:  # no quantisation stores a number in less than a bit
            raise UserError(
                f"{config}: describes a network of over {8 * size} numbers, and its weights have {size} bytes; config "
                "and weights belong to different models, get both anew"
            )

    hook = register_module_parameter_registration_hook(add)
    try:
        with torch.device("meta"):
            build()
    finally:
        hook.remove()
