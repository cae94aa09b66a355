"""What a saved pipeline consists of, read from its files without loading it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from repagen.doctor.report import Finding, Section, readable_size
from repagen.errors import UserError, refusing
from repagen.pipelines.provenance import training_record


def check_model(name: str) -> Section:
    """Look through a pipeline.

    Args:
        name: its folder, or Hub id of one in the local cache.
    """
    try:
        return Section("Model", list(_parts(_folder(name))))
    except UserError as error:
        return Section("Model", [Finding("model", str(error), "problem")])


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
    yield _classes(folder, index)
    training = training_record(folder)
    recipe = f"recipe {training.get('recipe')}, step {training.get('step')}" if training else "not said"
    yield Finding("training", recipe, facts=training)


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
        with refusing(f"{path}: cannot be read"), _opened(path) as file:
            for key in file.keys():  # noqa: SIM118  # no dictionary
                count = 1
                for extent in file.get_slice(key).get_shape():
                    count *= extent
                numbers += count
    return numbers, size


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path}: no whole safetensors file ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    with refusing(f"{path}: cannot be read as JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content
