"""A shortened run of the benchmark of fine-tuning, with bars to match."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from repagen.quickstart import train_digits

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "finetune_digits.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_digits", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_drawings_differ_and_look_like_digits(benchmark: ModuleType) -> None:
    for name, strokes in {**benchmark.NEW, **benchmark.FAMILIAR}.items():
        drawn = np.stack([benchmark.draw(name, strokes, 0, index) for index in range(20)])
        assert drawn.shape == (20, 8, 8) and len({picture.tobytes() for picture in drawn}) == 20
        assert set(np.unique(drawn)) <= {round(level * 255 / 16) for level in range(17)}
        assert 20 < drawn.mean() < 130  # real digits: about 78


@pytest.mark.slow
def test_new_classes_are_learned_old_ones_stay_and_adapters_are_small(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "SAMPLES_PER_CLASS", 20)
    shorter = {"digits_decoder": ["max_steps=300", "sample.every_steps=0"], "digits_generator": ["max_steps=800"]}
    pipeline = train_digits(tmp_path / "digits", overrides=shorter)
    judge = benchmark.Judge.train(benchmark.NEW, with_digits=True)
    assert judge.accuracy > 0.97
    drawings = benchmark.write_drawings(benchmark.NEW, tmp_path / "drawings")

    def tuned(mode: str, *words: str):
        more = ["progress_bar=false", "prior.num_inference_steps=20", *words]
        return benchmark.run_mode(mode, pipeline, drawings, tmp_path, judge, more if mode != "labels" else words)[0]

    full, lora, labels = (
        tuned("full", "max_steps=400"),
        tuned("lora", "max_steps=300"),
        tuned("labels", "max_steps=30"),
    )
    assert full.new_agreement > 0.6 and full.old_agreement > 0.7
    assert lora.new_agreement > 0.3 and lora.old_agreement > 0.7
    for adapter in (lora, labels):
        assert adapter.size_share < 0.05
        assert adapter.fused_difference < 1e-5
