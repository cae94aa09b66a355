"""Looks at a folder from elsewhere before any library reads it: nothing in it may name code, or lead out of it.

Only names, JSON files and the headers of weights are read, so that it costs milliseconds. What no loader of ours reads
(a pickle beside good safetensors, a `.py` file that nothing names) is left alone.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from repagen.errors import UserError
from repagen.files import printable

LIBRARIES = ("diffusers", "repagen", "transformers")
"""Whose classes a saved pipeline may name."""

CODE_KEYS = frozenset(
    (
        "_attn_implementation_internal",
        "_target_",
        "auto_map",
        "checkpoint_path",
        "custom_pipeline",
        "trust_remote_code",
    )
)
"""Keys by which a config makes some library run code, or read a file, that lies elsewhere."""

_OTHER_FORMAT = "its format can hold code, and no weights are loaded from it"
_ASK_FOR_SAFETENSORS = "ask its author for safetensors"

_MAXIMUM_JSON_BYTES = 16 << 20
_MAXIMUM_DEPTH = 32
_MAXIMUM_HEADER_BYTES = 100_000_000  # that of the safetensors library
_MAXIMUM_PICKLE_BYTES = 64 << 20  # of an archive's table of tensors, not of the tensors
_CLASS_NAME = re.compile(r"[A-Z][A-Za-z0-9_]*")
_DOTTED = re.compile(r"[A-Za-z_]\w*([.:][A-Za-z_]\w*)+")
# Keys that name what to call, in the configs of several training frameworks.
_CALL_KEYS = frozenset({"target", "class_path", "entry_point"})
# A name with a slash is a kernel that transformers fetches from the Hub, and runs.
_KERNEL_KEYS = frozenset({"_attn_implementation", "attn_implementation", "_experts_implementation"})
_SHARD_TABLES = re.compile(r".+(\.\w+)\.index(\.\w+)?\.json")
# How libraries call weights, before the variant: in archives of torch => in safetensors, which they prefer.
_MODEL_STEMS = {"diffusion_pytorch_model": "diffusion_pytorch_model", "pytorch_model": "model"}
_ADAPTER_STEMS = {"pytorch_lora_weights": "pytorch_lora_weights", "adapter_model": "adapter_model"}
_OTHER_SUFFIXES = frozenset({".ckpt", ".h5", ".joblib", ".msgpack", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"})
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def inspect_folder(folder: Path, what: str) -> None:
    """Refuse the folder of a pipeline, a model or an adapter that could make a library run code or read elsewhere.

    A model's folder within a pipeline's may be given: then the pipeline's `model_index.json` is looked at too.

    Args:
        folder: a local folder, or a snapshot in the Hub's cache. What is not there is not missed.
        what: what is loaded, for messages.

    Raises:
        UserError: the first thing that is refused: its file, the reason, and what to do.
    """
    folder = Path(os.path.abspath(folder))
    index = folder.parent / "model_index.json"
    if index.is_file():
        refuse_link_outside(index, folder.parent, what)
        _inspect_json(index, what)
    for parent, names in _walk(folder, what):
        _inspect_files(parent, names, what)
        _inspect_archives(parent, names, what)


def inspect_encoder_folder(folder: Path, what: str) -> None:
    """Refuse the folder of an official encoder whose files are unsafe; the keys of its config are not looked at.

    Nothing reads those that could name code: an encoder's class is that of its family, and its config is built of
    allow-listed keys. Old encoders have no weights but `pytorch_model.bin`; see `inspect_archive`.

    Args:
        folder: a local folder, or a snapshot in the Hub's cache.
        what: what is loaded, for messages.

    Raises:
        UserError: as `inspect_folder`.
    """
    folder = Path(os.path.abspath(folder))
    for parent, names in _walk(folder, what):
        configs = [name for name in names if name.endswith("config.json")]
        _inspect_files(parent, [name for name in names if name not in configs], what)
        if parent != folder:
            continue
        for name in configs:
            _read_object(parent / name, what)
        if "adapter_config.json" in names:
            _refuse(parent / "adapter_config.json", what, "transformers would load this adapter unasked", "delete it")
        if "pytorch_model.bin" in names and not any(name.endswith(".safetensors") for name in names):
            inspect_archive(parent / "pytorch_model.bin", what, old_format=True)


def inspect_weights_file(path: Path, what: str) -> None:
    """Refuse a weights file that is neither well-formed safetensors nor a `.bin` of tensors alone; no tensor is read.

    Args:
        path: the file.
        what: what is loaded, for messages.

    Raises:
        UserError: another format; a header that is too long, ill-formed, or does not describe the file's bytes; or as
            `inspect_archive`.
    """
    if path.suffix == ".bin":
        return inspect_archive(path, what)
    if path.suffix != ".safetensors":
        _refuse(path, what, _OTHER_FORMAT, _ASK_FOR_SAFETENSORS)
    advice = "the file is damaged or made to mislead; fetch it again from its author"
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _MAXIMUM_HEADER_BYTES):
            _refuse(path, what, f"its header claims {length} bytes of a file of {size}", advice)
        content = file.read(length)
    try:
        header = json.loads(content.decode("utf-8"), object_pairs_hook=_without_repetition)
        _check_header(header, size - 8 - length)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        _refuse(path, what, f"its header is no valid table of tensors ({_line(str(error))})", advice)
    for key, value in header.get("__metadata__", {}).items():
        if value.lstrip().startswith("{"):
            try:
                content = json.loads(value)
            except (json.JSONDecodeError, RecursionError):
                continue  # a text that begins with a brace
            _refuse_deep(content, path, what)
            _refuse_code(content, f"__metadata__.{key}", path, what)


def inspect_archive(path: Path, what: str, old_format: bool = False) -> None:
    """Refuse a `.bin` of `torch.save` that holds more than tensors and plain values, or unpacks to more than it is.

    Such files are read with `weights_only=True`, which is the wall; this stands before it and gives the reason.

    Args:
        path: the file.
        what: what is loaded, for messages.
        old_format: also take files of the time before torch 1.6, whose content cannot be listed.

    Raises:
        UserError: code, compressed or overlapping entries, or a broken archive.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    if old_format and not zipfile.is_zipfile(path):
        return
    advice = "use a copy in safetensors"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            _refuse(path, what, "its entries are compressed, which torch never does, so it may be a zip bomb", advice)
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            _refuse(path, what, "its entries overlap, as in a zip bomb", advice)
        tables = [entry.file_size for entry in entries if entry.filename.endswith(".pkl")]
        if sum(tables) > _MAXIMUM_PICKLE_BYTES:
            _refuse(path, what, f"its table of tensors has {sum(tables)} bytes", advice)
        unsafe = get_unsafe_globals_in_checkpoint(path)
    except UserError:
        raise
    except Exception as error:  # whatever strange bytes make of the readers
        _refuse(path, what, f"it is no archive of tensors ({_line(str(error) or type(error).__name__)})", advice)
    if unsafe:
        _refuse(path, what, f"it holds code, not only tensors: {_line(', '.join(sorted(unsafe)))}", advice)


def inspect_upload(path: Path, folder: Path, what: str) -> None:
    """Refuse to publish a link that leads out of its folder, and weights in a format that can hold code.

    Args:
        path: of what lies in the folder, at any depth.
        folder: that is published.
        what: is done, for messages.

    Raises:
        UserError: the file, the reason, and what to do.
    """
    refuse_link_outside(path, folder, what)
    if path.suffix in _OTHER_SUFFIXES or path.suffix == ".bin":
        _refuse(path, what, _OTHER_FORMAT, "save them as safetensors, or take the file out of the folder")


# --- files ---------------------------------------------------------------------------------------------------------


def _walk(folder: Path, what: str) -> Iterator[tuple[Path, list[str]]]:
    """Each folder with the names of its files; hidden folders and links to folders are not entered."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *names):
            path = Path(parent, name)
            if not printable(name).isprintable() or printable(name) != name:
                _refuse(path, what, "its name holds line breaks or other invisible characters", "delete or rename it")
            if path.is_symlink():
                refuse_link_outside(path, folder, what)
            elif not stat.S_ISREG(path.lstat().st_mode) and not path.is_dir():
                _refuse(path, what, "it is neither a file nor a folder", "delete it")
        yield Path(parent), sorted(name for name in names if Path(parent, name).is_file())


def refuse_link_outside(path: Path, folder: Path, what: str) -> None:
    """Refuse a path that leads out of its folder, of the pipeline that is a part of, and of its repository's cache.

    Args:
        path: of a file or folder within `folder`.
        folder: a local folder, or a snapshot in the Hub's cache.
        what: what is loaded, for messages.

    Raises:
        UserError: it leads elsewhere, or back to itself.
    """
    root = folder.resolve()
    allowed = [root]
    if (root.parent / "model_index.json").is_file():
        allowed.append(root.parent)
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots" and parent.parents[1].name.startswith("models--"):
            allowed.append(parent.parents[1] / "blobs")
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        _refuse(path, what, "it is a link that leads back to itself", "delete it")
    if not any(target.is_relative_to(place) for place in allowed):
        _refuse(path, what, f"it is a link to {_line(str(target))}, outside the folder",
                "put a copy of the file in its place, if you know where it is from")  # fmt: skip


def _inspect_files(parent: Path, names: list[str], what: str) -> None:
    for name in names:
        path = parent / name
        if name.endswith("config.json") or name == "model_index.json" or _SHARD_TABLES.fullmatch(name):
            _inspect_json(path, what)
        elif path.suffix == ".safetensors":
            inspect_weights_file(path, what)


def _inspect_archives(parent: Path, names: list[str], what: str) -> None:
    """Inspect the weights that are no safetensors, where a library would read them or could read nothing else."""
    stems = {**_MODEL_STEMS, **_ADAPTER_STEMS} if "config.json" in names else _ADAPTER_STEMS
    weights = {name: _preferred(name, stems) for name in names if name.endswith((".safetensors", ".bin"))}
    for name, preferred in weights.items():
        if name.endswith(".bin") and preferred is not None and preferred not in weights:
            inspect_archive(parent / name, what)
    others = [name for name in names if Path(name).suffix in _OTHER_SUFFIXES]
    alone = not any(weights.values())
    if others and alone and ("config.json" in names or _preferred(others[0], stems)):
        _refuse(parent / others[0], what, _OTHER_FORMAT, _ASK_FOR_SAFETENSORS)


def _preferred(name: str, stems: Mapping[str, str]) -> str | None:
    """What the safetensors are called that are read in place of a weights file; None where nobody reads that file."""
    for archive, safetensors in stems.items():
        for stem in (archive, safetensors):
            if re.match(rf"{stem}[.-]", name):
                return Path(safetensors + name.removeprefix(stem)).with_suffix(".safetensors").name
    return None


# --- JSON ----------------------------------------------------------------------------------------------------------


def _inspect_json(path: Path, what: str) -> None:
    content = _read_object(path, what)
    _refuse_code(content, "", path, what)
    if "_class_name" in content:
        _check_class_name(content["_class_name"], "_class_name", path, what)
    if path.name == "model_index.json":
        _check_components(content, path, what)
    elif _SHARD_TABLES.fullmatch(path.name):
        _check_shards(content.get("weight_map"), path, what)
    elif path.name == "adapter_config.json" and (path.parent / "config.json").is_file():
        _refuse(path, what, "transformers would load this adapter unasked", "move it to a folder of its own")
    elif path.name == "adapter_config.json" and content.get("auto_mapping") is not None:
        _refuse(path, what, "auto_mapping names a module to import", "delete this key")


def _read_object(path: Path, what: str) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _MAXIMUM_JSON_BYTES:
        _refuse(path, what, f"{size} bytes are too many for a config", "fetch it again from its author")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        _refuse(path, what, f"it cannot be read as JSON ({_line(str(error))})", "fetch it again")
    except RecursionError:
        _refuse(path, what, "it is nested too deep for a config", "fetch it again from its author")
    if not isinstance(content, dict):
        _refuse(path, what, f"it must hold a JSON object, got {type(content).__name__}", "fetch it again")
    _refuse_deep(content, path, what)
    return content


def _refuse_deep(value: Any, path: Path, what: str, depth: int = 0) -> None:
    """Refuse JSON that would exhaust the stack of whoever walks through it."""
    if depth > _MAXIMUM_DEPTH:
        _refuse(path, what, "it is nested too deep for a config", "fetch it again from its author")
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for entry in entries:
        _refuse_deep(entry, path, what, depth + 1)


def _refuse_code(value: Any, key: str, path: Path, what: str) -> None:
    """Refuse keys anywhere in a config that make some library run code."""
    if isinstance(value, list):
        for index, entry in enumerate(value):
            _refuse_code(entry, f"{key}.{index}", path, what)
    if not isinstance(value, Mapping):
        return
    for name, entry in value.items():
        inner = f"{key}.{name}" if key else name
        dotted = isinstance(entry, str) and _DOTTED.fullmatch(entry)
        kernel = isinstance(entry, str) and not entry.replace("_", "").isalnum()
        named = name in CODE_KEYS or (name in _CALL_KEYS and dotted) or (name in _KERNEL_KEYS and kernel)
        if named:
            _refuse(path, what, f"the key {_line(inner)!r} asks for code from elsewhere, which no file may do",
                    "delete the key, if the model works without that code")  # fmt: skip
        _refuse_code(entry, inner, path, what)


def _check_class_name(name: Any, key: str, path: Path, what: str) -> None:
    if not isinstance(name, str):
        reason = f"{key} {_line(json.dumps(name))} asks for code in the folder, which repagen does not run"
        _refuse(path, what, reason, "load a copy that needs no remote code")
    if not _CLASS_NAME.fullmatch(name):
        _refuse(path, what, f"{key} {_line(name)!r} is not the plain name of a class", "fetch it again")


def _check_components(index: Mapping[str, Any], path: Path, what: str) -> None:
    """Check what diffusers takes for a component: a list that begins with a text or null."""
    for name, entry in index.items():
        if (
            name.startswith("_")
            or not isinstance(entry, list)
            or not entry
            or isinstance(entry[0], int | float | dict)
        ):
            continue
        if not name.isidentifier():
            _refuse(path, what, f"the component {_line(name)!r} is no plain name of a sub-folder", "fetch it again")
        if entry == [None, None]:
            continue
        if len(entry) != 2 or entry[0] not in LIBRARIES:
            _refuse(path, what, f"{name} is {_line(json.dumps(entry))}; allowed is [library, class] with one of "
                    f"{', '.join(LIBRARIES)}", "load a copy that needs no remote code")  # fmt: skip
        _check_class_name(entry[1], name, path, what)
        code = path.parent / name / f"{entry[0]}.py"
        if code.exists():
            _refuse(code, what, "diffusers would take it for the library of that component", "delete it")


def _check_shards(table: Any, path: Path, what: str) -> None:
    if not isinstance(table, dict):
        _refuse(path, what, "weight_map must be an object of tensors and files", "fetch it again")
    match = _SHARD_TABLES.fullmatch(path.name)
    suffix = match[1] if match else ""
    for file in table.values():
        plain = isinstance(file, str) and file.isprintable() and not re.search(r"[/\\:]", file) and file[:1] != "."
        if not plain:
            reason = f"weight_map names {_line(json.dumps(file))}, which is no plain name of a file in this folder"
            _refuse(path, what, reason, "fetch it again from its author")
        if Path(file).suffix != suffix:
            reason = f"weight_map names {_line(file)!r}, which is no {suffix} file as the others"
            _refuse(path, what, reason, _ASK_FOR_SAFETENSORS)


# --- the header of safetensors -------------------------------------------------------------------------------------


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name is there twice")
    return content


def _check_header(header: Any, bytes_of_data: int) -> None:
    """Raise ValueError unless the tensors lie one behind the other and fill the data, as the format wants."""
    if not isinstance(header, dict):
        raise ValueError("no JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must hold texts")
    places = sorted(_place(name, entry) for name, entry in header.items() if name != "__metadata__")
    end = 0
    for begin, following, name in places:
        if begin != end:
            raise ValueError(f"{name}: {'overlaps another tensor' if begin < end else 'leaves a gap before it'}")
        end = following
    if end != bytes_of_data:
        raise ValueError(f"the file is cut short or too long: its tensors take {end} bytes, it has {bytes_of_data}")


def _place(name: str, entry: Any) -> tuple[int, int, str]:
    """=> (begin, end, name) of a tensor, its dtype and shape checked against them."""
    if not name.isprintable():
        raise ValueError(f"{name!r} is no name of a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: a tensor has dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name}: unknown dtype {dtype!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise ValueError(f"{name}: shape and data_offsets must be whole numbers from 0")
    if len(offsets) != 2 or len(shape) > 64 or (offsets[1] - offsets[0]) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{name}: its bytes do not hold {dtype} of shape {shape}")
    return offsets[0], offsets[1], name


# --- words ---------------------------------------------------------------------------------------------------------


def _refuse(path: Path, what: str, reason: str, advice: str) -> NoReturn:
    raise UserError(f"{what}: refused {_line(printable(path), 1000)}: {reason}; {advice}")


def _line(text: str, longest: int = 200) -> str:
    """What a file says, fit for a message."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:longest]
