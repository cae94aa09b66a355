"""The curve of a score: which weights are scored, and after how many images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from text_parts import text_settings, train_text, write_text_parts

from repagen.config import load_config
from repagen.evaluation.text_to_image.shapes import ShapesPrompts
from repagen.training import shapes_curve
from repagen.training.text_to_image_config import TextToImageConfig


def test_the_averaged_weights_of_every_checkpoint_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = write_text_parts(tmp_path / "parts")
    run = train_text(text_settings(parts, tmp_path / "t2i"), tmp_path / "t2i", "checkpoint.keep=3")
    config = load_config(TextToImageConfig, run / "config.yaml")
    prompts, scored = ShapesPrompts(1), []

    def evaluate(pipeline: Any, asked: ShapesPrompts, **options: int) -> Any:
        assert asked is prompts and options == {"num_inference_steps": 2}
        scored.append({name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()})
        return SimpleNamespace(score=len(scored))

    monkeypatch.setattr(shapes_curve, "evaluate_shapes", evaluate)
    curve = shapes_curve.score_curve(config, run / "pipeline", prompts, num_inference_steps=2)
    assert curve == {16: 1, 32: 2}  # 2 and 4 steps of 8
    for step, weights in zip((2, 4), scored, strict=True):
        shadow = load_file(run / "checkpoints" / f"step-{step:08d}" / "ema.safetensors")
        assert all(torch.equal(tensor, shadow[f"shadow.{name}"]) for name, tensor in weights.items())
