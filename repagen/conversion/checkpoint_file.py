"""Reading official checkpoint files: safely, and down to the bare state dict."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from repagen.errors import UserError

_WRAPPERS = ("ema", "model", "state_dict")  # the averaged weights win
_PREFIXES = ("module.", "_orig_mod.")


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a `.safetensors` file or a `.pt` file with `weights_only`, unwrap it, and drop wrappers' prefixes.

    Raises:
        UserError: no such file, an unreadable one, one that holds code, no state dict inside, or a tensor that holds
            NaN or infinity, by name.
    """
    content = read_checkpoint(path)
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    strange = [key for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if strange or not content:
        raise UserError(
            f"{path}: no state dict found, neither bare nor under {', '.join(_WRAPPERS)}; "
            f"{f'{strange[0]!r} is no tensor' if strange else 'the file is empty'}"
        )
    state = {_without_prefixes(key): value for key, value in content.items()}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; the checkpoint is damaged or diverged")
    return state


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read the outermost mapping of a `.safetensors` file, or of a `.pt` file with `weights_only`.

    Raises:
        UserError: no such file, an unreadable one, one that holds code, or something that is no mapping.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a .pt or .safetensors checkpoint")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Training files of the SiT family carry their command line; a Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, because it holds more than tensors and plain values or is damaged; "
            f"save its state dict alone ({_first_line(error)})"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: unreadable, damaged or cut short ({_first_line(error)})") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _without_prefixes(key: str) -> str:
    while prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None):
        key = key[len(prefix) :]
    return key
