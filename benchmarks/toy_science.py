"""Four questions of the field at toy scale, on the bundled digits, at equal compute.

    python benchmarks/toy_science.py [--output DIR] [--seeds 0 1 2] [--steps N]

- latent: a DiT^DH with REPA in RAE latents of the encoder's last layer, in a multi-layer latent, and in VAE latents;
- alignment: the same DiT^DH in VAE latents without alignment, with REPA, with iREPA;
- guidance: one RAEv2 generator with REPA, sampled without guidance, with classifier-free and with internal guidance.

(REPA is in all arms but those that ask about it: without it so short a training hardly learns the classes.)

Every arm has its own autoencoder and generator per seed; within a question all arms see the same images, batches and
number of steps. Samples are measured by what no arm was trained with: a classifier on the 8x8 pictures, and the
Frechet distance between the 64 pixels of samples and of all real digits; and, beside them, by the Frechet distance in
the bundled encoder, which favours latents and alignments of that encoder.

A finished arm is not run again. Writes one JSON per arm and seed, results.json and table.md to --output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import repagen
from repagen.config import load_config
from repagen.data.digits import digits_encoder_path, digits_to_images, load_digits
from repagen.evaluation.metrics.frechet import frechet_distance
from repagen.evaluation.pipeline_images import PipelineImages
from repagen.quickstart.judge import agreement, to_small, train_digit_classifier
from repagen.training import decoder, generator
from repagen.training.decoder_config import DecoderConfig
from repagen.training.generator_config import GeneratorConfig

NUM_SAMPLES, NUM_INFERENCE_STEPS, BATCH = 500, 25, 100
BATCH_SIZE = 32  # of training
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 95 %, by number of seeds
REPA = "encoder: digits, block: 2, projector_dim: 128"


@dataclass(frozen=True)
class Arm:
    """One answer to one question.

    Attributes:
        question: the heading it stands under.
        autoencoder: preset of the latent.
        words: `key=value` overrides of the preset digits_generator; arms with equal words share one training.
        sampling: arguments of the pipeline call.
    """

    question: str
    autoencoder: str
    words: tuple[str, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)


UNALIGNED = ("alignment.targets=[]",)
ALIGNED = (f"alignment.targets=[{{{REPA}}}]",)
# Four 2x2 patches of a VAE latent in a row and column: as many tokens as the representation latents have.
IN_VAE = ("transformer.patch_size=2",)
RAEV2 = (
    "transformer.architecture=raev2",
    "transformer.size=XL",  # the only published one; every width of it is overridden
    "transformer.overrides={hidden_size: 128, depth: 3, num_heads: 4, head_hidden_size: 160, head_depth: 1, "
    "head_num_heads: 5, base_depth: 1}",
    *ALIGNED,
)
MULTILAYER = "digits_decoder_multilayer"
ARMS = {
    "RAE, last layer": Arm("latent", "digits_decoder", ALIGNED),
    "RAE, mean of three layers": Arm("latent", MULTILAYER, ALIGNED),
    "VAE": Arm("latent", "digits_kl", (*IN_VAE, *ALIGNED)),
    "no alignment": Arm("alignment", "digits_kl", (*IN_VAE, *UNALIGNED)),
    "REPA": Arm("alignment", "digits_kl", (*IN_VAE, *ALIGNED)),
    "iREPA": Arm(
        "alignment",
        "digits_kl",
        (*IN_VAE, f"alignment.targets=[{{{REPA}, projector: conv, loss: spatial_cosine}}]"),
    ),
    "no guidance": Arm("guidance", MULTILAYER, RAEV2),
    "CFG 1.5": Arm("guidance", MULTILAYER, RAEV2, {"guidance_method": "cfg", "guidance_scale": 1.5}),
    "internal guidance 1.5": Arm(
        "guidance", MULTILAYER, RAEV2, {"guidance_method": "internal", "guidance_scale": 1.5}
    ),
}


def folder_name(words: tuple[str, ...] | str) -> str:
    """A folder's name that differs where the words do."""
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:10]


def train_autoencoder(output: Path, preset: str, seed: int) -> Path:
    """Train the autoencoder of a preset, or find it trained; its folder."""
    run = output / f"{preset}-{seed}"
    if not (run / "autoencoder" / "config.json").is_file():
        decoder.train(load_config(DecoderConfig, preset, [f"output_dir={run}", f"seed={seed}", "progress_bar=false"]))
    return run / "autoencoder"


def train_arm(output: Path, arm: Arm, seed: int, steps: int) -> Path:
    """Train autoencoder and generator of an arm, or find them trained; the pipeline's folder."""
    autoencoder = train_autoencoder(output, arm.autoencoder, seed)
    run = output / f"generator-{folder_name((arm.autoencoder, *arm.words))}-{seed}"
    if (run / "pipeline" / "model_index.json").is_file():
        return run / "pipeline"
    words = [
        f"output_dir={run}", f"seed={seed}", f"max_steps={steps}", f"autoencoder.path={autoencoder}",
        f"global_batch_size={BATCH_SIZE}", "sample.every_steps=0", "progress_bar=false", *arm.words,
    ]  # fmt: skip
    return generator.train(load_config(GeneratorConfig, "digits_generator", words))


def draw(pipeline: Path, sampling: dict[str, Any], seed: int) -> torch.Tensor:
    """Samples (N, 3, 32, 32) in [0, 1], rounded to uint8 first as every metric sees them; classes take turns."""
    pipe = repagen.ClassToImagePipeline.from_pretrained(pipeline)
    images = PipelineImages(pipe, NUM_SAMPLES, seed=seed, num_inference_steps=NUM_INFERENCE_STEPS, **sampling)
    rows = [row for start in range(0, NUM_SAMPLES, BATCH) for row in images.load(range(start, start + BATCH))]
    return torch.stack(rows).float() / 255


def judge(samples: torch.Tensor) -> dict[str, float]:
    """What outsiders say about samples of the ten classes in turn."""
    pictures, _ = load_digits("all")
    images = digits_to_images(pictures)
    real = to_small(images)
    train_pictures, train_labels = load_digits("train")
    classifier = train_digit_classifier(
        to_small(digits_to_images(train_pictures)), torch.from_numpy(train_labels), seed=0
    )
    small = to_small(samples)
    encoder = repagen.VisionEncoder.from_pretrained(digits_encoder_path())
    tokens = [torch.cat([encoder(part).tokens.mean(1) for part in group.split(BATCH)]) for group in (samples, images)]
    return {
        "class_agreement": agreement(classifier, small, torch.arange(len(small)) % 10),
        "pixel_frechet_distance": frechet_distance(small.flatten(1), real.flatten(1)),
        "encoder_frechet_distance": frechet_distance(*tokens),
    }


def run_arm(output: Path, name: str, seed: int, steps: int) -> dict[str, float]:
    """Train, sample and judge one arm, or read what was found."""
    arm = ARMS[name]
    path = output / "found" / f"{folder_name(name)}-{seed}.json"
    if not path.is_file():
        found = judge(draw(train_arm(output, arm, seed, steps), arm.sampling, seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"arm": name, "seed": seed, "steps": steps, **found}, indent=2) + "\n")
    return json.loads(path.read_text())


def mean_and_half_width(values: list[float]) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95 % interval; 0 of a single seed."""
    if len(values) < 2:
        return values[0], 0.0
    return statistics.mean(values), T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def mean_and_interval(values: list[float]) -> str:
    """Mean and 95 % interval of the mean over seeds."""
    mean, half = mean_and_half_width(values)
    return f"{mean:.3f} ± {half:.3f}" if len(values) > 1 else f"{mean:.3f}"


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """One Markdown table a question: mean and 95 % interval over the seeds."""
    columns = {
        "class_agreement": "class agreement",
        "pixel_frechet_distance": "Fréchet distance, 64 pixels",
        "encoder_frechet_distance": "Fréchet distance, digits encoder",
    }
    lines = []
    for question in dict.fromkeys(arm.question for arm in ARMS.values()):
        lines += ["", f"| {question} | {' | '.join(columns.values())} |", "| --- " * (len(columns) + 1) + "|"]
        for name, rows in results.items():
            if ARMS[name].question == question:
                cells = [mean_and_interval([row[key] for row in rows]) for key in columns]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines[1:]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/toy_science"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for seed in args.seeds:  # seed by seed, so that a stopped run has every arm of the seeds it finished
        for name in ARMS:
            results[name].append(run_arm(args.output, name, seed, args.steps))
    record = {"steps": args.steps, "seeds": args.seeds, "torch": torch.__version__, "results": results}
    (args.output / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.output / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
