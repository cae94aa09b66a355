from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import repagen
from repagen.data import load_digits
from repagen.errors import UserError
from repagen.evaluation import FolderImages, NpzImages, PipelineImages, open_images
from repagen.evaluation.samples import Unreadable, to_uint8


class NoisePipeline:
    """Stands in for a pipeline: pictures that depend on nothing but generator and label."""

    def __init__(self, num_classes: int = 10) -> None:
        self.transformer = SimpleNamespace(config=SimpleNamespace(num_classes=num_classes), dtype=torch.float32)
        self.scheduler = SimpleNamespace(config={"shift": 1.0})
        self.config = {"_name_or_path": "noise"}
        self.calls: list[dict[str, Any]] = []

    def set_progress_bar_config(self, **options: bool) -> None:
        self.progress_bar = options

    def __call__(self, labels: list[int] | None, generator: list[torch.Generator], **options: Any) -> SimpleNamespace:
        self.calls.append({"labels": labels, **options})
        images = torch.stack([torch.rand(3, 8, 8, generator=source) for source in generator])
        if labels is not None:
            images[:, :, 0, 0] = torch.tensor(labels)[:, None] / 255
        return SimpleNamespace(images=images)


def in_batches(source: PipelineImages, batch_size: int) -> torch.Tensor:
    indices = range(len(source))
    batches = [source.load(indices[start : start + batch_size]) for start in range(0, len(source), batch_size)]
    return torch.stack([image for batch in batches for image in batch])


def test_rounding_to_uint8() -> None:
    levels = torch.arange(256) / 255
    assert to_uint8(levels).tolist() == list(range(256))
    assert to_uint8(torch.tensor([-0.5, 0.4 / 255, 0.6 / 255, 1.7])).tolist() == [0, 0, 1, 255]


def test_a_folder_is_read_in_order_of_paths_with_its_subfolders(
    tmp_path: Path, random_pictures: Any, write_pictures: Any
) -> None:
    pictures = random_pictures(4, seed=0)
    write_pictures(tmp_path / "b", pictures[2:])
    write_pictures(tmp_path / "a", pictures[:2])
    (tmp_path / "notes.txt").write_text("not a picture")
    source = FolderImages(tmp_path)
    loaded = torch.stack(source.load(range(4)))
    assert torch.equal(loaded, torch.from_numpy(pictures).permute(0, 3, 1, 2))
    assert [source.describe(index) for index in (0, 3)] == ["a/00000.png", "b/00001.png"]


def test_unreadable_files_are_named_with_the_reason(tmp_path: Path, random_pictures: Any, write_pictures: Any) -> None:
    write_pictures(tmp_path, random_pictures(2, seed=0))
    whole = (tmp_path / "00000.png").read_bytes()
    (tmp_path / "00000.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "00001.png").write_text("no picture at all")
    truncated, foreign = FolderImages(tmp_path).load([0, 1])
    assert isinstance(truncated, Unreadable) and truncated.name == "00000.png" and "truncated" in truncated.reason
    assert isinstance(foreign, Unreadable) and foreign.name == "00001.png"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_gives_its_images_in_any_order(tmp_path: Path, save: Any, random_pictures: Any) -> None:
    pictures = random_pictures(7, seed=3)
    save(tmp_path / "samples.npz", arr_0=pictures, arr_1=np.arange(7))
    source = NpzImages(tmp_path / "samples.npz")
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    assert len(source) == 7
    assert torch.equal(torch.stack(source.load([0, 1, 5])), expected[[0, 1, 5]])
    assert torch.equal(torch.stack(source.load([2])), expected[[2]])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "must be uint8"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"must be uint8 \(N, H, W, 3\), got uint8 \(2, 3, 8, 8\)"),
        (np.array([{}], dtype=object), "must be uint8"),
    ],
)
def test_an_npz_of_another_layout_is_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=array)
    with pytest.raises(UserError, match=message):
        NpzImages(tmp_path / "samples.npz")


def test_a_damaged_npz_is_named(tmp_path: Path, random_pictures: Any) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=random_pictures(5, seed=0))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"samples\.npz: the file is damaged"):
        NpzImages(path).load(range(5))
    path.write_bytes(content[:1000])
    with pytest.raises(UserError, match="not an npz file"):
        NpzImages(path)


def test_a_pipelines_samples_do_not_depend_on_the_batch_size(pipeline_folder: Path) -> None:
    pipeline = repagen.ClassToImagePipeline.from_pretrained(pipeline_folder)
    source = PipelineImages(pipeline, 21, num_inference_steps=4, guidance_scale=2.0, guidance_interval=(0.2, 0.9))
    threes, sevens = in_batches(source, 3).int(), in_batches(source, 7).int()
    assert sevens.float().std(dim=0).mean() > 3  # the pictures differ from each other
    # Differently shaped matrix products differ in their last digit, which may tip a pixel over a rounding edge.
    assert (threes - sevens).abs().max() <= 1
    assert (threes == sevens).float().mean() > 0.9999


@pytest.mark.parametrize("label_mode", ["balanced", "random"])
def test_samples_do_not_depend_on_the_batch_size(label_mode: Any) -> None:
    source = PipelineImages(NoisePipeline(), 20, seed=5, label_mode=label_mode)
    assert torch.equal(in_batches(source, 3), in_batches(source, 7))
    another_seed = PipelineImages(NoisePipeline(), 20, seed=6, label_mode=label_mode)
    assert not torch.equal(in_batches(source, 7), in_batches(another_seed, 7))


def test_balanced_labels_cycle_and_random_labels_are_drawn_by_index() -> None:
    balanced = PipelineImages(NoisePipeline(), 1000, label_mode="balanced")
    drawn = PipelineImages(NoisePipeline(), 1000, label_mode="random")
    assert np.bincount([balanced.label(index) for index in range(1000)]).tolist() == [100] * 10
    counts = np.bincount([drawn.label(index) for index in range(1000)], minlength=10)
    assert counts.sum() == 1000 and counts.min() > 60 and len(set(counts)) > 1
    assert [drawn.label(index) for index in (7, 8)] == [drawn.label(index) for index in (7, 8)]


def test_an_unconditional_pipeline_gets_no_labels() -> None:
    pipeline = NoisePipeline(num_classes=0)
    source = PipelineImages(pipeline, 3)
    source.load(range(3))
    assert pipeline.calls[0]["labels"] is None
    assert source.protocol["label_mode"] == "unconditional"


def test_sampler_options_reach_the_pipeline_and_the_protocol() -> None:
    pipeline = NoisePipeline()
    options = {"num_inference_steps": 7, "guidance_scale": 1.5, "guidance_interval": (0.1, 1.0)}
    source = PipelineImages(pipeline, 1, **options)
    source.load([0])
    assert pipeline.calls == [{"labels": [0], "output_type": "pt", **options}]
    assert options.items() <= source.protocol.items()
    assert source.protocol["dtype"] == "float32" and source.protocol["label_mode"] == "balanced"


def test_pixels_that_are_not_finite_name_the_sample() -> None:
    class BrokenPipeline(NoisePipeline):
        def __call__(self, *args: Any, **options: Any) -> SimpleNamespace:
            output = super().__call__(*args, **options)
            output.images[1, 0, 0, 0] = torch.nan
            return output

    with pytest.raises(UserError, match=r"sample 4 \(label 4\) has pixels that are not finite"):
        PipelineImages(BrokenPipeline(), 9).load([3, 4, 5])


def test_the_bundled_digits_are_opened_by_their_settings() -> None:
    source = open_images(["data.kind=digits", "data.subset=validation", "data.image_size=32"])
    image = source.load([0])[0]
    assert len(source) == len(load_digits("validation")[0])
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert source.protocol == {
        "kind": "digits",
        "subset": "validation",
        "image_size": 32,
        "crop": "center",
    }


def test_a_folder_is_cropped_when_it_is_opened_as_a_dataset(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 40, 3), 200, np.uint8)).save(tmp_path / "wide.png")
    source = open_images(["data.kind=folder", f"data.path={tmp_path}", "data.image_size=10"])
    assert torch.equal(source.load([0])[0], torch.full((3, 10, 10), 200, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["data.kind=digits", "data.imagesize=3"],
            "data.imagesize=3: not a known setting; allowed: .*data.image_size",
        ),
        (["data.kind=digit"], "expected one of"),
        (["data.kind=digits", "samples"], "give one path"),
        (["missing"], "no such folder of images: missing"),
        (["missing.npz"], "no such file: missing.npz"),
    ],
)
def test_wrong_words_are_explained(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_images(words)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images found"):
        FolderImages(tmp_path)
