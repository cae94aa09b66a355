"""Adapters named on a command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repagen.errors import UserError, naming, refusing
from repagen.files import file_digest
from repagen.pipelines.adapter_file import COMPONENT, find_adapter_file


def load_adapters(pipe: Any, words: Sequence[str]) -> list[dict[str, Any]]:
    """Load adapters into a pipeline and switch them on together; return what each is, for metadata.

    Args:
        pipe: a pipeline of this library.
        words: `PATH` or `PATH=WEIGHT` each: a file, a folder that holds one, or a Hub id; and the factor of its LoRA
            layers, 1 by default.

    Raises:
        UserError: an adapter that cannot be loaded, naming it; a weight for one without LoRA layers.
    """
    weights: dict[str, float] = {}
    facts = []
    for number, word in enumerate(words):
        path, weight = _path_and_weight(word)
        name = f"adapter_{number}"
        with naming({"": f"--lora {word}: "}), refusing("cannot be loaded"):
            file = find_adapter_file(Path(path), None)
            pipe.load_lora_weights(file, adapter_name=name)
        has_layers = name in pipe.get_list_adapters().get(COMPONENT, [])
        if has_layers:
            weights[name] = weight
        elif weight != 1.0:
            raise UserError(
                f"--lora {word}: this adapter holds classes only, which take no weight; give --lora {path}"
            )
        facts.append({"path": path, "weight": weight, "sha256": file_digest(file)["sha256"]})
    if weights:
        pipe.set_adapters(list(weights), list(weights.values()))
    return facts


def _path_and_weight(word: str) -> tuple[str, float]:
    path, equals, weight = word.rpartition("=")
    if not equals or Path(word).exists():  # a path may have the sign in its name
        return word, 1.0
    try:
        factor = float(weight)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise UserError(f"--lora {word}: {weight!r} is no finite number; give PATH or PATH=WEIGHT")
    return path, factor
