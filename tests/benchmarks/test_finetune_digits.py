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
from repagen.data.digits import load_digits
from repagen.flow.conditions import ConditionDropout, Conditions
from repagen.flow.time import TimeDistribution, TimeShift
from repagen.models.latents import images_to_latents
from repagen.quickstart.digits import train_digits
from repagen.quickstart.judge import agreement, train_digit_classifier
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
    for shapes in (benchmark.FORMS, benchmark.STROKES):
        for name in shapes.strokes:
            drawn = np.stack([benchmark.draw(shapes, name, 0, index) for index in range(20)])
            assert drawn.shape == (20, 8, 8) and len({picture.tobytes() for picture in drawn}) == 20
            assert set(np.unique(drawn)) <= {round(level * 255 / 16) for level in range(17)}
            assert 20 < drawn.mean() < 130  # real digits: about 78


def test_forms_are_drawn_like_their_digits(benchmark: ModuleType) -> None:
    digits, labels = load_digits("train")
    pictures = torch.from_numpy(digits).float().div(255)[:, None]
    classifier = train_digit_classifier(pictures, torch.from_numpy(labels), seed=0, num_steps=150)
    for name, digit in benchmark.FORMS.like.items():
        drawn = np.stack([benchmark.draw(benchmark.FORMS, name, 0, index) for index in range(20)])
        shown = torch.from_numpy(drawn).float().div(255)[:, None]
        assert agreement(classifier, shown, torch.full((20,), digit)) >= 0.9  # by a judge that saw real digits alone


def test_judge_has_a_class_of_its_own_for_strokes_alone(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "DRAWN_FOR_JUDGE", 2)
    monkeypatch.setattr(
        benchmark, "train_digit_classifier", lambda *sets, num_classes, **_: lambda x: _logits(x, num_classes)
    )
    forms, strokes = benchmark.Judge.train(benchmark.FORMS), benchmark.Judge.train(benchmark.STROKES)
    assert [forms.labels[name] for name in ("chair", "hoop", "snail", "swan")] == [4, 0, 6, 2]
    assert [strokes.labels[name] for name in ("cross", "plus", "corner", "cup")] == [10, 11, 12, 13]
    assert forms.classifier(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert strokes.classifier(torch.zeros(1, 1, 8, 8)).shape == (1, 14)


def _logits(pictures: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.zeros(len(pictures), num_classes)


@torch.no_grad()
def held_out_loss(benchmark: ModuleType, pipeline: Any) -> float:
    """Mean velocity error on drawings of the new classes that nothing was trained on; times and noise are keyed."""
    names = {name: int(label) for label, name in pipeline.config.id2label.items()}
    drawn = [
        (benchmark.draw(benchmark.STROKES, name, 0, 500 + k), names[name])
        for name in benchmark.STROKES.strokes
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
    judge = benchmark.Judge.train(benchmark.STROKES)
    assert judge.accuracy > 0.97
    untrained: Any = ClassToImagePipeline.from_pretrained(folder)
    digits = untrained.transformer.label_embedder.table.weight.detach()[:10]
    untrained.transformer.choose_classes(range(10), digits.mean(0).repeat(4, 1))
    untrained.register_to_config(
        id2label={str(k): name for k, name in enumerate([*"0123456789", *benchmark.STROKES.strokes])}
    )
    losses, results = {"before": held_out_loss(benchmark, untrained)}, {}
    drawings = benchmark.write_drawings(benchmark.STROKES, tmp_path / "drawings")
    for mode in ("full_strokes", "lora_strokes", "labels_strokes"):
        prior = [] if mode == "labels_strokes" else ["prior.images_per_class=0"]
        words = [
            "progress_bar=false",
            "max_steps=150",
            *prior,
            *(["labels.keep=all"] if mode == "full_strokes" else []),
        ]
        results[mode], images = benchmark.run_mode(mode, folder, drawings, tmp_path, judge, words)
        benchmark.show(benchmark.MODES[mode], drawings, images, tmp_path / "samples.png")
        tuned: Any = ClassToImagePipeline.from_pretrained(
            tmp_path / mode / "pipeline" if mode == "full_strokes" else folder
        )
        if mode != "full_strokes":
            tuned.load_lora_weights(tmp_path / mode / "adapter")
        losses[mode] = held_out_loss(benchmark, tuned)
    assert losses["full_strokes"] < 0.8 * losses["before"]
    assert losses["lora_strokes"] < 0.85 * losses["before"]
    assert losses["labels_strokes"] < 0.97 * losses["before"]
    for mode in ("lora_strokes", "labels_strokes"):
        assert results[mode].size_share < 0.05
        assert results[mode].fused_difference < 1e-5
