"""What a saved pipeline consists of, read from its files, and whether it can be loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from repagen.doctor.report import Finding, Section, findings_of, readable_size
from repagen.errors import UserError, refusing
from repagen.hub.inspection import inspect_folder
from repagen.pipelines.loading import saved_pipeline_class
from repagen.pipelines.provenance import training_record


def check_model(name: str) -> Section:
    """Look through a pipeline.

    Args:
        name: its folder, or Hub id of one in the local cache.
    """
    found = findings_of("model", lambda: _parts(_folder(name)))
    if not any(finding.level == "problem" for finding in found):
        found += findings_of("loading", lambda: _loading(_folder(name)))
    return Section("Model", found)


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        with refusing(f"--model {name}: neither a folder nor a Hub id"):
            index = try_to_load_from_cache(name, "model_index.json")
        if not isinstance(index, str):
            raise UserError(f"--model {name}: no such folder, and no pipeline of that Hub id in the local cache")
        folder = Path(index).parent
    if not (folder / "model_index.json").is_file():
        raise UserError(f"--model {name}: {folder} has no model_index.json, so it is no pipeline")
    inspect_folder(folder, f"--model {name}")
    return folder


def _parts(folder: Path) -> Iterable[Finding]:
    index = _read_json(folder / "model_index.json")
    yield Finding("pipeline", f"{index.get('_class_name')} in {folder}", facts={"class": index.get("_class_name")})
    total = 0
    for part, entry in sorted(index.items()):
        if not (isinstance(entry, list) and len(entry) == 2 and entry[1]):
            continue
        if not (folder / part).is_dir():
            yield Finding(part, f"{entry[1]}: its folder {folder / part} is missing", "problem")
            continue
        parameters, size = _weights(folder / part)
        total += parameters
        text = f"{parameters / 1e6:.3g} M numbers in {readable_size(size)}" if parameters else "no weights"
        yield Finding(part, f"{entry[1]}, {text}", facts={"class": entry[1], "numbers": parameters, "bytes": size})
    memory = {"float32": 4 * total, "bfloat16": 2 * total}
    text = ", ".join(f"{readable_size(size)} in {dtype}" for dtype, size in memory.items())
    yield Finding("memory of weights", text, facts=memory)
    if "text_encoder" in index:
        yield from findings_of("prompts", lambda: [_prompts(folder)])
    else:
        yield from findings_of("classes", lambda: [_classes(folder, index)])
    yield from findings_of("training", lambda: [_training(folder)])


def _training(folder: Path) -> Finding:
    training = training_record(folder)
    recipe = f"recipe {training.get('recipe')}, step {training.get('step')}" if training else "not said"
    return Finding("training", recipe, facts=training)


def _loading(folder: Path) -> Iterable[Finding]:
    """Load the pipeline on the CPU as a user would, and look at every number."""
    pipe = saved_pipeline_class(str(folder)).from_pretrained(folder)
    bad = [
        f"{part}.{key}"
        for part, model in pipe.components.items()
        if isinstance(model, torch.nn.Module)
        for key, value in model.state_dict().items()
        if value.is_floating_point() and not value.float().isfinite().all()
    ]
    if bad:
        text = f"{len(bad)} tensors hold infinite values or NaN; take an earlier checkpoint, or fetch it again"
        yield Finding("loading", text, "problem", bad[:10], {"not_finite": bad})
    else:
        yield Finding("loading", "works on the CPU, and all weights are finite")


def _prompts(folder: Path) -> Finding:
    """What reads the prompts, how much of one, and whether its weights are here."""
    path = folder / "text_encoder" / "config.json"
    if not path.is_file():
        return Finding("prompts", "the pipeline has no text encoder, calls give prompt_embeds")
    config = _read_json(path)
    read = [
        f"{encoder.get('name_or_path') or encoder['family']} reads {encoder['max_length']} tokens"
        for encoder in config["encoders"]
    ]
    if config.get("encoders_stored", True):
        return Finding("prompts", ", ".join(read), facts={"encoders": config["encoders"]})
    text = f"{', '.join(read)}; its weights are not inside, they are fetched when it reads the first"
    return Finding("prompts", text, "note", facts={"encoders": config["encoders"]})


def _classes(folder: Path, index: dict[str, Any]) -> Finding:
    path = folder / "transformer" / "config.json"
    count = _read_json(path).get("num_classes") if path.is_file() else None
    names = index.get("id2label") or {}
    if not count:
        return Finding("classes", "none" if count == 0 else "not said")
    unnamed = count - len(names)
    shown = ", ".join(f"{label} {name}" for label, name in list(names.items())[:10])
    text = f"{count}: {shown}{' ...' if len(names) > 10 else ''}" if names else f"{count}, without names"
    level: Any = "note" if names and unnamed else "ok"
    details = [f"{unnamed} of them have no name in id2label"] if names and unnamed else []
    return Finding("classes", text, level, details, {"num_classes": count, "id2label": names})


def _weights(folder: Path) -> tuple[int, int]:
    """Count the numbers in all safetensors below a folder, and their bytes on disk."""
    numbers = size = 0
    for path in sorted(folder.rglob("*.safetensors")):
        size += path.stat().st_size
        with safe_open(path, framework="pt") as file:
            numbers += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return numbers, size


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
