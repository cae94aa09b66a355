"""No file from elsewhere runs code, whatever door it comes through; what is refused is refused with its reason."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.malicious_bundles import BUNDLES, Bundle, Folder, Payload
from pipelines.tiny_pipelines import tiny_pipeline

from repagen import ClassToImagePipeline, RepresentationAutoencoder, TextEncoder, VisionEncoder
from repagen.errors import UserError
from repagen.hub.inspection import inspect_folder, inspect_weights_file
from repagen.training.generator_model import open_transformer
from repagen.training.latent_identity import open_autoencoder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def open_locally(folder: Path) -> Any:
    return ClassToImagePipeline.from_pretrained(folder)


def open_from_the_cache(folder: Path) -> Any:
    cache = folder.with_name("cache")
    put_into_cache(folder, cache)
    return ClassToImagePipeline.from_pretrained("org/evil", cache_dir=cache, local_files_only=True)


def open_sub_folder(folder: Path) -> Any:
    return RepresentationAutoencoder.from_pretrained(folder, subfolder="vae")


def open_for_training(folder: Path) -> Any:
    return open_transformer(str(folder))


# Each with the part of the pipeline that it reads.
DOORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder": (open_locally, "vae"),
    "snapshot": (open_from_the_cache, "vae"),
    "sub-folder": (open_sub_folder, "vae"),
    "training": (open_for_training, "transformer"),
}


def put_into_cache(folder: Path, cache: Path) -> None:
    """Lay a folder out as huggingface_hub does: files in `blobs`, and links to them in the snapshot of a commit."""
    repository = cache / "models--org--evil"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot, symlinks=True, copy_function=lambda source, target: Path(target).touch())
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        original = folder / path.relative_to(snapshot)
        if original.is_fifo():
            path.unlink()
            os.mkfifo(path)
        elif not original.is_symlink():
            blob = repository / "blobs" / str(number)
            blob.hardlink_to(original)
            path.unlink()
            path.symlink_to(Path(*[".."] * len(path.relative_to(repository).parts[:-1]), "blobs", str(number)))


@pytest.fixture(scope="module")
def innocent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("innocent") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Libraries are told that they are online; whoever asks the Hub for what a file names is found."""
    asked: list[Any] = []

    def refuse(_: socket.socket, address: Any) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not asked


@pytest.fixture
def spoilt(innocent: Path, tmp_path: Path) -> Callable[[Bundle, str], Folder]:
    def make(bundle: Bundle, part: str) -> Folder:
        folder = Folder(tmp_path / "evil", part, tmp_path / "ran")
        shutil.copytree(innocent, folder.root)
        bundle.spoil(folder)
        return folder

    return make


def test_there_are_enough_of_them() -> None:
    assert len({bundle.name for bundle in BUNDLES}) == len(BUNDLES) >= 40


@pytest.mark.parametrize("door", DOORS)
def test_the_innocent_one_loads(innocent: Path, tmp_path: Path, door: str) -> None:
    shutil.copytree(innocent, tmp_path / "pipeline")
    assert DOORS[door][0](tmp_path / "pipeline") is not None


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_nothing_runs_and_the_reason_is_said(spoilt: Any, bundle: Bundle, door: str) -> None:
    open_it, part = DOORS[door]
    folder = spoilt(bundle, part)
    with pytest.raises(UserError) as caught:
        open_it(folder.root)
    assert bundle.reason in str(caught.value)
    assert str(caught.value).isprintable()
    assert not folder.marker.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bundle", [b for b in BUNDLES if not b.hangs_others], ids=lambda bundle: bundle.name)
def test_nothing_runs_at_the_doors_of_diffusers(spoilt: Any, bundle: Bundle) -> None:
    from diffusers import AutoModel, DiffusionPipeline

    folder = spoilt(bundle, "vae")
    for open_it in (
        lambda: DiffusionPipeline.from_pretrained(folder.root, local_files_only=True),
        lambda: AutoModel.from_pretrained(folder.root, subfolder="vae", local_files_only=True),
    ):
        try:
            open_it()
        except Exception:  # loading what is harmless to it is diffusers' right, running it is not
            continue
        finally:
            assert not folder.marker.exists()


def test_the_payloads_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


# --- what nothing reads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
def test_unread_files_beside_good_weights_are_left_alone(innocent: Path, tmp_path: Path, door: str) -> None:
    """Official repositories hold older formats beside their safetensors, and code that nothing names."""
    folder = Folder(tmp_path / "pipeline", "vae", tmp_path / "ran")
    shutil.copytree(innocent, folder.root)
    for place in (folder.root, folder.root / "vae", folder.root / "transformer"):
        for name in ("diffusion_pytorch_model.bin", "model.pt", "model.pkl", "model.npz"):
            (place / name).write_bytes(pickle.dumps(Payload(folder.marker)))
        for name in ("pipeline.py", "modeling.py", "__init__.py", "conftest.py"):
            folder.code(place / name)
    assert DOORS[door][0](folder.root) is not None
    assert not folder.marker.exists()


def test_another_librarys_autoencoder_is_looked_at_too(innocent: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "kl")
    assert open_autoencoder(str(tmp_path / "kl")) is not None
    (tmp_path / "kl" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "kl" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(UserError, match="no archive of tensors"):
        open_autoencoder(str(tmp_path / "kl"))
    assert not (tmp_path / "ran").exists()


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bundle", [b for b in BUNDLES if b.is_of_weights], ids=lambda bundle: bundle.name)
def test_an_adapter_is_looked_at_before_it_is_read(spoilt: Any, bundle: Bundle) -> None:
    folder = spoilt(bundle, "transformer")
    adapter = folder.root.with_name("adapter")
    adapter.mkdir()
    folder.weights.rename(adapter / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError) as caught:
        tiny_pipeline().load_lora_weights(adapter)
    assert bundle.reason in str(caught.value)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl"])
def test_an_adapter_of_pickle_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pytorch_lora_weights{suffix}"
    path.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    for look in (lambda: inspect_folder(tmp_path, "adapter"), lambda: inspect_weights_file(path, "adapter")):
        with pytest.raises(UserError, match=rf"adapter: refused .*{suffix}: (its format can|it is no archive)"):
            look()


def test_an_adapter_names_no_module(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"auto_mapping": {"parent_library": "evil"}}')
    with pytest.raises(UserError, match="auto_mapping names a module to import"):
        inspect_folder(tmp_path, "adapter")


# --- encoders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(golden: Path, tmp_path: Path) -> Path:
    """An official encoder's folder as of the time before safetensors."""
    from safetensors.torch import load_file

    folder = tmp_path / "encoder"
    shutil.copytree(golden / "rae_dinov2" / "encoder", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def refusal_of_encoder(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        VisionEncoder.from_pretrained(folder, image_size=56)
    assert not folder.with_name("ran").exists()
    assert "weights_only" not in str(caught.value)
    return str(caught.value)


def test_an_encoder_of_tensors_alone_is_read(encoder: Path) -> None:
    assert VisionEncoder.from_pretrained(encoder, image_size=56).hidden_size == 64


def test_an_encoder_that_holds_code_is_refused(encoder: Path) -> None:
    enough = torch.zeros(100_000)  # numbers for the network of the config, which is not what shall be refused
    payload = {"weight": Payload(encoder.with_name("ran")), "enough": enough}
    torch.save(payload, encoder / "pytorch_model.bin")
    assert "holds code, not only tensors: posix.mkdir" in refusal_of_encoder(encoder)
    torch.save(payload, encoder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "pytorch_model.bin" in refusal_of_encoder(encoder)
    (encoder / "pytorch_model.bin").write_bytes(pickle.dumps(payload, protocol=2))
    assert "pytorch_model.bin" in refusal_of_encoder(encoder)


def test_zip_bombs_are_refused(encoder: Path) -> None:
    path = encoder / "pytorch_model.bin"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert "may be a zip bomb" in refusal_of_encoder(encoder)
    path.write_bytes(whole)
    overlap_entries(path)
    assert "entries overlap" in refusal_of_encoder(encoder)


def overlap_entries(path: Path) -> None:
    """Let every entry of the archive's directory be the largest one (Fifield 2019)."""
    import struct

    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        start = archive.start_dir
    for _ in range(content.count(b"PK\x01\x02", start)):
        struct.pack_into("<II", content, start + 20, largest.file_size, largest.file_size)
        name, extra, comment = struct.unpack_from("<HHH", content, start + 28)
        start += 46 + name + extra + comment
    path.write_bytes(content)


def test_encoders_load_no_adapter_and_read_no_file_outside(encoder: Path, golden: Path) -> None:
    (encoder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/evil"}')
    assert "load this adapter unasked" in refusal_of_encoder(encoder)
    (encoder / "adapter_config.json").unlink()
    (encoder / "model.safetensors").symlink_to(golden / "rae_dinov2" / "encoder" / "model.safetensors")
    assert "a link to" in refusal_of_encoder(encoder)


@pytest.mark.parametrize("depth", [40, 100_000])
def test_encoders_configs_are_not_nested_too_deep(encoder: Path, depth: int) -> None:
    (encoder / "config.json").write_text(f'{{"model_type": {"[" * depth}{"]" * depth}}}')
    assert "config.json: it is nested too deep" in refusal_of_encoder(encoder)


def test_the_description_of_a_timm_encoder_names_no_file(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    description = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"checkpoint_path": str(tmp_path / "evil.pth")},
    }
    with pytest.raises(UserError, match=r"model_args\.checkpoint_path"):
        VisionEncoder.from_config({"family": "timm", "config": description})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("changes", [{"vocab_size": 10**11}, {"num_layers": 10**9}], ids=str)
def test_a_text_encoder_takes_no_more_memory_and_time_than_its_weights(
    changes: dict[str, int], tmp_path: Path
) -> None:
    """10**11 rows of 16 floats are more than any machine has, and 10**9 layers take days."""
    from pipelines.tiny_pipelines import tiny_text_pipeline

    tiny_text_pipeline().text_encoder.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["encoders"][0]["config"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"describes a network of over|more layers than any network has"):
        TextEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes", [{"hidden_size": 10**9}, {"num_hidden_layers": 10**9}], ids=str)
def test_a_vision_encoder_takes_no_more_memory_and_time_than_its_weights(
    encoder: Path, changes: dict[str, int]
) -> None:
    path = encoder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert re.search("describes a network of over|more layers than any network has", refusal_of_encoder(encoder))


@pytest.mark.parametrize("changes", [{"num_classes": 10**11}, {"depth": 10**9}], ids=str)
def test_a_generator_takes_no_more_memory_and_time_than_its_weights(
    innocent: Path, changes: dict[str, int], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(innocent, tmp_path / "pipe"))
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match="describes a network of over"):
        ClassToImagePipeline.from_pretrained(folder)
