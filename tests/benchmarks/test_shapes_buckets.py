"""The benchmark of aspect buckets: sizes, its judge, and a few steps of it on the bundled pipeline."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repagen import TextToImagePipeline
from repagen.data import shapes_pipeline_path
from repagen.data.shapes import draw_scene, sample_scene
from repagen.evaluation.text_to_image.shapes import SceneGroup
from repagen.models.autoencoder_pixel import PixelAutoencoder

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.append(str(SCRIPTS))
    try:
        return importlib.import_module("shapes_buckets")
    finally:
        sys.path.remove(str(SCRIPTS))


def test_sizes_are_whole_tokens_near_their_ratios(benchmark: ModuleType) -> None:
    assert benchmark.TRAINED.keys() == {"1:1", "3:2", "2:3", "16:9"}
    for ratio, (height, width) in benchmark.SIZES.items():
        across, down = map(int, ratio.split(":"))
        assert height % 8 == width % 8 == 0
        assert width / height == pytest.approx(across / down, rel=0.02)


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (32, 56)])
def test_pictures_are_judged_in_their_size(benchmark: ModuleType, size: tuple[int, int]) -> None:
    scenes = [sample_scene(3, index, num_objects=1 + index // 4, combinations="seen") for index in range(8)]
    asked = [(SceneGroup("seen", len(scene.objects)), scene.prompts()[0]) for scene in scenes]
    pictures = np.stack([draw_scene(scene, size) for scene in scenes])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    stages = {"as bundled": images, "both went on": images.flip(3)}  # mirrored: kinds hold, places do not
    facts = benchmark.prompt_facts({"a size": stages}, asked)["a size"]
    assert facts["as bundled"]["seen, 2 objects"]["all four"]["share"] == 1
    mirrored = facts["both went on"]["seen, 1 object"]
    assert mirrored["kind"]["share"] == 1 and mirrored["all four"]["share"] == 0


def test_reconstructions_are_read_in_every_size(benchmark: ModuleType) -> None:
    for size in benchmark.SIZES.values():
        facts = benchmark.reconstruction_facts(PixelAutoencoder(32), size, 5)
        assert facts["share"] == 1 and facts["psnr_db"] > 60


@pytest.mark.slow
def test_both_parts_go_on_in_buckets_and_are_judged(benchmark: ModuleType, tmp_path: Path) -> None:
    one_checkpoint = ["data.num_images=16", "checkpoint.every_steps=4"]
    plan = benchmark.Plan(
        tmp_path, shapes_pipeline_path(), decoder_steps=4, steps=4, batch_size=4, num_prompts=2, num_reconstructions=3,
        decoder_words=one_checkpoint, words=one_checkpoint,
    )  # fmt: skip
    record: dict[str, Any] = benchmark.run(plan, num_inference_steps=2)
    assert record["pixels"].keys() == record["prompts"].keys() == record["reconstructions"].keys()
    rows = benchmark.table(record).splitlines()
    assert len(rows) == 2 + 5 * 3 and rows[-1].startswith("| 9:16 (32 x 56) | both went on |  | ")
    with Image.open(tmp_path / "sizes.png") as sheet:
        assert sheet.width > 4 * 56 * 2 and sheet.height > 2 * 200 * 2

    before, after = (TextToImagePipeline.from_pretrained(p) for p in (plan.pipeline, tmp_path / "generator/pipeline"))
    assert torch.equal(before.vae.latents_mean, after.vae.latents_mean)  # the latents are the same, so they compare
    latents = [
        benchmark.draw_latents(pipe, list_of_prompts(), (32, 48), num_inference_steps=2) for pipe in (before,) * 2
    ]
    assert latents[0].shape == (2, 96, 4, 6) and torch.equal(*latents)


def list_of_prompts() -> list[Any]:
    return [sample_scene(0, index, num_objects=1).prompts()[0] for index in range(2)]
