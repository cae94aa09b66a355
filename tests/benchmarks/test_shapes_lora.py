"""The benchmark of a new object: what is taught and asked for, and a few steps of it on a tiny pipeline."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pipelines.tiny_pipelines import CHANNELS, tiny_text_pipeline

from repagen.data import DataConfig, open_dataset
from repagen.data.config import CaptionConfig
from repagen.data.shapes import check_picture, draw_scene, read_picture, sample_scene
from repagen.evaluation.text_to_image.shapes import SceneGroup, ShapesPrompts, ShapesScore

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.append(str(SCRIPTS))
    try:
        return importlib.import_module("shapes_lora")
    finally:
        sys.path.remove(str(SCRIPTS))


def test_ten_pictures_show_rings_with_true_captions(benchmark: ModuleType, tmp_path: Path) -> None:
    folder = benchmark.write_pictures(tmp_path / "rings")
    dataset = open_dataset(DataConfig(path=str(folder), image_size=32, captions=CaptionConfig()))
    assert len(dataset) == 10
    found, grounds = [], set()
    for index, path in enumerate(sorted(folder.glob("*.png"))):
        read = read_picture(np.asarray(Image.open(path)))
        assert {item.shape for item in read.objects} == {"ring"}
        texts = dataset.captions(index).texts
        assert len(texts) >= 6 and all(f"{item.size} {item.colour} ring" in texts[0] for item in read.objects)
        found += [(item.colour, item.size, item.quadrant) for item in read.objects]
        grounds.add(read.background)
    assert len(found) == len(set(found)) == 24 and len(grounds) == 3
    assert {colour for colour, _, _ in found} == set(benchmark.COLOURS_SHOWN)


def test_fresh_prompts_are_none_that_are_taught(benchmark: ModuleType) -> None:
    taught = {prompt.text for scene in benchmark.shown_scenes() for prompt in scene.prompts()}
    asked = benchmark.ring_prompts(100)
    assert all(len(prompts) == 100 for prompts in asked.values())
    for prompts in asked.values():
        assert not taught & {prompt.text for prompt in prompts} and len({prompt.text for prompt in prompts}) > 12
        assert all([item.shape for item in prompt.objects].count("ring") == 1 for prompt in prompts)
    colours = {name: {prompt.objects[0].colour for prompt in prompts} for name, prompts in asked.items()}
    assert colours == {
        "colours shown": set(benchmark.COLOURS_SHOWN),
        "new colours": set(benchmark.COLOURS_NEW),
        "beside an ordinary object": set(benchmark.COLOURS_SHOWN),
    }
    assert {len(prompt.objects) for prompt in asked["beside an ordinary object"]} == {2}


def test_prior_prompts_are_ordinary_and_not_scored(benchmark: ModuleType) -> None:
    scored = [prompt.text for _, prompt in ShapesPrompts(100)]
    prior = benchmark.prior_prompts(scored)
    assert len(prior) == benchmark.PRIOR_PROMPTS and not set(scored) & set(prior)
    assert not any("ring" in text.split() for text in prior)
    assert {text.count(" and ") for text in prior if "background" in text} >= {0, 1, 2}


def test_pictures_are_judged_by_shape_and_colour(benchmark: ModuleType) -> None:
    scenes = [benchmark.asked_scene(index, ["red", "blue"], beside=False) for index in range(4)]
    prompts = [scene.prompts()[0] for scene in scenes]
    pictures = [torch.from_numpy(draw_scene(scene)).permute(2, 0, 1) for scene in scenes]
    assert all(check_picture(picture.permute(1, 2, 0).numpy(), prompts[k]).right for k, picture in enumerate(pictures))
    assert benchmark.kinds_right(pictures, prompts).value == 1
    swapped = [pictures[1], pictures[0], *pictures[2:]]  # another colour
    assert benchmark.kinds_right(swapped, prompts).value == 0.5
    circle = torch.from_numpy(draw_scene(sample_scene(0, 0, num_objects=1))).permute(2, 0, 1)
    assert benchmark.kinds_right([circle, *pictures[1:]], prompts).value == 0.75


def test_the_change_of_ordinary_prompts_is_in_points(benchmark: ModuleType) -> None:
    groups = [SceneGroup("seen", 1)] * 4 + [SceneGroup("seen", 2)] * 4
    scenes = [sample_scene(0, index, num_objects=1 + (index > 3)) for index in range(8)]
    verdicts = [check_picture(draw_scene(scene), scene.prompts()[0]) for scene in scenes]
    wrong = check_picture(np.full((32, 32, 3), 128, np.uint8), scenes[0].prompts()[0])
    before, after = ShapesScore.of(groups, verdicts), ShapesScore.of(groups, [wrong, *verdicts[1:]])
    points = benchmark.ordinary_points(before, after)
    assert points["seen, 1 object"] == {"before": 100, "after": 75, "change": -25}
    assert points["seen, 2 objects"]["change"] == 0 and points["all"]["change"] == -12.5


@pytest.mark.slow
def test_an_adapter_is_trained_loaded_and_judged(benchmark: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=CHANNELS, sample_size=32,
        down_block_types=4 * ("DownEncoderBlock2D",), up_block_types=4 * ("UpDecoderBlock2D",),
    ).eval()  # fmt: skip
    tiny_text_pipeline(vae=vae).save_pretrained(tmp_path / "pipeline")
    words = ["max_steps=2", "global_batch_size=4", "prior.num_inference_steps=2", "progress_bar=false"]
    record = benchmark.run(tmp_path / "pipeline", tmp_path / "out", 3, words, num_inference_steps=2)
    assert set(record["rings_right"]) == {"colours shown", "new colours", "beside an ordinary object"}
    assert record["ordinary_percent"]["all"].keys() == {"before", "after", "change"}
    assert 0 < record["fused_difference"] < 1e-4 and record["adapter_by_generator"] > 0
    assert len(list((tmp_path / "out" / "lora" / "prior").rglob("*.png"))) == benchmark.PRIOR_PROMPTS
    with Image.open(tmp_path / "out" / "rings.png") as sheet:
        assert sheet.width >= 10 * 64
