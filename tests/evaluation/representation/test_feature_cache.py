"""Features are computed once, taken back only where they are what is asked for, and computed again where damaged."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from repagen.data import DataConfig, ImageDataset, open_image_dataset
from repagen.errors import UserError
from repagen.evaluation.representation.harvest import Change, Harvest, harvest_encoder, harvest_generator
from repagen.evaluation.representation.sources import GeneratorSource

INDICES = range(6)


@pytest.fixture
def read(make_pipeline: Callable[..., Any], digits: ImageDataset, tmp_path: Path) -> Callable[..., Harvest]:
    pipeline = make_pipeline()

    def harvest(pipeline: Any = pipeline, **options: Any) -> Harvest:
        options = {"blocks": [1, 3], "timesteps": [0.2, 0.6], "indices": INDICES, "cache": tmp_path, **options}
        return harvest_generator(pipeline, digits, **options)

    return harvest


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """The time of each batch that a generator saw."""
    seen: list[float | None] = []
    tokens = GeneratorSource.tokens

    def record(self: GeneratorSource, slices: Any, *rest: Any) -> Any:
        seen.append(slices[0].timestep)
        return tokens(self, slices, *rest)

    monkeypatch.setattr(GeneratorSource, "tokens", record)
    return seen


def equal(one: Harvest, other: Harvest) -> bool:
    return all(torch.equal(one.tokens(place), other.tokens(place)) for place in one.slices)


def test_a_second_run_reads(read: Callable[..., Harvest], passes: list[Any], tmp_path: Path) -> None:
    first, in_memory = read(), read(cache=None)
    assert passes == [0.2, 0.6] * 2
    passes.clear()
    second = read()
    assert not passes
    assert equal(first, second) and equal(in_memory, second)
    assert second.labels.tolist() == in_memory.labels.tolist() and second.indices.tolist() == list(INDICES)
    (manifest,) = tmp_path.glob("*/manifest.json")
    content = json.loads(manifest.read_text())
    assert content["made_by"]["seed"] == 0 and content["made_by"]["label"] == "null"
    assert {(entry["block"], entry["timestep"]) for entry in content["slices"].values()} == {
        (1, 0.2), (3, 0.2), (1, 0.6), (3, 0.6),
    }  # fmt: skip


def test_only_missing_times_are_computed(read: Callable[..., Harvest], passes: list[Any]) -> None:
    read()
    passes.clear()
    read(timesteps=[0.2, 0.9])
    assert passes == [0.9]


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"draw": 1},
        {"indices": range(5)},
        {"null_label": False},
        {"dtype": "float16"},
        {"change": Change("black", torch.zeros_like)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_features_of_something_else_are_not_taken(
    options: dict[str, Any], read: Callable[..., Harvest], passes: list[Any], tmp_path: Path
) -> None:
    read()
    passes.clear()
    read(**options)
    assert passes == [0.2, 0.6]
    assert len(list(tmp_path.iterdir())) == 2


def test_another_generator_or_autoencoder_is_something_else(
    read: Callable[..., Harvest], make_pipeline: Callable[..., Any], passes: list[Any]
) -> None:
    read()
    passes.clear()
    read(make_pipeline())  # the same weights anew
    assert not passes
    changed = make_pipeline()
    changed.transformer.patch_embed.proj.weight.data[0, 0] += 0.1
    read(changed)
    assert passes == [0.2, 0.6]
    changed = make_pipeline()
    changed.vae = copy.deepcopy(changed.vae)
    changed.vae.latents_std.mul_(2)
    read(changed)
    assert passes == [0.2, 0.6] * 2


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_slice_is_computed_again(
    damage: str, read: Callable[..., Harvest], passes: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = read(cache=None)
    read()
    (path,) = tmp_path.glob("*/block-003-t-0.6.safetensors")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-40] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    passes.clear()
    with caplog.at_level(logging.WARNING):
        again = read()
    assert "computed again" in caplog.text and passes == [0.6]
    assert equal(first, again) and path.read_bytes() == content


def test_an_unreadable_manifest_costs_a_new_computation(
    read: Callable[..., Harvest], passes: list[Any], tmp_path: Path
) -> None:
    first = read()
    (manifest,) = tmp_path.glob("*/manifest.json")
    content = manifest.read_text()
    manifest.write_text(content[:50])
    passes.clear()
    assert equal(first, read()) and passes == [0.2, 0.6]
    assert manifest.read_text() == content


@pytest.mark.parametrize("slices", [5, [5], {"block-001-t-0.2.safetensors": 5}], ids=["number", "list", "entry"])
def test_a_manifest_of_another_shape_costs_a_new_computation(
    slices: Any, read: Callable[..., Harvest], passes: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = read()
    (manifest,) = tmp_path.glob("*/manifest.json")
    content = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(content), "slices": slices}))
    passes.clear()
    with caplog.at_level(logging.WARNING):
        assert equal(first, read()) and passes == [0.2, 0.6]
    assert "cannot be read" in caplog.text and manifest.read_text() == content


def write_bmp(folder: Path, level: int) -> Path:
    """Six files of the same names and sizes whatever they show."""
    folder.mkdir(exist_ok=True)
    for number in range(6):
        Image.new("RGB", (16, 16), (level, number, 0)).save(folder / f"{number}.bmp")
    return folder


def test_features_of_other_images_are_not_taken(encoder: Any, tmp_path: Path) -> None:
    def read(folder: Path, cache: Path | None = tmp_path / "cache") -> Harvest:
        images = open_image_dataset(DataConfig(path=str(folder), image_size=16))
        return harvest_encoder(encoder, images, cache=cache)

    one, other = write_bmp(tmp_path / "one", 10), write_bmp(tmp_path / "other", 200)
    first, second = read(one), read(other)
    assert not equal(first, second) and equal(second, read(other, None))
    assert first.pixels_sha256 != second.pixels_sha256
    write_bmp(one, 90)  # in place
    assert equal(read(one), read(one, None)) and not equal(read(one), first)
    assert read(one).pixels_sha256 == read(one, None).pixels_sha256  # kept in the manifest


def test_slices_of_other_pixels_are_refused(encoder: Any, tmp_path: Path) -> None:
    """Files may be changed in a way that no state shows."""
    folder = write_bmp(tmp_path / "images", 10)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    images = open_image_dataset(DataConfig(path=str(folder), image_size=16))
    harvest_encoder(encoder, images, layers=[0], cache=tmp_path / "cache")
    write_bmp(folder, 90)
    for path, time in times.items():
        os.utime(path, ns=(time, time))
    with pytest.raises(UserError, match="its features are of other pixels than the images have now; remove it"):
        harvest_encoder(encoder, images, cache=tmp_path / "cache")


def test_a_folder_that_holds_something_else_is_refused(read: Callable[..., Harvest], tmp_path: Path) -> None:
    read()
    (manifest,) = tmp_path.glob("*/manifest.json")
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 3'))
    with pytest.raises(UserError, match="features of something else"):
        read()


def test_a_file_in_place_of_the_folder_is_refused(read: Callable[..., Harvest], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no folder"):
        read(cache=tmp_path / "file")


def test_half_precision_is_stored_and_what_it_cannot_hold_refused(
    read: Callable[..., Harvest], make_pipeline: Callable[..., Any], tmp_path: Path
) -> None:
    exact, stored = read(cache=None), read(dtype="float16")
    (path,) = tmp_path.glob("*/block-001-t-0.2.safetensors")
    assert load_file(path)["tokens"].dtype == torch.float16
    torch.testing.assert_close(stored.pooled(stored.slices[0]), exact.pooled(exact.slices[0]), rtol=1e-2, atol=1e-2)
    loud = make_pipeline()
    loud.transformer.patch_embed.proj.weight.data *= 1e6
    with pytest.raises(UserError, match=r"^dtype: features of .* are too large for float16; store them as float32"):
        read(loud, dtype="float16")


def test_layers_of_an_encoder_are_kept_too(encoder: Any, digits: ImageDataset, tmp_path: Path) -> None:
    harvest_encoder(encoder, digits, indices=INDICES, cache=tmp_path)
    assert {path.name for path in tmp_path.glob("*/*")} == {
        "layer-000.safetensors", "layer-001.safetensors", "manifest.json",
    }  # fmt: skip
