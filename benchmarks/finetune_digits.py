"""Four new classes of 20 images each for the digits pipeline, by every mode of fine-tuning.

    python benchmarks/finetune_digits.py --pipeline runs/digits/generator/pipeline [--output DIR] [--modes full lora]

The classes are drawn by code in the look of the digits (antialiased to 8 x 8 pixels, 16 grey levels, scaled by
replication) at random places, sizes, slants and widths. The pipeline is fine-tuned by the program that users run:

- `full`: the whole generator, with some of the pipeline's own images of each digit (prior preservation);
- `lora`: adapters and the new rows of the label table, with prior images;
- `labels`: the new rows alone.

These three take `FORMS`: a chair, a hoop, a snail and a swan, forms that the generator has (of 4, 0, 6 and 2) under
names that it does not have. The new rows begin with those of these digits (`labels.start_from`), and in
`labels_from_mean` with the mean of all digits. `full_strokes`, `lora_strokes` and `labels_strokes` take `STROKES` that
no digit has: a cross, a plus, a corner and a cup.

The judge is the quickstart's classifier, trained on the real training digits and on 150 further drawings of each
class: it has seen none of the 20 images, and shares nothing with encoder, autoencoder and generator. A stroke is a
class of its own to it, a form the class of the digit that it is drawn like, to be told from the nine others. It says
what share of 50 unguided samples of each class shows that class. The adapters are loaded into the pipeline as users
load them, and drawn from unfused and fused.

Writes OUTPUT/results.json, and OUTPUT/MODE.png with ten samples of each class in a row, below ten of the drawings.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import math
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

Stroke = list[tuple[float, float]]
DIGITS = [str(digit) for digit in range(10)]
IMAGES_PER_CLASS, DRAWN_FOR_JUDGE, SAMPLES_PER_CLASS, SHOWN = 20, 150, 50, 10
_CANVAS = 256  # pixels in which strokes are drawn before they are averaged to 8 x 8


def _arc(x: float, y: float, width: float, height: float, start: float, end: float) -> Stroke:
    """Points of an ellipse with these half axes around (x, y); angles in turns, clockwise from the right."""
    angles = [2 * math.pi * (start + (end - start) * k / 20) for k in range(21)]
    return [(x + width * math.cos(angle), y + height * math.sin(angle)) for angle in angles]


@dataclass(frozen=True)
class Shapes:
    """Drawn classes, and the hand that draws them; ranges are of uniform draws.

    Attributes:
        strokes: class => strokes in a square from -1 to 1, x to the right and y down.
        like: class => digit that it is drawn like; empty for what no digit is like.
        height: of a drawing, in heights of the picture.
        aspect: its width by its height.
        place: how far its middle lies from the picture's at most, in half pictures.
        slant: shift of the top to the right, by half the height.
        pen: width of the strokes, in pixels of the 8 x 8.
    """

    strokes: dict[str, list[Stroke]]
    like: dict[str, int]
    height: tuple[float, float]
    aspect: tuple[float, float]
    place: float
    slant: tuple[float, float]
    pen: tuple[float, float]


FORMS = Shapes(
    strokes={
        "chair": [[(-0.1, -1), (-0.9, 0.1), (0.9, 0.1)], [(0.6, -0.5), (0.1, 1)]],
        "hoop": [_arc(0, 0, 1, 1, 0, 1)],
        "snail": [[(0.2, -1), *_arc(0.3, 0.3, 1.1, 1.3, -0.33, -0.5), *_arc(0, 0.5, 0.85, 0.5, 0.5, -0.5)]],
        "swan": [[*_arc(0, -0.45, 0.8, 0.55, 0.53, 1.11), (-0.8, 1), (0.9, 1)]],
    },
    like={"chair": 4, "hoop": 0, "snail": 6, "swan": 2},
    height=(0.8, 0.92),
    aspect=(0.5, 0.68),
    place=0.05,
    slant=(-0.1, 0.25),
    pen=(1.0, 1.6),
)  # as tall, narrow and slanted as the digits
STROKES = Shapes(
    strokes={
        "cross": [[(-1, -1), (1, 1)], [(1, -1), (-1, 1)]],
        "plus": [[(0, -1), (0, 1)], [(-1, 0), (1, 0)]],
        "corner": [[(-0.8, -1), (-0.8, 1), (0.9, 1)]],
        "cup": [[(-0.9, -1), (-0.9, 1), (0.9, 1), (0.9, -1)]],
    },
    like={},
    height=(0.62, 0.92),
    aspect=(0.75, 1.0),
    place=0.1,
    slant=(-0.2, 0.2),
    pen=(1.1, 1.6),
)


@dataclass(frozen=True)
class Mode:
    """One fine-tuning: its preset, its settings and the classes."""

    preset: str
    words: list[str]
    shapes: Shapes = FORMS


# Times by the law of the pipeline's own training, and a learning rate that falls to 0.
_SHARED = ["flow.time=logit_normal", "optimizer.schedule.kind=linear", "optimizer.beta2=0.99", "ema.decay=0.99"]
_TARGETS = (
    "[to_q, to_k, to_v, to_out.0, ff.linear_in, ff.linear_out, modulation, modulation_out, condition_proj, proj_out]"
)
_FULL = ["prior.images_per_class=10"]
_LORA = ["prior.images_per_class=10", "lora.rank=4", "lora.alpha=16", f"lora.target_modules={_TARGETS}"]
_LABELS = ["max_steps=300", "optimizer.learning_rate=0.05"]
_FROM_DIGITS = [f"labels.start_from.{name}='{digit}'" for name, digit in FORMS.like.items()]
# Forms ask little change of a generator that has them; strokes need higher rates and more steps.
MODES = {
    "full": Mode("finetune_full", ["max_steps=300", "optimizer.learning_rate=4e-4", *_FULL, *_FROM_DIGITS]),
    "lora": Mode("finetune_lora", ["max_steps=300", "optimizer.learning_rate=3e-3", *_LORA, *_FROM_DIGITS]),
    "labels": Mode("finetune_labels", ["max_steps=300", "optimizer.learning_rate=1e-3", *_FROM_DIGITS]),
    "labels_from_mean": Mode("finetune_labels", _LABELS),
    "full_strokes": Mode("finetune_full", ["max_steps=1800", "optimizer.learning_rate=1.5e-3", *_FULL], STROKES),
    "lora_strokes": Mode("finetune_lora", ["max_steps=1500", "optimizer.learning_rate=1e-2", *_LORA], STROKES),
    "labels_strokes": Mode("finetune_labels", _LABELS, STROKES),
}


@dataclass(frozen=True)
class ModeResult:
    """What one mode reached.

    Attributes:
        mode: its name.
        new_agreement, old_agreement: share of the samples of the new classes, and of the digits, that the judge gives
            to the class asked for.
        by_class: the same of each class.
        size_share: size of the released adapter file by that of the generator's weights; None for a pipeline.
        fused_difference: largest difference between pixels of unfused and fused samples; None for a pipeline.
        seconds: of training, prior images included.
    """

    mode: str
    new_agreement: float
    old_agreement: float
    by_class: dict[str, float]
    size_share: float | None
    fused_difference: float | None
    seconds: float


def draw(shapes: Shapes, name: str, seed: int, index: int) -> np.ndarray:
    """Drawing number `index` of a class: (8, 8) uint8, bright on black."""
    random = np.random.default_rng(derived_seed(seed, f"drawing of {name}", index))
    half = random.uniform(*shapes.height) * _CANVAS / 2 * np.array([random.uniform(*shapes.aspect), 1.0])
    middle = _CANVAS / 2 + random.uniform(-shapes.place, shapes.place, 2) * _CANVAS / 2
    slant, width = random.uniform(*shapes.slant), random.uniform(*shapes.pen) * _CANVAS / 8
    image = Image.new("L", (_CANVAS, _CANVAS))
    pen = ImageDraw.Draw(image)
    for stroke in shapes.strokes[name]:
        wobble = 0.0 if len(stroke) > 4 else 0.08  # a curve stays smooth
        wobbled = [np.array(point) + random.uniform(-wobble, wobble, 2) for point in stroke]
        points = [middle + half * (x - slant * y, y) for x, y in wobbled]
        pen.line([tuple(point) for point in points], fill=255, width=round(width), joint="curve")
        for x, y in points:
            pen.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=255)
    grey = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
    levels = np.rint(np.minimum(grey * 1.15, 255) / 255 * 16)  # the file of the digits has 17 levels
    return np.rint(levels * 255 / 16).astype(np.uint8)


def write_drawings(shapes: Shapes, folder: Path, seed: int = 0) -> Path:
    """Write the class folders, 20 PNG files of 32 px in each."""
    for name in shapes.strokes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(IMAGES_PER_CLASS):
            picture = draw(shapes, name, seed, index).repeat(4, 0).repeat(4, 1)
            Image.fromarray(picture).convert("RGB").save(folder / name / f"{index:02d}.png")
    return folder


@dataclass(frozen=True)
class Judge:
    """A classifier of digits and drawn classes.

    Attributes:
        classifier: (B, 1, 8, 8) => logits.
        labels: class => its label; that of the digit that it is drawn like, for some.
        accuracy: on held-out digits and further drawings.
    """

    classifier: Any
    labels: dict[str, int]
    accuracy: float

    @classmethod
    def train(cls, shapes: Shapes, seed: int = 0) -> Judge:
        """Train on real digits and on drawings that nothing else is trained on."""
        labels = {digit: int(digit) for digit in DIGITS}
        for name in shapes.strokes:
            labels[name] = shapes.like.get(name, len(set(labels.values())))
        sets = []
        for subset, first in (("train", 1000), ("validation", 2000)):
            digits, digit_labels = load_digits(subset)
            numbers = range(first, first + DRAWN_FOR_JUDGE)
            drawn = np.stack([draw(shapes, name, seed, number) for name in shapes.strokes for number in numbers])
            drawn_labels = np.array([labels[name] for name in shapes.strokes]).repeat(DRAWN_FOR_JUDGE)
            pictures = torch.from_numpy(np.concatenate([digits, drawn])).float().div(255)[:, None]
            sets.append((pictures, torch.from_numpy(np.concatenate([digit_labels, drawn_labels]))))
        num_classes = len(set(labels.values()))
        classifier = train_digit_classifier(*sets[0], seed=seed, num_steps=600, num_classes=num_classes)
        return cls(classifier, labels, agreement(classifier, *sets[1]))

    def shares(self, images: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
        """Class => share of its samples (N / classes, 3, 32, 32) that are given to it."""
        parts = to_small(images).chunk(len(names))
        return {
            name: agreement(self.classifier, part, torch.full((len(part),), self.labels[name]))
            for name, part in zip(names, parts, strict=True)
        }


@torch.no_grad()
def sample(pipeline: Any, names: Sequence[str], count: int = SAMPLES_PER_CLASS, seed: int = 0) -> torch.Tensor:
    """Unguided samples (classes * count, 3, 32, 32) in [0, 1], by class; noise keyed by (seed, class, number)."""
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for name in names:
        generators = [generator_for(seed, f"sample of {name}", index) for index in range(count)]
        rows.append(pipeline(class_labels=[name] * count, generator=generators, output_type="pt").images)
    return torch.cat(rows)


def run_mode(
    name: str, pipeline: Path, drawings: Path, output: Path, judge: Judge, more: Sequence[str] = (), seed: int = 0
) -> tuple[ModeResult, torch.Tensor]:
    """Fine-tune, load what was released, sample and judge; => the result, and samples class by class."""
    mode = MODES[name]
    words = [
        f"pipeline={pipeline}", f"data.path={drawings}", "data.image_size=32", f"output_dir={output / name}",
        "device=cpu", "precision=fp32", "gradient_checkpointing=false", "num_workers=0", "sample.every_steps=0",
        "micro_batch_size=null", f"seed={seed}", *_SHARED, *mode.words, *more,
    ]  # fmt: skip
    settings = dict(word.split("=", 1) for word in words)  # the last word about a key counts
    started = time.perf_counter()
    released = finetune.train(load_finetune_config(mode.preset, [f"{key}={value}" for key, value in settings.items()]))
    seconds = time.perf_counter() - started
    adapter = released / "pytorch_lora_weights.safetensors"
    tuned: Any = repagen.ClassToImagePipeline.from_pretrained(pipeline if adapter.is_file() else released)
    if adapter.is_file():
        tuned.load_lora_weights(released)
    new = list(mode.shapes.strokes)
    names = [*new, *DIGITS]
    images = sample(tuned, names, seed=seed)
    by_class = judge.shares(images, names)
    size_share = fused_difference = None
    if adapter.is_file():
        weights = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
        size_share = adapter.stat().st_size / weights.stat().st_size
        tuned.fuse_lora()
        fused = sample(tuned, new, SHOWN, seed)
        unfused = torch.cat([part[:SHOWN] for part in images.chunk(len(names))[: len(new)]])
        fused_difference = (fused - unfused).abs().max().item()
    result = ModeResult(
        mode=name,
        new_agreement=float(np.mean([by_class[shape] for shape in new])),
        old_agreement=float(np.mean([by_class[digit] for digit in DIGITS])),
        by_class=by_class,
        size_share=size_share,
        fused_difference=fused_difference,
        seconds=round(seconds, 1),
    )
    return result, images


def show(mode: Mode, drawings: Path, images: torch.Tensor, path: Path) -> None:
    """Write ten drawings of each new class, and below ten samples of each class, in rows."""
    drawn = [
        np.asarray(Image.open(drawings / name / f"{k:02d}.png")) for name in mode.shapes.strokes for k in range(SHOWN)
    ]
    rows = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255
    samples = [part[:SHOWN] for part in images.split(SAMPLES_PER_CLASS)]
    save_image_grid(torch.cat([rows, *samples]), path, columns=SHOWN, gap_px=2)


def main() -> None:
    """Run the modes and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="the digits pipeline, of `repagen quickstart`")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_digits"))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seed", type=int, default=0, help="of drawings, judge, training and samples")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of every mode")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    judges = {kind: Judge.train(shapes, args.seed) for kind, shapes in (("forms", FORMS), ("strokes", STROKES))}
    base: Any = repagen.ClassToImagePipeline.from_pretrained(args.pipeline)
    digits = sample(base, DIGITS, seed=args.seed)
    before = {kind: float(np.mean(list(judge.shares(digits, DIGITS).values()))) for kind, judge in judges.items()}
    results = []
    for name in args.modes:
        mode = MODES[name]
        kind = "forms" if mode.shapes is FORMS else "strokes"
        drawings = write_drawings(mode.shapes, args.output / f"drawings_{kind}", args.seed)
        result, images = run_mode(name, args.pipeline, drawings, args.output, judges[kind], args.set, args.seed)
        results.append(asdict(result))
        print(json.dumps(results[-1]), flush=True)
        show(mode, drawings, images, args.output / f"{name}.png")
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "repagen": repagen.__version__},
        "judge_accuracy": {kind: judge.accuracy for kind, judge in judges.items()},
        "old_agreement_before": before,
        "seed": args.seed,
        "samples_per_class": SAMPLES_PER_CLASS,
        "modes": results,
    }
    (args.output / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
