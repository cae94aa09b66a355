from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import repagen
from repagen.errors import UserError
from repagen.evaluation import PipelineImages


class NoisePipeline:
    """Stands in for a pipeline: pictures that depend on nothing but generator and label."""

    def __init__(self, num_classes: int = 10) -> None:
        self.transformer = SimpleNamespace(config=SimpleNamespace(num_classes=num_classes), dtype=torch.float32)
        self.scheduler = SimpleNamespace(config={"shift": 1.0})
        self.config = {"_name_or_path": "noise"}
        self.calls: list[dict[str, Any]] = []

    def set_progress_bar_config(self, **options: bool) -> None:
        self.progress_bar = options

    def __call__(
        self,
        class_labels: list[int] | None,
        generator: list[torch.Generator],
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> SimpleNamespace:
        assert len(generator) == num_images_per_prompt * (1 if class_labels is None else len(class_labels))
        self.calls.append({"labels": class_labels, **options})
        images = torch.stack([torch.rand(3, 8, 8, generator=source) for source in generator])
        if class_labels is not None:
            images[:, :, 0, 0] = torch.tensor(class_labels)[:, None] / 255
        return SimpleNamespace(images=images)


def in_batches(source: PipelineImages, batch_size: int) -> torch.Tensor:
    indices = range(len(source))
    batches = [source.load(indices[start : start + batch_size]) for start in range(0, len(source), batch_size)]
    return torch.stack([image for batch in batches for image in batch])


def test_a_pipelines_samples_do_not_depend_on_the_batch_size(pipeline_folder: Path) -> None:
    pipeline = repagen.ClassToImagePipeline.from_pretrained(pipeline_folder)
    source = PipelineImages(pipeline, 21, num_inference_steps=4, guidance_scale=2.0, guidance_interval=(0.2, 0.9))
    threes, sevens = in_batches(source, 3).int(), in_batches(source, 7).int()
    assert sevens.float().std(dim=0).mean() > 3  # the pictures differ from each other
    assert torch.equal(threes, sevens)


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


def test_the_pipeline_sees_batches_of_one_shape() -> None:
    pipeline = NoisePipeline()
    PipelineImages(pipeline, 20, forward_batch_size=8).load(range(20))
    assert [len(call["labels"]) for call in pipeline.calls] == [8, 8, 8]
    with pytest.raises(UserError, match="forward_batch_size must be at least 1, got 0"):
        PipelineImages(pipeline, 20, forward_batch_size=0)


def test_an_unconditional_pipeline_gets_no_labels() -> None:
    pipeline = NoisePipeline(num_classes=0)
    source = PipelineImages(pipeline, 3)
    source.load(range(3))
    assert pipeline.calls[0]["labels"] is None
    assert source.protocol["label_mode"] == "unconditional"


def test_sampler_options_reach_the_pipeline_and_the_protocol() -> None:
    pipeline = NoisePipeline()
    options: dict[str, Any] = {"num_inference_steps": 7, "guidance_scale": 1.5, "guidance_interval": (0.1, 1.0)}
    source = PipelineImages(pipeline, 1, **options)
    source.load([0])
    assert pipeline.calls == [{"labels": [0] * 32, "output_type": "pt", **options}]
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


def test_pixels_are_truncated_where_the_protocol_says_so(pipeline_folder: Path) -> None:
    pipeline = repagen.ClassToImagePipeline.from_pretrained(pipeline_folder)
    rounded, truncated = (
        torch.stack(PipelineImages(pipeline, 8, rounding=rounding, num_inference_steps=2).load(range(8))).int()  # type: ignore[arg-type]
        for rounding in ("round", "truncate")
    )
    difference = rounded - truncated
    assert set(difference.unique().tolist()) == {0, 1}
    assert 0.3 < difference.float().mean() < 0.7


def test_the_origin_is_weights_and_settings(pipeline_folder: Path) -> None:
    pipeline: Any = repagen.ClassToImagePipeline.from_pretrained(pipeline_folder)
    source = PipelineImages(pipeline, 3)
    origins = {source.origin()}
    with torch.no_grad():
        next(pipeline.transformer.parameters()).add_(1.0)
    origins.add(source.origin())
    pipeline.scheduler.register_to_config(stochastic_sampling=True)
    origins.add(source.origin())
    pipeline.vae.register_to_config(image_size=999)
    origins.add(source.origin())
    assert len(origins) == 4


def test_a_pipelines_training_is_read_from_its_folder(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    pipeline = repagen.ClassToImagePipeline.from_pretrained(folder)
    assert PipelineImages(pipeline, 3).training == {}
    (folder / "training.json").write_text('{"images": 64000}')
    assert PipelineImages(pipeline, 3).training == {"images": 64000}
    (folder / "training.json").write_text("{")
    with pytest.raises(UserError, match=r"training\.json: cannot be read as JSON"):
        _ = PipelineImages(pipeline, 3).training
