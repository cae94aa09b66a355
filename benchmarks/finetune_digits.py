"""Four new classes of 20 images each for the digits pipeline, by every mode of fine-tuning.

    python benchmarks/finetune_digits.py --pipeline runs/digits/generator/pipeline [--output DIR] [--modes full lora]

The classes are strokes that no digit has: a cross, a plus, a corner and a cup, drawn by code in the look of the digits
(antialiased to 8 x 8 pixels, 16 grey levels, scaled by replication) at random places, sizes, slants and widths. The
pipeline is fine-tuned by the program that users run:

- `full`: the whole generator, with 20 of the pipeline's own images of each digit (prior preservation);
- `full_alone`: the same without them; no digit is kept;
- `lora`: adapters and the new rows of the label table, with the same prior images;
- `labels`: the new rows alone.

The judge is the quickstart's classifier, trained on the real training digits and on 150 further drawings of each new
class: it has seen none of the 20 images, and shares nothing with encoder, autoencoder and generator. It says what
share of 50 unguided samples of each class shows that class. The adapters are loaded into the pipeline as users load
them, and drawn from unfused and fused.

Writes OUTPUT/results.json and OUTPUT/samples.png, a row for each new class and digit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import repagen
from repagen.data.digits import load_digits
from repagen.pipelines.grid import save_image_grid
from repagen.quickstart.judge import agreement, to_small, train_digit_classifier
from repagen.randomness import derived_seed, generator_for
from repagen.training import finetune
from repagen.training.finetune_config import load_finetune_config

# Strokes in a square from -1 to 1, x to the right and y down.
SHAPES: dict[str, list[list[tuple[float, float]]]] = {
    "cross": [[(-1, -1), (1, 1)], [(1, -1), (-1, 1)]],
    "plus": [[(0, -1), (0, 1)], [(-1, 0), (1, 0)]],
    "corner": [[(-0.8, -1), (-0.8, 1), (0.9, 1)]],
    "cup": [[(-0.9, -1), (-0.9, 1), (0.9, 1), (0.9, -1)]],
}
IMAGES_PER_CLASS, DRAWN_FOR_JUDGE, SAMPLES_PER_CLASS, DIGITS = 20, 150, 50, 10
_CANVAS = 256  # pixels in which strokes are drawn before they are averaged to 8 x 8
MODES: dict[str, list[str]] = {
    "full": [
        "max_steps=1200", "optimizer.learning_rate=1.5e-3", "optimizer.schedule.kind=linear",
        "prior.images_per_class=20",
    ],
    "full_alone": ["max_steps=400", "optimizer.learning_rate=1e-3"],
    "lora": [
        "max_steps=1200", "optimizer.learning_rate=5e-3", "optimizer.schedule.kind=linear",
        "prior.images_per_class=20", "lora.rank=4",
    ],
    "labels": ["max_steps=400", "optimizer.learning_rate=3e-2"],
}  # fmt: skip


@dataclass(frozen=True)
class ModeResult:
    """What one mode reached.

    Attributes:
        mode: its name.
        new_agreement, old_agreement: share of the samples of the new classes, and of the digits, that the judge gives
            to the class asked for; None where no digit is kept.
        by_class: the same of each class.
        trained_parameters: number of parameters that were trained.
        size_share: size of the released adapter file by that of the generator's weights; None for a pipeline.
        fused_difference: largest difference between pixels of unfused and fused samples; None for a pipeline.
        seconds: of training, prior images included.
    """

    mode: str
    new_agreement: float
    old_agreement: float | None
    by_class: dict[str, float]
    trained_parameters: int
    size_share: float | None
    fused_difference: float | None
    seconds: float


def draw(name: str, seed: int, index: int) -> np.ndarray:
    """Drawing number `index` of a class: (8, 8) uint8, bright on black."""
    random = np.random.default_rng(derived_seed(seed, f"drawing of {name}", index))
    half = random.uniform(0.62, 0.92) * _CANVAS / 2 * np.array([random.uniform(0.75, 1.0), 1.0])
    middle = _CANVAS / 2 + random.uniform(-0.1, 0.1, 2) * _CANVAS / 2
    slant, width = random.uniform(-0.2, 0.2), random.uniform(1.1, 1.6) * _CANVAS / 8
    image = Image.new("L", (_CANVAS, _CANVAS))
    pen = ImageDraw.Draw(image)
    for stroke in SHAPES[name]:
        wobbled = [np.array(point) + random.uniform(-0.08, 0.08, 2) for point in stroke]
        points = [middle + half * (x - slant * y, y) for x, y in wobbled]
        pen.line([tuple(point) for point in points], fill=255, width=round(width), joint="curve")
        for x, y in points:
            pen.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=255)
    grey = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
    levels = np.rint(np.minimum(grey * 1.15, 255) / 255 * 16)  # the file of the digits has 17 levels
    return np.rint(levels * 255 / 16).astype(np.uint8)


def write_drawings(folder: Path, seed: int = 0) -> Path:
    """Write the class folders, 20 PNG files of 32 px in each."""
    for name in SHAPES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(IMAGES_PER_CLASS):
            picture = draw(name, seed, index).repeat(4, 0).repeat(4, 1)
            Image.fromarray(picture).convert("RGB").save(folder / name / f"{index:02d}.png")
    return folder


def train_judge(seed: int = 0) -> tuple[Any, float]:
    """The classifier of 14 classes, digits first, and its accuracy on held-out digits and further drawings."""
    sets = []
    for subset, first in (("train", 1000), ("validation", 2000)):
        digits, labels = load_digits(subset)
        drawn = np.stack([draw(name, seed, first + k) for name in SHAPES for k in range(DRAWN_FOR_JUDGE)])
        drawn_labels = DIGITS + np.arange(len(SHAPES)).repeat(DRAWN_FOR_JUDGE)
        pictures = torch.from_numpy(np.concatenate([digits, drawn])).float().div(255)[:, None]
        sets.append((pictures, torch.from_numpy(np.concatenate([labels, drawn_labels]))))
    judge = train_digit_classifier(*sets[0], seed=seed, num_steps=600, num_classes=DIGITS + len(SHAPES))
    return judge, agreement(judge, *sets[1])


@torch.no_grad()
def sample(pipeline: Any, names: Sequence[str], count: int = SAMPLES_PER_CLASS, seed: int = 0) -> torch.Tensor:
    """Unguided samples (classes * count, 3, 32, 32) in [0, 1], by class; noise keyed by (seed, class, number)."""
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for name in names:
        generators = [generator_for(seed, f"sample of {name}", index) for index in range(count)]
        rows.append(pipeline(class_labels=[name] * count, generator=generators, output_type="pt").images)
    return torch.cat(rows)


def shares(judge: Any, images: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Class => share of its samples that the judge gives to it."""
    ids = {str(digit): digit for digit in range(DIGITS)} | {name: DIGITS + k for k, name in enumerate(SHAPES)}
    parts = to_small(images).chunk(len(names))
    return {
        name: agreement(judge, part, torch.full((len(part),), ids[name]))
        for name, part in zip(names, parts, strict=True)
    }


def run_mode(
    mode: str, pipeline: Path, drawings: Path, output: Path, judge: Any, more: Sequence[str] = ()
) -> tuple[ModeResult, torch.Tensor]:
    """Fine-tune, load what was released, sample and judge; => the result, and the samples of all its classes."""
    preset = "finetune_full" if mode == "full_alone" else f"finetune_{mode}"
    words = [
        f"pipeline={pipeline}", f"data.path={drawings}", "data.image_size=32", f"output_dir={output / mode}",
        "device=cpu", "precision=fp32", "gradient_checkpointing=false", "num_workers=0", "sample.every_steps=0",
        "micro_batch_size=null", *MODES[mode], *more,
    ]  # fmt: skip
    started = time.perf_counter()
    released = finetune.train(load_finetune_config(preset, words))
    seconds = time.perf_counter() - started
    tuned: Any = repagen.ClassToImagePipeline.from_pretrained(released if mode.startswith("full") else pipeline)
    size_share = None
    if not mode.startswith("full"):
        tuned.load_lora_weights(released)
        weights = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
        size_share = (released / "pytorch_lora_weights.safetensors").stat().st_size / weights.stat().st_size
    new, old = list(SHAPES), [] if mode == "full_alone" else [str(digit) for digit in range(DIGITS)]
    images = sample(tuned, [*new, *old])
    by_class = shares(judge, images, [*new, *old])
    fused_difference = None
    if size_share is not None:
        tuned.fuse_lora()
        count = 8
        tuned_images = sample(tuned, new, count)
        unfused = torch.cat([images[k * SAMPLES_PER_CLASS :][:count] for k in range(len(new))])
        fused_difference = (tuned_images - unfused).abs().max().item()
    checkpoint = max((output / mode / "checkpoints").iterdir()) / "model.safetensors"
    return (
        ModeResult(
            mode=mode,
            new_agreement=float(np.mean([by_class[name] for name in new])),
            old_agreement=float(np.mean([by_class[name] for name in old])) if old else None,
            by_class=by_class,
            trained_parameters=checkpoint.stat().st_size // 4,
            size_share=size_share,
            fused_difference=fused_difference,
            seconds=round(seconds, 1),
        ),
        images,
    )


def main() -> None:
    """Run the modes and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="the digits pipeline, of `repagen quickstart`")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_digits"))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of every mode")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    drawings = write_drawings(args.output / "drawings")
    judge, accuracy = train_judge()
    base: Any = repagen.ClassToImagePipeline.from_pretrained(args.pipeline)
    digits = [str(digit) for digit in range(DIGITS)]
    before = shares(judge, sample(base, digits), digits)
    results, shown = [], []
    for mode in args.modes:
        result, images = run_mode(mode, args.pipeline, drawings, args.output, judge, args.set)
        results.append(asdict(result))
        print(json.dumps(results[-1]))
        for part in images.chunk(len(result.by_class)):
            shown += list(part[:10])
        save_image_grid(
            torch.stack(shown[-10 * len(result.by_class) :]), args.output / f"{mode}.png", columns=10, gap_px=2
        )
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "repagen": repagen.__version__},
        "judge_accuracy": accuracy,
        "old_agreement_before": float(np.mean(list(before.values()))),
        "samples_per_class": SAMPLES_PER_CLASS,
        "modes": results,
    }
    (args.output / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
