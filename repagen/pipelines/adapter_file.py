"""Files of adapters: LoRA layers, rows of new classes, or both; found, read, checked and written.

A `.bin` of `torch.save` is read where the user names it, never found by itself, and by `weights_only=True` alone.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import safe_open
from safetensors.torch import save

from repagen.errors import UserError, refusing
from repagen.files import put_file
from repagen.hub.fetching import fetch_snapshot
from repagen.hub.inspection import inspect_weights_file, refuse_link_outside

COMPONENT = "transformer"
ROWS_KEY = f"{COMPONENT}.label_embedder.rows"
CLASS_NAMES_KEY = "class_names"
PIPELINE_KEY = "pipeline"  # whose value is the class of the pipeline
# What a file may ask of peft; the rest imports modules, reads files or changes the base weights.
_CONFIG_KEYS = frozenset({
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "inference_mode", "task_type", "peft_type",
    "base_model_name_or_path", "revision", "peft_version",
})  # fmt: skip
# peft takes these for regular expressions, some of which it would search with for ever.
_NAME_LISTS = ("target_modules", "exclude_modules", "layers_pattern")
_NAME_TABLES = ("rank_pattern", "alpha_pattern")
_PLAIN_NAME = re.compile(r"\^?[\w.-]+")
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """What an adapter holds.

    Attributes:
        layers: LoRA weights by their full names, `transformer.blocks.0.attn.to_q.lora_A.weight` and so on.
        metadata: diffusers' metadata of them: fields of `LoraConfig`, prefixed by the component; None: none.
        rows: embeddings (R, D) of its classes; None: it brings none.
        class_names: the R names; None where they are not known.
    """

    layers: dict[str, torch.Tensor]
    metadata: dict[str, Any] | None
    rows: torch.Tensor | None
    class_names: list[str] | None


def find_adapter_file(source: str | Path, weight_name: str | None, subfolder: str | None = None, **hub: Any) -> Path:
    """Return the adapter file that a path or Hub id means.

    Args:
        source: a file, a folder that holds one, or a Hub repository ("org/name").
        weight_name: name of the file in the folder or repository; None: `pytorch_lora_weights.safetensors`.
        subfolder: of the folder or repository.
        hub: `revision`, `token`, `local_files_only`, `cache_dir` and `force_download` of `fetch_snapshot`.

    Raises:
        UserError: no such file, a link out of the folder, or a repository that is closed, unknown or out of reach.
    """
    name = weight_name or LORA_WEIGHT_NAME_SAFE
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        pattern = f"{subfolder}/{name}" if subfolder else name
        path = fetch_snapshot(str(source), patterns=[pattern], what="adapter", **{"revision": None, **hub})
    folder = path / (subfolder or "")
    if not (folder / name).is_file():
        found = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))) or "none"
        raise UserError(f"{folder}: no adapter file {name}; safetensors files there: {found}; give weight_name")
    refuse_link_outside(folder / name, path, "adapter")
    return folder / name


def read_adapter_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None, list[str] | None]:
    """Read all tensors of a file, its LoRA metadata and its class names (None: none, as in every `.bin`).

    Raises:
        UserError: another format, broken, with metadata of another form, or a `.bin` of more than tensors by name.
    """
    inspect_weights_file(path, "adapter")
    header: dict[str, str] = {}
    try:
        if path.suffix == ".bin":
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # whatever strange bytes make of the readers
        raise UserError(f"adapter {path} cannot be read ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(tensors, dict) or not all(_is_named_tensor(*item) for item in tensors.items()):
        raise UserError(f"adapter {path} holds more than dense tensors and their names; save it as safetensors")
    metadata = _from_json(path, header, LORA_ADAPTER_METADATA_KEY, dict)
    names = _from_json(path, header, CLASS_NAMES_KEY, list)
    if ROWS_KEY in tensors and names is None:
        raise UserError(f"{path}: has {ROWS_KEY}, but its metadata has no {CLASS_NAMES_KEY}; save it anew")
    return tensors, metadata, names


def _is_named_tensor(name: object, tensor: object) -> bool:
    dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_meta
    return isinstance(name, str) and dense


def _from_json(path: Path, header: Mapping[str, str], key: str, kind: type) -> Any:
    if key not in header:
        return None
    with refusing(f"{path}: metadata {key} is not JSON"):
        value = json.loads(header[key])
    if not isinstance(value, kind):
        raise UserError(f"{path}: metadata {key} must be a JSON {kind.__name__}, got {type(value).__name__}")
    return value


def split_adapter(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None, class_names: Sequence[str] | None
) -> Adapter:
    """Part tensors of an adapter into LoRA layers and label rows.

    Raises:
        UserError: tensors of another component, of no LoRA or not finite, rows that do not go with the names, or
            metadata that asks for more than LoRA layers.
    """
    foreign = [key for key in tensors if not key.startswith(f"{COMPONENT}.")]
    if foreign or not tensors:
        found = f"tensor {foreign[0]!r}" if foreign else "no tensor"
        raise UserError(f"adapter: {found}; all names must begin with '{COMPONENT}.', so it is of another pipeline")
    layers = {key: tensor for key, tensor in tensors.items() if key != ROWS_KEY}
    strange = [key for key in layers if ".lora_" not in key]
    if strange:
        raise UserError(f"adapter: tensor {strange[0]!r} is neither of a LoRA layer nor {ROWS_KEY}")
    if damaged := next((key for key, tensor in layers.items() if not tensor.isfinite().all()), None):
        raise UserError(f"adapter: {damaged} has values that are not finite; its training failed, or it is damaged")
    _check_metadata(metadata)
    if layers:
        _check_ranks(metadata or {}, layers)
    rows = tensors.get(ROWS_KEY)
    if rows is not None:
        _check_rows(rows, class_names)
    names = None if rows is None or class_names is None else list(class_names)
    return Adapter(layers, None if metadata is None else dict(metadata), rows, names)


def _check_rows(rows: torch.Tensor, class_names: Sequence[str] | None) -> None:
    if rows.ndim != 2 or not rows.is_floating_point():
        raise UserError(
            f"adapter: {ROWS_KEY} must be (classes, width) floats, got {tuple(rows.shape)} of {rows.dtype}"
        )
    if not rows.isfinite().all():
        raise UserError(f"adapter: {ROWS_KEY} has values that are not finite; its training failed, or it is damaged")
    if class_names is None:
        return
    if len(class_names) != len(rows) or not all(isinstance(name, str) and name.strip() for name in class_names):
        raise UserError(
            f"adapter: {CLASS_NAMES_KEY} must be {len(rows)} names, one per label row, got {class_names!r}"
        )
    if len(set(class_names)) != len(class_names):
        raise UserError(f"adapter: {CLASS_NAMES_KEY} must differ from one another, got {class_names!r}")


def _check_metadata(metadata: Mapping[str, Any] | None) -> None:
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    for full_key, value in (metadata or {}).items():
        key = full_key.removeprefix(f"{COMPONENT}.")
        if key not in defaults:
            raise UserError(f"adapter: metadata {full_key} is no field of peft's LoraConfig; a newer peft may know it")
        if key == "init_lora_weights":
            harmless = value in _PLAIN_INITS
        else:
            harmless = key in _CONFIG_KEYS or not value or value == defaults[key]
        if not harmless:
            raise UserError(f"adapter: metadata {full_key} is {value!r}, which needs more than LoRA layers; refused")
        if value and not _has_plain_names(key, value):
            raise UserError(f"adapter: metadata {full_key} must hold plain names of layers, got {str(value)[:200]!r}")
        alphas = [value] if key == "lora_alpha" else (value or {}).values() if key == "alpha_pattern" else ()
        if not all(isinstance(alpha, int | float) and abs(alpha) < math.inf for alpha in alphas):
            raise UserError(f"adapter: metadata {full_key} must be finite numbers, got {str(value)[:200]}")


def _has_plain_names(key: str, value: Any) -> bool:
    if key in _NAME_LISTS:
        names = [value] if isinstance(value, str) else value
    elif key in _NAME_TABLES:
        names = list(value) if isinstance(value, dict) else None
    else:
        return True
    return isinstance(names, list) and all(isinstance(name, str) and _PLAIN_NAME.fullmatch(name) for name in names)


def _check_ranks(metadata: Mapping[str, Any], layers: Mapping[str, torch.Tensor]) -> None:
    """Refuse ranks above those of the tensors, before peft makes layers of them."""
    largest = max((len(tensor) for key, tensor in layers.items() if "_A." in key and tensor.ndim), default=0)
    fields = {key.removeprefix(f"{COMPONENT}."): value for key, value in metadata.items()}
    for rank in (fields.get("r", largest), *(fields.get("rank_pattern") or {}).values()):
        if type(rank) is not int or rank > largest:
            raise UserError(
                f"adapter: metadata give rank {str(rank)[:20]}; the largest of its LoRA layers is {largest}"
            )


def write_adapter_file(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write an adapter file in one rename; equal content gives equal bytes. A `.bin` has no place for metadata."""
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    if path.suffix == ".bin":
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        put_file(path, buffer.getvalue())
    else:
        put_file(path, _with_sorted_metadata(save(plain, dict(metadata))))


def _with_sorted_metadata(content: bytes) -> bytes:
    """Sort a safetensors header's metadata, which are written in an order that changes from run to run."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format's alignment
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def metadata_of(lora: Mapping[str, Any] | None, class_names: Sequence[str] | None, pipeline: str) -> dict[str, str]:
    """Return the metadata of an adapter file: the class of its pipeline, diffusers' of layers, ours of label rows."""
    metadata = {"format": "pt", PIPELINE_KEY: pipeline}
    if lora:
        plain = {f"{COMPONENT}.{k}": sorted(v) if isinstance(v, set) else v for k, v in lora.items()}
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(plain, indent=2, sort_keys=True)
    if class_names is not None:
        metadata[CLASS_NAMES_KEY] = json.dumps(list(class_names), ensure_ascii=False)
    return metadata
