"""What is saved, loaded and saved again stays the same bytes, whatever the umask, the path and the working folder."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import folder_bytes
from models.autoencoder_cases import tiny_autoencoder, tiny_svg
from pipelines.tiny_pipelines import ID2LABEL, SIZES, tiny_pipeline, tiny_transformer

from repagen import ClassToImagePipeline, PixelAutoencoder, RepresentationAutoencoder, SiTTransformer2DModel
from repagen.models.opening import load_model

UMASKS = (0o022, 0o077, 0o002)
NAMES = ("first place", "zweiter Ort äöü 画像 🦆", "third 'place' & more")


def tiny_kl() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)


AUTOENCODERS: dict[str, Callable[[], Any]] = {
    "representation": tiny_autoencoder,
    "svg": tiny_svg,
    "pixel": PixelAutoencoder,
    "kl": tiny_kl,
}


@pytest.fixture(autouse=True)
def own_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes_of(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def assert_round_trips(first: Any, load: Callable[[Path], Any], within: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save, load, save three times, each elsewhere, from another working folder by a relative path, by another umask.

    What was saved before is taken away, so that a copy that needed it would be found.
    """
    saved, model = [], first
    for umask, name in zip(UMASKS, NAMES, strict=True):
        place = within / name
        place.mkdir()
        monkeypatch.chdir(place)
        os.umask(umask)
        model.save_pretrained("to be saved")
        folder = place / "to be saved"
        saved.append(folder_bytes(folder))
        assert modes_of(folder) == {0o666 & ~umask}
        shutil.move(folder, place / "moved")
        model = load(Path("moved"))
    assert any(name.endswith(".safetensors") for name in saved[0])
    for later in saved[1:]:
        assert later.keys() == saved[0].keys()
        assert [(name, later[name]) for name in later if later[name] != saved[0][name]] == []
    assert not any(os.fsencode(within) in content for content in saved[2].values())


# Each generator and each autoencoder once; all other pairs are slow.
PAIRS = [
    pytest.param(
        generator,
        kind,
        id=f"{generator.__name__.removesuffix('Transformer2DModel')}-{kind}",
        marks=[] if kind == "pixel" or generator is SiTTransformer2DModel else pytest.mark.slow,
    )
    for generator in SIZES
    for kind in AUTOENCODERS
]


@pytest.mark.parametrize(("generator", "kind"), PAIRS)
def test_pipelines(generator: type, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"vae": AUTOENCODERS[kind](), "guidance_transformer": tiny_transformer(generator, seed=2)}
    pipe = tiny_pipeline(generator, **parts, id2label=ID2LABEL, sampling_defaults={"guidance_scale": 1.5})
    assert_round_trips(pipe, ClassToImagePipeline.from_pretrained, tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", ["representation", "svg", "pixel"])
def test_autoencoders_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AUTOENCODERS[kind]()
    assert_round_trips(model, type(model).from_pretrained, tmp_path, monkeypatch)


def test_models_opened_by_any_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_round_trips(tiny_transformer(), lambda folder: load_model(str(folder), "model"), tmp_path, monkeypatch)


def test_an_official_encoder_that_is_stored(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder's own files too, although it is never used between the saves."""
    from models.autoencoder_cases import TINY_DECODER

    encoder = golden / "rae_dinov2" / "encoder"
    model = RepresentationAutoencoder.from_encoder(encoder, TINY_DECODER, image_size=16, decoder_patch_size=4)
    assert_round_trips(model, RepresentationAutoencoder.from_pretrained, tmp_path, monkeypatch)
    assert "encoder.frozen/model.frozen.safetensors" in folder_bytes(tmp_path / NAMES[2] / "moved")


def test_what_is_uploaded_tells_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[dict[str, bytes]] = []

    def publish(folder: Path, *_: Any, **__: Any) -> None:
        uploaded.append(folder_bytes(folder))

    monkeypatch.setattr("repagen.hub.published.publish_folder", publish)
    tiny_pipeline(vae=tiny_kl()).save_pretrained(tmp_path / "first")
    pipe = ClassToImagePipeline.from_pretrained(tmp_path / "first")
    pipe.save_pretrained(tmp_path / "second", push_to_hub=True)
    pipe.transformer.save_pretrained(tmp_path / "third", push_to_hub=True)
    assert len(uploaded) == 2
    assert not any(os.fsencode(tmp_path) in content for files in uploaded for content in files.values())
