"""Saved pipelines made to run code, to read what is not theirs or to exhaust a machine; none of them may be read.

Each payload, wherever it lies, writes a marker file when it runs.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

WEIGHTS = "diffusion_pytorch_model"


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@dataclass(frozen=True)
class Folder:
    """What is spoilt: a pipeline's folder, and the part of it that holds the payload."""

    root: Path
    part: str
    marker: Path

    @property
    def component(self) -> Path:
        return self.root / self.part

    @property
    def weights(self) -> Path:
        return self.component / f"{WEIGHTS}.safetensors"

    def code(self, path: Path) -> None:
        """Write a module that runs when it is imported, with every class that something may look for in it."""
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"import os\nos.mkdir({str(self.marker)!r})\nclass Evil: pass\n")

    def edit(self, path: Path, **changes: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def config(self, **changes: Any) -> None:
        self.edit(self.component / "config.json", **changes)

    def index(self, **changes: Any) -> None:
        self.edit(self.root / "model_index.json", **changes)

    def header(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Edit the header of the weights, the data left as they are."""
        content = self.weights.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        self.raw_header(json.dumps(header).encode(), content[8 + length :])

    def raw_header(self, header: bytes, data: bytes = b"", length: int | None = None) -> None:
        self.weights.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)

    def shards(self, name: Any) -> None:
        """Say that the weights lie in a file of that name."""
        self.weights.unlink()
        table = {"metadata": {}, "weight_map": {"weight": name}}
        (self.component / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(table))


@dataclass(frozen=True)
class Bundle:
    name: str
    reason: str
    spoil: Callable[[Folder], Any]
    hangs_others: bool = False  # libraries that do not look first would wait for ever

    @property
    def is_of_weights(self) -> bool:
        """Whether what is bad is the safetensors file itself, whatever folder it is in."""
        return self in BUNDLES[next(n for n, other in enumerate(BUNDLES) if other.name == FIRST_OF_WEIGHTS) :]


BUNDLES: list[Bundle] = []


def bundle(reason: str, **options: Any) -> Callable[[Callable[[Folder], Any]], Callable[[Folder], Any]]:
    def keep(spoil: Callable[[Folder], Any]) -> Callable[[Folder], Any]:
        BUNDLES.append(Bundle(spoil.__name__, reason, spoil, **options))
        return spoil

    return keep


# --- pickles in place of weights -----------------------------------------------------------------------------------

OTHER_FORMAT = "its format can hold code, and no weights are loaded from it"


@bundle("holds code, not only tensors: posix.mkdir")
def bin_of_torch(folder: Folder) -> None:
    folder.weights.unlink()
    torch.save({"weight": Payload(folder.marker)}, folder.component / f"{WEIGHTS}.bin")


def _pickled(suffix: str) -> None:
    def spoil(folder: Folder) -> None:
        folder.weights.unlink()
        (folder.component / f"{WEIGHTS}{suffix}").write_bytes(pickle.dumps({"weight": Payload(folder.marker)}))

    reason = "no archive of tensors" if suffix == ".bin" else OTHER_FORMAT
    BUNDLES.append(Bundle(f"pickle_as_{suffix[1:]}", reason, spoil))


for _suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
    _pickled(_suffix)


@bundle(OTHER_FORMAT)
def npz_of_objects(folder: Folder) -> None:
    folder.weights.unlink()
    np.savez(folder.component / f"{WEIGHTS}.npz", weight=np.array([Payload(folder.marker)], dtype=object))


@bundle(OTHER_FORMAT)
def npy_of_objects(folder: Folder) -> None:
    folder.weights.unlink()
    np.save(folder.component / f"{WEIGHTS}.npy", np.array([Payload(folder.marker)], dtype=object))


@bundle("holds code, not only tensors: posix.mkdir")
def sharded_bin(folder: Folder) -> None:
    folder.weights.unlink()
    torch.save({"weight": Payload(folder.marker)}, folder.component / f"{WEIGHTS}-00001-of-00001.bin")
    table = {"metadata": {}, "weight_map": {"weight": f"{WEIGHTS}-00001-of-00001.bin"}}
    (folder.component / f"{WEIGHTS}.bin.index.json").write_text(json.dumps(table))


@bundle("header claims")
def pickle_named_safetensors(folder: Folder) -> None:
    folder.weights.write_bytes(pickle.dumps({"weight": Payload(folder.marker)}))


@bundle("holds code, not only tensors: posix.mkdir")
def bin_beside_another_variant(folder: Folder) -> None:
    shutil.move(folder.weights, folder.component / f"{WEIGHTS}.fp16.safetensors")
    torch.save({"weight": Payload(folder.marker)}, folder.component / f"{WEIGHTS}.bin")


@bundle("may be a zip bomb")
def zip_bomb(folder: Folder) -> None:
    folder.weights.unlink()
    with zipfile.ZipFile(folder.component / f"{WEIGHTS}.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(folder.marker)))
        archive.writestr("archive/data/0", bytes(1 << 24))


# --- configs of models ---------------------------------------------------------------------------------------------


@bundle("asks for code in the folder")
def class_of_a_file(folder: Folder) -> None:
    folder.config(_class_name=["evil", "Evil"])
    folder.code(folder.component / "evil.py")


@bundle("is not the plain name of a class")
def dotted_class(folder: Folder) -> None:
    folder.config(_class_name="evil.Evil")
    folder.code(folder.component / "evil.py")


@bundle("is not the plain name of a class")
def class_with_a_path(folder: Folder) -> None:
    folder.config(_class_name="../evil")
    folder.code(folder.root / "evil.py")


def _config_key(name: str, **entries: Any) -> None:
    def spoil(folder: Folder) -> None:
        folder.config(**entries)
        folder.code(folder.component / "evil.py")

    BUNDLES.append(Bundle(name, "asks for code from elsewhere", spoil))


_config_key("auto_map", auto_map={"AutoModel": "evil.Evil"})
_config_key("auto_map_of_the_hub", auto_map={"AutoModel": "org/evil--evil.Evil"})
_config_key("auto_map_within", encoder={"config": {"auto_map": {"AutoModel": "evil.Evil"}}})
_config_key("trust_remote_code", trust_remote_code=True)
_config_key("trust_remote_code_within", quantization_config={"trust_remote_code": True})
_config_key("kernel", _attn_implementation_internal="org/evil")
_config_key("kernel_by_another_key", encoder={"config": {"attn_implementation": "org/evil:kernel"}})
_config_key("custom_pipeline", custom_pipeline="evil")
_config_key("target_of_hydra", encoder={"_target_": "os.system", "command": "true"})
_config_key("dotted_target", encoder={"target": "evil.Evil", "params": {}})
_config_key("class_path", encoder=[{"class_path": "evil.Evil"}])
_config_key("checkpoint_of_timm", encoder={"config": {"model_args": {"checkpoint_path": "evil.pth"}}})


@bundle("nested too deep")
def deep_json(folder: Folder) -> None:
    (folder.component / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


@bundle("bytes are too many")
def huge_json(folder: Folder) -> None:
    folder.config(padding=" " * (17 << 20))


@bundle("cannot be read as JSON")
def json_of_other_bytes(folder: Folder) -> None:
    (folder.component / "config.json").write_bytes(b'{"_class_name": "\xff\xfe"}')


@bundle("must hold a JSON object, got list")
def json_list(folder: Folder) -> None:
    (folder.component / "config.json").write_text("[1]")


@bundle("unasked")
def adapter_beside_the_model(folder: Folder) -> None:
    (folder.component / "adapter_config.json").write_text('{"base_model_name_or_path": "org/evil"}')


# --- model_index.json ----------------------------------------------------------------------------------------------


@bundle("asks for code in the folder")
def pipeline_of_a_file(folder: Folder) -> None:
    folder.index(_class_name=["pipeline", "Evil"])
    folder.code(folder.root / "pipeline.py")


@bundle("asks for code from elsewhere")
def custom_pipeline_of_the_index(folder: Folder) -> None:
    folder.index(custom_pipeline="pipeline")
    folder.code(folder.root / "pipeline.py")


@bundle("asks for code from elsewhere")
def auto_map_of_the_index(folder: Folder) -> None:
    folder.index(auto_map={"DiffusionPipeline": "pipeline.Evil"})
    folder.code(folder.root / "pipeline.py")


@bundle("asks for code from elsewhere")
def trust_in_the_index(folder: Folder) -> None:
    folder.index(trust_remote_code=True, custom_revision="main")


def _component(name: str, reason: str, *entry: Any) -> None:
    def spoil(folder: Folder) -> None:
        folder.index(**{folder.part: list(entry)})
        folder.code(folder.component / "evil.py")

    BUNDLES.append(Bundle(name, reason, spoil))


_component("component_of_a_file", "allowed is [library, class]", "evil", "Evil")
_component("component_of_os", "allowed is [library, class]", "os", "system")
_component("component_of_builtins", "allowed is [library, class]", "builtins", "exec")
_component("component_of_a_module", "allowed is [library, class]", "diffusers.utils.dynamic_modules_utils", "Evil")
_component("component_of_three", "allowed is [library, class]", "repagen", "SVGAutoencoder", {"trust": True})
_component("component_with_a_dotted_class", "not the plain name", "diffusers", "utils.dynamic_modules_utils")


@bundle("no plain name of a sub-folder")
def component_outside(folder: Folder) -> None:
    folder.index(**{"../evil": ["repagen", "SVGAutoencoder"]})


@bundle("take it for the library")
def module_named_as_the_library(folder: Folder) -> None:
    folder.code(folder.component / "repagen.py")


# --- where files are -----------------------------------------------------------------------------------------------


def _shards(name: str, reason: str, file: Any) -> None:
    BUNDLES.append(Bundle(name, reason, lambda folder: folder.shards(file)))


_shards("shard_above", "no plain name of a file", "../../outside.safetensors")
_shards("shard_by_absolute_path", "no plain name of a file", "/etc/hostname")
_shards("shard_with_a_line_break", "no plain name of a file", "evil\nmodel.safetensors")
_shards("shard_of_windows", "no plain name of a file", "..\\outside.safetensors")
_shards("shard_that_is_no_name", "no plain name of a file", ["a"])
_shards("shard_of_pickle", "no .safetensors file", f"{WEIGHTS}-00001.bin")


@bundle("must be an object")
def shards_without_names(folder: Folder) -> None:
    (folder.component / f"{WEIGHTS}.safetensors.index.json").write_text('{"weight_map": ["a"]}')


@bundle("a link to")
def weights_outside(folder: Folder) -> None:
    outside = folder.marker.with_name("outside.safetensors")
    shutil.copy(folder.weights, outside)
    folder.weights.unlink()
    folder.weights.symlink_to(outside)


@bundle("a link to")
def config_outside(folder: Folder) -> None:
    (folder.component / "config.json").unlink()
    (folder.component / "config.json").symlink_to("/proc/self/environ")


@bundle("a link to")
def folder_outside(folder: Folder) -> None:
    outside = folder.marker.with_name("outside")
    outside.mkdir()
    (folder.component / "encoder.frozen").symlink_to(outside)


@bundle("a link to")
def cache_of_another_repository(folder: Folder) -> None:
    blob = folder.marker.with_name("hub") / "models--org--private" / "blobs" / "0"
    blob.parent.mkdir(parents=True)
    shutil.copy(folder.weights, blob)
    folder.weights.unlink()
    folder.weights.symlink_to(blob)


@bundle("leads back to itself")
def link_to_itself(folder: Folder) -> None:
    (folder.component / "loop").symlink_to(folder.component / "loop")


@bundle("line breaks")
def name_with_a_line_break(folder: Folder) -> None:
    (folder.component / "model\nrefused: nothing.json").write_text("{}")


@bundle("neither a file nor a folder", hangs_others=True)
def pipe_in_place_of_weights(folder: Folder) -> None:
    folder.weights.unlink()
    os.mkfifo(folder.weights)


# --- headers of safetensors ----------------------------------------------------------------------------------------


FIRST_OF_WEIGHTS = "header_longer_than_the_file"


@bundle("header claims")
def header_longer_than_the_file(folder: Folder) -> None:
    folder.raw_header(b"{}", length=(1 << 63) + 1)


@bundle("header claims")
def header_over_the_limit(folder: Folder) -> None:
    folder.raw_header(b"{}", length=200_000_000)
    os.truncate(folder.weights, 300_000_000)  # takes no room on the disk


@bundle("no valid table")
def header_no_json(folder: Folder) -> None:
    folder.raw_header(pickle.dumps(Payload(folder.marker)))


@bundle("no valid table")
def header_nested_deep(folder: Folder) -> None:
    folder.raw_header(b"[" * 200_000 + b"]" * 200_000)


@bundle("is there twice")
def tensor_named_twice(folder: Folder) -> None:
    one = '"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    folder.raw_header(f"{{{one}, {one}}}".encode(), b"0")


def _tensors(name: str, reason: str, *tensors: tuple[str, list[Any], list[Any]]) -> None:
    """A header of given (dtype, shape, offsets) before eight bytes of data."""
    header = {str(n): {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in enumerate(tensors)}
    BUNDLES.append(Bundle(name, reason, lambda folder: folder.raw_header(json.dumps(header).encode(), bytes(8))))


_tensors("overlapping_tensors", "overlaps another", ("F32", [2], [0, 8]), ("F32", [1], [4, 8]))
_tensors("gap_between_tensors", "leaves a gap", ("U8", [1], [0, 1]), ("U8", [1], [7, 8]))
_tensors("tensor_beyond_the_end", "cut short or too long", ("F32", [4], [0, 16]))
_tensors("data_of_no_tensor", "cut short or too long", ("F32", [1], [0, 4]))
_tensors("unknown_dtype", "unknown dtype", ("OBJECT", [1], [0, 8]))
_tensors("giant_shape", "do not hold F32", ("F32", [1 << 40, 1 << 40], [0, 8]))
_tensors("negative_shape", "whole numbers from 0", ("F32", [-1, -2], [0, 8]))


@bundle("asks for code from elsewhere")
def code_in_the_metadata(folder: Folder) -> None:
    folder.header(lambda header: header.setdefault("__metadata__", {}).update(config='{"_target_": "os.system"}'))
