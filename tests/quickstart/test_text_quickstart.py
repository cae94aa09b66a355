from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repagen import TextToImagePipeline, UserError, quickstart
from repagen.config import save_config
from repagen.data import shapes_pipeline_path
from repagen.evaluation.text_to_image.shapes import GROUPS, ShapesPrompts, evaluate_shapes
from repagen.quickstart.figures import save_score_plot, save_sheet
from repagen.quickstart.text import SEEN_GROUPS, score_curve, scratch_config, write_sheet
from repagen.training import text_to_image


def test_the_shipped_pipeline_draws_what_is_asked_for() -> None:
    pipeline = TextToImagePipeline.from_pretrained(shapes_pipeline_path())
    score = evaluate_shapes(pipeline, ShapesPrompts(24, 5, SEEN_GROUPS)).score
    assert score.share("kind", 1).hits >= 21 and score.share("all four", 2).hits >= 14
    assert sum(path.stat().st_size for path in shapes_pipeline_path().rglob("*")) < 10 * 2**20


def test_prompt_and_seed_decide_the_picture() -> None:
    pipeline = TextToImagePipeline.from_pretrained(shapes_pipeline_path())

    def draw(prompt: str, seed: int) -> np.ndarray:
        return pipeline(
            prompt, num_inference_steps=6, generator=torch.Generator().manual_seed(seed), output_type="np"
        ).images

    red = draw("a red circle at the top left on a grey background", 0)
    assert np.array_equal(red, draw("a red circle at the top left on a grey background", 0))
    assert np.abs(red - draw("a blue square at the top left on a grey background", 0)).max() > 0.3
    assert not np.array_equal(red, draw("a red circle at the top left on a grey background", 1))


def test_a_file_and_a_folder_of_another_seed_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for output in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "below"):
        with pytest.raises(UserError, match=r"--output is .*, which is or lies under a file; give a folder"):
            quickstart.run(argparse.Namespace(text=True, output=str(output), seed=0))
    config = scratch_config(tmp_path / "shapes" / "generator", 3)
    Path(config.output_dir).mkdir(parents=True)
    save_config(config, Path(config.output_dir) / "config.yaml")
    with pytest.raises(UserError, match=r"--seed is 4, but .*shapes was begun with --seed 3; give that one"):
        quickstart.run(argparse.Namespace(text=True, output=str(tmp_path / "shapes"), seed=4))
    assert [path.name for path in (tmp_path / "shapes").iterdir()] == ["generator"]


def test_pictures_of_scores_and_prompts(tmp_path: Path) -> None:
    save_score_plot({"one": {64: (0.1, 0.0, 0.3), 128: (0.6, 0.4, 0.8)}}, tmp_path / "score.png")
    save_sheet(
        [Image.new("RGB", (32, 32), "red")] * 7, ["a red square"] * 7, [True] * 6 + [False], tmp_path / "sheet.png"
    )
    for name in ("score.png", "sheet.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 400


@pytest.mark.slow
def test_a_short_training_from_scratch_is_scored_as_it_goes(tmp_path: Path) -> None:
    overrides = {"max_steps": 20, "checkpoint.every_steps": 10, "data.num_images": 200}
    config = scratch_config(tmp_path / "generator", 0, overrides)
    folder = text_to_image.train(config)
    curve = score_curve(config, folder, ShapesPrompts(4, 0, SEEN_GROUPS))
    assert list(curve) == [640, 1280]
    assert all(score.share("kind", 1).value < 0.6 for score in curve.values()), "twenty steps teach nothing"
    write_sheet(TextToImagePipeline.from_pretrained(folder), ShapesPrompts(1, 0, GROUPS), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").is_file()
