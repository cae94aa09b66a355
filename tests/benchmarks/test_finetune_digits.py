"""A shortened run of the benchmark of fine-tuning, with bars to match."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from repagen import ClassToImagePipeline
from repagen.data import digits_to_images
from repagen.flow.conditions import ConditionDropout, Conditions
from repagen.flow.time import TimeDistribution, TimeShift
from repagen.models.latents import images_to_latents
from repagen.quickstart import train_digits
from repagen.randomness import generator_for
from repagen.training.noising import FlowMatching
from repagen.training.objective import GeneratorObjective

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


@torch.no_grad()
def held_out_loss(benchmark: ModuleType, pipeline: Any) -> float:
    """Mean velocity error on drawings of the new classes that nothing was trained on; times and noise are keyed."""
    names = {name: int(label) for label, name in pipeline.config.id2label.items()}
    drawn = [
        (benchmark.draw(name, strokes, 0, 500 + k), names[name])
        for name, strokes in benchmark.NEW.items()
        for k in range(20)
    ]
    pictures = digits_to_images(np.stack([picture for picture, _ in drawn]))
    latents = images_to_latents(pipeline.vae, pictures)
    labels = torch.tensor([label for _, label in drawn])
    times = TimeDistribution("logit_normal", 0.0, 1.0, 1.0, TimeShift(pipeline.scheduler.config.shift))
    process = FlowMatching(times, ConditionDropout.of_classes(len(names), 0.0))
    sample = process.draw(latents, Conditions(labels), [generator_for(0, "held out", k) for k in range(len(labels))])
    return GeneratorObjective(pipeline.transformer, process)(sample, {})["flow"].mean().item()


@pytest.mark.slow
def test_every_mode_learns_and_adapters_are_small(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "SAMPLES_PER_CLASS", 10)
    shorter = {"digits_decoder": ["max_steps=200", "sample.every_steps=0"], "digits_generator": ["max_steps=400"]}
    folder = train_digits(tmp_path / "digits", overrides=shorter)
    judge = benchmark.Judge.train(benchmark.NEW, with_digits=True)
    assert judge.accuracy > 0.97
    untrained: Any = ClassToImagePipeline.from_pretrained(folder)
    digits = untrained.transformer.label_embedder.table.weight.detach()[:10]
    untrained.transformer.choose_classes(range(10), digits.mean(0).repeat(4, 1))
    untrained.register_to_config(id2label={str(k): name for k, name in enumerate([*"0123456789", *benchmark.NEW])})
    losses, results = {"before": held_out_loss(benchmark, untrained)}, {}
    drawings = benchmark.write_drawings(benchmark.NEW, tmp_path / "drawings")
    for mode in ("full_alone", "lora", "labels"):
        words = ["progress_bar=false", "max_steps=150", *(["prior.images_per_class=0"] if mode == "lora" else [])]
        results[mode], images = benchmark.run_mode(mode, folder, drawings, tmp_path, judge, words)
        benchmark.show(benchmark.MODES[mode], drawings, images, tmp_path / "samples.png")
        tuned: Any = ClassToImagePipeline.from_pretrained(
            tmp_path / mode / "pipeline" if mode == "full_alone" else folder
        )
        if mode != "full_alone":
            tuned.load_lora_weights(tmp_path / mode / "adapter")
        losses[mode] = held_out_loss(benchmark, tuned)
    assert losses["full_alone"] < 0.8 * losses["before"]
    assert losses["lora"] < 0.85 * losses["before"]
    assert losses["labels"] < 0.97 * losses["before"]
    for mode in ("lora", "labels"):
        assert results[mode].size_share < 0.05
        assert results[mode].fused_difference < 1e-5
