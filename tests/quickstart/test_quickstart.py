from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import repagen
from repagen.quickstart.clock import Clock
from repagen.quickstart.digits import judge_digits, train_digits


@pytest.mark.slow
def test_a_short_quickstart_leaves_a_pipeline_pictures_and_figures(tmp_path: Path) -> None:
    clock = Clock()
    overrides = {name: ["max_steps=20", "sample.every_steps=0"] for name in ("digits_decoder", "digits_generator")}
    folder = train_digits(tmp_path, overrides=overrides, clock=clock)
    assert [path.parent for path in tmp_path.rglob("model_index.json")] == [folder]
    report, result = judge_digits(tmp_path, folder, seed=0, clock=clock)
    assert report.classifier_accuracy > 0.97
    assert report.class_agreement < 0.9, "twenty steps teach nothing; the judge must not pretend they do"
    assert result.num_samples == report.num_samples == 500
    assert set(report.seconds) == {"decoder", "cache", "generator", "sampling", "evaluation"}
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size == (10 * 72 - 8, 10 * 72 - 8)
    assert (tmp_path / "loss.png").is_file()
    json.dumps(result.as_dict())
    assert list(repagen.ClassToImagePipeline.from_pretrained(folder).config.id2label.values()) == list("0123456789")
