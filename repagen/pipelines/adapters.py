"""LoRA adapters named on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from repagen.errors import UserError, refusing
from repagen.files import file_digest

_WEIGHTS_FILE = "pytorch_lora_weights.safetensors"


def load_adapters(pipe: Any, words: Sequence[str]) -> list[dict[str, Any]]:
    """Load adapters into a pipeline and switch them on together; return what each is, for metadata.

    Args:
        pipe: a `ClassToImagePipeline`.
        words: `PATH` or `PATH=WEIGHT` each: a folder, file or Hub id, and the factor of its layers, 1 by default.

    Raises:
        UserError: an adapter that cannot be loaded, naming it.
    """
    loaded = []
    for number, word in enumerate(words):
        path, weight = _path_and_weight(word)
        with refusing(f"--lora {path} cannot be loaded"):
            pipe.load_lora_weights(path, adapter_name=f"lora_{number}")
        loaded.append({"path": path, "weight": weight, "sha256": _sha256(path)})
    if loaded:
        names = [f"lora_{number}" for number in range(len(loaded))]
        with refusing("--lora: the adapters cannot be used together"):
            pipe.set_adapters(names, [adapter["weight"] for adapter in loaded])
    return loaded


def _path_and_weight(word: str) -> tuple[str, float]:
    path, equals, weight = word.rpartition("=")
    if not equals or Path(word).exists():  # a path may have the sign in its name
        return word, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise UserError(f"--lora {word}: {weight!r} is no number; give PATH or PATH=WEIGHT") from None


def _sha256(path: str) -> str | None:
    """Hash of an adapter's file, None where it cannot be told which that is."""
    place = Path(path)
    if place.is_dir():
        place = place / _WEIGHTS_FILE
    elif not place.is_file():
        place = Path(str(try_to_load_from_cache(path, _WEIGHTS_FILE)))
    return file_digest(place)["sha256"] if place.is_file() else None
