"""An autoencoder's encoder: inside its folder or by reference, never touched by decoding, never the wrong one."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from autoencoder_cases import TINY_DECODER, tiny_autoencoder
from safetensors.torch import load_file, save_file

import repagen  # noqa: F401 - registers the classes with diffusers
from repagen import RepresentationAutoencoder, VisionEncoder
from repagen.encoders import vision
from repagen.errors import UserError
from repagen.models import encoder_storage


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(1, 3, 16, 16)


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building, reading or fetching an encoder is an error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the encoder was touched")

    monkeypatch.setattr(encoder_storage, "load_encoder", refuse)
    monkeypatch.setattr(vision.VisionEncoder, "__init__", refuse)


def make(golden: Path, case: str = "rae_dinov2") -> RepresentationAutoencoder:
    folder = golden / case / "encoder"
    return RepresentationAutoencoder.from_encoder(folder, TINY_DECODER, image_size=16, decoder_patch_size=4).eval()


def test_decoding_touches_no_encoder(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = tiny_autoencoder()
    expected = model.decode(torch.ones(1, 32, 4, 4)).sample
    model.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "encoder.frozen")
    request.getfixturevalue("no_encoder")
    loaded = RepresentationAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.to("cpu").decode(torch.ones(1, 32, 4, 4)).sample, expected)


def test_random_encoders_are_saved_and_are_a_function_of_their_config(tmp_path: Path, images: torch.Tensor) -> None:
    model, twin = tiny_autoencoder(), tiny_autoencoder()
    state = torch.random.get_rng_state()
    _ = model.encoder
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(twin.encode(images).latent, model.encode(images).latent)
    model.save_pretrained(tmp_path)
    loaded = RepresentationAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(images).latent, model.encode(images).latent)
    assert loaded.config.encoder_stored and loaded.config.encoder_fingerprint == model.encoder.fingerprint()


def test_a_free_encoder_goes_inside_and_travels(golden: Path, tmp_path: Path, images: torch.Tensor) -> None:
    model = make(golden)
    model.save_pretrained(tmp_path / "first")
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert config["encoder_stored"] and config["encoder"]["name_or_path"] is None
    assert sorted(path.name for path in (tmp_path / "first" / "encoder.frozen").iterdir()) == [
        "config.json", "model.frozen.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    shutil.move(tmp_path / "first", tmp_path / "moved")
    moved = RepresentationAutoencoder.from_pretrained(tmp_path / "moved")
    assert torch.equal(moved.encode(images).latent, model.encode(images).latent)
    # Saved again without ever encoding, the encoder goes along.
    RepresentationAutoencoder.from_pretrained(tmp_path / "moved").save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "encoder.frozen" / "model.frozen.safetensors").is_file()
    # The sub-folder is an ordinary encoder folder.
    alone = VisionEncoder.from_pretrained(tmp_path / "second" / "encoder.frozen", image_size=56)
    assert alone.fingerprint() == model.encoder.fingerprint()


def test_a_restricted_encoder_is_a_reference(
    golden: Path, tmp_path: Path, images: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(golden, "rae_mae")
    with caplog.at_level(logging.WARNING, logger="repagen"):
        model.save_pretrained(tmp_path / "reference")
    assert "reference to the local folder" in caplog.text
    assert not (tmp_path / "reference" / "encoder.frozen").exists()
    loaded = RepresentationAutoencoder.from_pretrained(tmp_path / "reference")
    assert torch.equal(loaded.encode(images).latent, model.encode(images).latent)
    model.save_pretrained(tmp_path / "inside", include_encoder=True)
    inside = RepresentationAutoencoder.from_pretrained(tmp_path / "inside")
    assert torch.equal(inside.encode(images).latent, model.encode(images).latent)


def test_a_reference_names_id_and_commit_and_is_fetched_on_encode(
    golden: Path, tmp_path: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commit, asked = "0123456789abcdef0123456789abcdef01234567", []
    snapshot = tmp_path / "models--org--mae" / "snapshots" / commit
    shutil.copytree(golden / "rae_mae" / "encoder", snapshot)

    def stand_in(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options["revision"]))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    model = RepresentationAutoencoder.from_encoder("org/mae", TINY_DECODER, image_size=16, decoder_patch_size=4).eval()
    model.save_pretrained(tmp_path / "saved")
    described = json.loads((tmp_path / "saved" / "config.json").read_text())["encoder"]
    assert (described["name_or_path"], described["revision"]) == ("org/mae", commit)
    asked.clear()
    loaded = RepresentationAutoencoder.from_pretrained(tmp_path / "saved")
    loaded.decode(torch.zeros(1, 64, 4, 4))
    loaded.save_pretrained(tmp_path / "again")
    assert asked == []
    assert torch.equal(loaded.encode(images).latent, model.encode(images).latent)
    assert set(asked) == {("org/mae", commit)}


def test_an_encoder_offline_is_one_line(golden: Path, tmp_path: Path, images: torch.Tensor) -> None:
    model = make(golden, "rae_mae")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["encoder"]["name_or_path"] = "org/never-seen-encoder"
    for branch in ("main", None):
        path.write_text(json.dumps({**config, "encoder": {**config["encoder"], "revision": branch}}))
        with pytest.raises(UserError, match="as a Hub id it needs a commit, 40 hex digits, as its revision"):
            RepresentationAutoencoder.from_pretrained(tmp_path).encode(images)
    config["encoder"]["revision"] = "0123456789abcdef" * 2 + "01234567"
    path.write_text(json.dumps(config))
    loaded = RepresentationAutoencoder.from_pretrained(tmp_path)
    assert loaded.decode(torch.zeros(1, 64, 4, 4)).sample.shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="hf download org/never-seen-encoder"):
        loaded.encode(images)
    loaded.attach_encoder(VisionEncoder.from_pretrained(golden / "rae_mae" / "encoder", image_size=64))
    assert torch.equal(loaded.encode(images).latent, model.encode(images).latent)


def test_another_encoder_is_refused(golden: Path, tmp_path: Path, images: torch.Tensor) -> None:
    make(golden).save_pretrained(tmp_path)
    weights = tmp_path / "encoder.frozen" / "model.frozen.safetensors"
    state = load_file(weights)
    state["layernorm.weight"] += 1
    save_file(state, weights, metadata={"format": "pt"})
    loaded = RepresentationAutoencoder.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"other weights .* statistics and decoder were made with"):
        loaded.encode(images)
    with pytest.raises(UserError, match=r"gives latents \(64, 7, 7\)"):
        loaded.attach_encoder(VisionEncoder.from_pretrained(golden / "rae_dinov2" / "encoder", image_size=98))


def test_a_stored_encoder_that_is_gone_is_named(golden: Path, tmp_path: Path, images: torch.Tensor) -> None:
    make(golden).save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "encoder.frozen")
    with pytest.raises(UserError, match=r"encoder\.frozen: no model\.safetensors"):
        RepresentationAutoencoder.from_pretrained(tmp_path).encode(images)


def test_from_the_hub_the_encoder_comes_on_encode(
    golden: Path, tmp_path: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline's download leaves `vae/encoder` on the Hub; the cache's layout says where to fetch it from."""
    import huggingface_hub
    from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings

    model = make(golden)
    model.save_pretrained(tmp_path / "saved" / "vae")
    names = {path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*.*")}
    downloaded, _ = variant_compatible_siblings(names)
    assert set(downloaded) == {"vae/diffusion_pytorch_model.safetensors"}

    snapshot = tmp_path / "hub" / "models--org--pipe" / "snapshots" / "0123456789abcdef"
    shutil.copytree(tmp_path / "saved" / "vae", snapshot / "vae", ignore=shutil.ignore_patterns("encoder.frozen"))
    asked: list[Any] = []

    def stand_in(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options["revision"], options["allow_patterns"], options["cache_dir"]))
        shutil.copytree(tmp_path / "saved" / "vae" / "encoder.frozen", snapshot / "vae" / "encoder.frozen")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    loaded = RepresentationAutoencoder.from_pretrained(snapshot / "vae")
    loaded.decode(torch.zeros(1, 64, 4, 4))
    assert asked == []
    assert torch.equal(loaded.encode(images).latent, model.encode(images).latent)
    assert asked == [("org/pipe", "0123456789abcdef", ["vae/encoder.frozen/*"], tmp_path / "hub")]


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    tiny_autoencoder().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["latent_statistics.std"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"1 tensors of the RepresentationAutoencoder are missing, the first is latent_statistics\.std"
    ):
        RepresentationAutoencoder.from_pretrained(tmp_path)


def test_the_encoder_follows_the_autoencoder() -> None:
    model = tiny_autoencoder()
    assert model.encoder.dtype == torch.float32
    model.to(torch.bfloat16)
    assert model.encoder.dtype == torch.bfloat16
    assert tiny_autoencoder().to(torch.bfloat16).encoder.dtype == torch.bfloat16
