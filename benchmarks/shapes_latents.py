"""RAE latents against VAE latents on drawn shapes: how fast does the same text-to-image generator learn in each?

    python benchmarks/shapes_latents.py [--output DIR] [--seeds 0 1 2] [--steps N] [--rae FOLDER]

- RAE: the bundled encoder's frozen tokens with the decoder of the preset `shapes_decoder`, 96 x 4 x 4;
- VAE: an AutoencoderKL trained by the preset `shapes_kl`, 4 x 8 x 8.

In both, the generator of the preset `shapes_text_to_image` sees the same scenes and captions in the same batches with
the same seeds, in as many steps, with 16 tokens of the same width (patches of 1 and of 2): networks and compute differ
in the first and last layers alone. Times are shifted by RAE's rule, sqrt(C h w / base), with the VAE's 4 x 8 x 8 as
base, as in the preset: 2.449 for the RAE and 1 for the VAE. A latent has one autoencoder for all seeds.

After every so many images the averaged weights draw fresh prompts of one and of two objects, and the checker reads the
pictures: shape and colour right of one object, and shapes, colours, positions and count right of two. What the checker
reads in reconstructions of held-out scenes is what a perfect generator could reach in a latent.

A finished part is not run again. Writes one JSON per latent and seed, results.json and curves.png (mean, lowest
and highest of the seeds) to --output.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import repagen
from repagen.config import load_config
from repagen.data import DataConfig, open_image_dataset
from repagen.data.shapes import ShapesDataset, check_scene
from repagen.evaluation.samples import to_uint8
from repagen.evaluation.text_to_image.shapes import SceneGroup, ShapesPrompts
from repagen.flow.time import TimeShift
from repagen.models.latents import images_to_latents, latent_shape, latents_to_images
from repagen.quickstart.figures import save_score_plot
from repagen.training import decoder, text_to_image
from repagen.training.decoder_config import DecoderConfig
from repagen.training.frozen import load_target_encoder
from repagen.training.latent_cache import CacheConfig, cache_latents
from repagen.training.latent_identity import open_autoencoder
from repagen.training.shapes_curve import score_curve
from repagen.training.text_to_image_config import TextToImageConfig

IMAGE_SIZE, TOKENS = 32, 4  # tokens in a row and in a column
BASE_DIMENSION = 256  # of the latent whose times are not shifted, the VAE's
GROUPS = [SceneGroup("seen", 1), SceneGroup("seen", 2)]
# Name of a curve => what of the score it shows.
SHOWN = {"one object": "seen, 1 object: kind", "two objects": "seen, 2 objects: all four"}
Curve = dict[str, dict[str, float]]
"""Training images seen, as JSON has them => every share of the score by name."""


@dataclass(frozen=True)
class Latent:
    """One of the latents.

    Attributes:
        preset: that trains its autoencoder.
        patch_size: of the generator, which gives it the same tokens in each latent.
    """

    preset: str
    patch_size: int


LATENTS = {"RAE": Latent("shapes_decoder", 1), "VAE": Latent("shapes_kl", 2)}


@dataclass(frozen=True)
class Plan:
    """What is the same for both latents.

    Attributes:
        output: folder of everything.
        steps, batch_size, num_images: of each generator; scenes are drawn once and cached.
        points: how often each is scored, at even distances.
        num_prompts: fresh ones of each sort, for a point.
        num_inference_steps: of their sampling.
        num_reconstructions: held-out scenes that say how good an autoencoder is.
        autoencoder_words, words: further `key=value` settings of autoencoders and generators.
    """

    output: Path
    steps: int = 2400
    batch_size: int = 64
    num_images: int = 20000
    points: int = 8
    num_prompts: int = 100
    num_inference_steps: int = 25
    num_reconstructions: int = 300
    autoencoder_words: Sequence[str] = ()
    words: Sequence[str] = ()


def train_autoencoder(plan: Plan, name: str) -> Path:
    """Train the autoencoder of a latent, or find it trained; its folder."""
    run = plan.output / f"autoencoder-{name}"
    if (run / "autoencoder" / "config.json").is_file():
        return run / "autoencoder"
    words = [f"output_dir={run}", "progress_bar=false", *plan.autoencoder_words]
    return decoder.train(load_config(DecoderConfig, LATENTS[name].preset, words))


@torch.no_grad()
def reconstruction_facts(folder: Path, num_images: int) -> dict[str, Any]:
    """Shape of the latent, and what is left of held-out scenes in it."""
    autoencoder = open_autoencoder(str(folder))
    data = ShapesDataset(DataConfig(kind="shapes", subset="validation", image_size=IMAGE_SIZE, num_images=num_images))
    images = torch.stack([data[index]["image"] for index in range(num_images)])
    generators = [torch.Generator().manual_seed(index) for index in range(num_images)]
    drawn = latents_to_images(autoencoder, images_to_latents(autoencoder, images, generator=generators))
    mean_square = (drawn - images).square().flatten(1).mean(1)
    pictures = to_uint8(drawn, "round").permute(0, 2, 3, 1).numpy()
    right = [check_scene(picture, data.scene(index)).right for index, picture in enumerate(pictures)]
    return {
        "latent": list(latent_shape(autoencoder, IMAGE_SIZE)),
        "psnr_db": (-10 * mean_square.log10()).mean().item(),
        "reconstructions_right": sum(right) / num_images,
    }


def generator_config(plan: Plan, name: str, seed: int, autoencoder: Path) -> TextToImageConfig:
    """The preset's generator in one of the latents."""
    shape = latent_shape(open_autoencoder(str(autoencoder)), IMAGE_SIZE)
    words = [
        f"output_dir={plan.output / f'generator-{name}-{seed}-{plan.steps}'}",
        f"seed={seed}", f"max_steps={plan.steps}", f"global_batch_size={plan.batch_size}",
        f"autoencoder.path={autoencoder}", "data.kind=latents", f"data.path={plan.output / f'latents-{name}'}",
        f"transformer.patch_size={LATENTS[name].patch_size}",
        f"flow.shift={TimeShift.for_latent_shape(shape, BASE_DIMENSION).alpha}",
        f"checkpoint.every_steps={plan.steps // plan.points}", f"checkpoint.keep={plan.points + 1}",
        "sample.every_steps=0", "progress_bar=false", *plan.words,
    ]  # fmt: skip
    return load_config(TextToImageConfig, "shapes_text_to_image", words)


def cache(plan: Plan, config: TextToImageConfig) -> None:
    """Keep latents and captions of the training scenes, and what they are aligned to, once for all seeds."""
    if (Path(str(config.data.path)) / "manifest.json").is_file():
        return
    scenes = open_image_dataset(
        DataConfig(kind="shapes", subset="train", image_size=IMAGE_SIZE, num_images=plan.num_images)
    )
    encoders = [load_target_encoder(it, (TOKENS, TOKENS), "alignment.targets") for it in config.alignment.targets]
    autoencoder = open_autoencoder(config.autoencoder.path)
    cache_latents(autoencoder, scenes, str(config.data.path), encoders=encoders, config=CacheConfig(batch_size=64))


def run_arm(plan: Plan, name: str, seed: int, autoencoder: Path) -> dict[str, Any]:
    """Train and score one generator, or read what was found."""
    path = plan.output / "found" / f"{name}-{seed}-{plan.steps}.json"
    if not path.is_file():
        config = generator_config(plan, name, seed, autoencoder)
        cache(plan, config)
        started = time.perf_counter()
        pipeline = text_to_image.train(config)
        seconds = time.perf_counter() - started
        prompts = ShapesPrompts(plan.num_prompts, 0, GROUPS)
        scores = score_curve(config, pipeline, prompts, num_inference_steps=plan.num_inference_steps)
        transformer = repagen.TextToImagePipeline.from_pretrained(pipeline).transformer
        found = {
            "latent": name, "seed": seed, "steps": plan.steps, "shift": config.flow.shift,
            "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
            "training_seconds": round(seconds, 1),
            "curve": {seen: score.metrics() for seen, score in scores.items()},
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def over_seeds(curves: Sequence[Curve], metric: str) -> dict[int, tuple[float, float, float]]:
    """Images seen => mean, lowest and highest share of the seeds."""
    shares = {int(seen): [curve[seen][metric] for curve in curves] for seen in curves[0]}
    return {seen: (sum(them) / len(them), min(them), max(them)) for seen, them in shares.items()}


def compare(plan: Plan, seeds: Sequence[int], autoencoders: dict[str, Path]) -> dict[str, Any]:
    """Run all seeds in both latents; => what came out, also as OUTPUT/curves.png."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in autoencoders}
    for seed in seeds:  # seed by seed, so that a stopped run has both latents of the seeds it finished
        for name, folder in autoencoders.items():
            runs[name].append(run_arm(plan, name, seed, folder))
    means = {
        f"{name}, {label}": over_seeds([run["curve"] for run in found], metric)
        for name, found in runs.items()
        for label, metric in SHOWN.items()
    }
    save_score_plot(means, plan.output / "curves.png")
    return {
        "autoencoders": {
            name: reconstruction_facts(folder, plan.num_reconstructions) for name, folder in autoencoders.items()
        },
        "means": {name: {seen: list(values) for seen, values in curve.items()} for name, curve in means.items()},
        "runs": [run for found in runs.values() for run in found],
    }


def table(means: dict[str, dict[int, list[float]]]) -> str:
    """A Markdown table: a row for each curve, a column for each number of images seen."""
    seen = list(next(iter(means.values())))
    lines = [f"| images seen | {' | '.join(f'{count:,}' for count in seen)} |", "| --- " * (len(seen) + 1) + "|"]
    for name, curve in means.items():
        cells = [f"{100 * mean:.1f} ({100 * low:.0f} to {100 * high:.0f})" for mean, low, high in curve.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/shapes_latents"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of each generator, a multiple of the points")
    parser.add_argument("--points", type=int, default=Plan.points, help="of each curve")
    parser.add_argument("--num-images", type=int, default=Plan.num_images, help="training scenes")
    parser.add_argument("--num-prompts", type=int, default=Plan.num_prompts, help="fresh ones of each sort")
    parser.add_argument("--rae", type=Path, help="a trained autoencoder, in place of one by shapes_decoder")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of both generators"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        args.output, args.steps, points=args.points, num_images=args.num_images, num_prompts=args.num_prompts,
        words=args.set,
    )  # fmt: skip
    given = {"RAE": args.rae} if args.rae else {}
    autoencoders = {name: given.get(name) or train_autoencoder(plan, name) for name in LATENTS}
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "repagen": repagen.__version__},
        "batch_size": plan.batch_size,
        "num_images": plan.num_images,
        "num_prompts": plan.num_prompts,
        "num_inference_steps": plan.num_inference_steps,
        "num_reconstructions": plan.num_reconstructions,
        "settings": list(plan.words),
        **compare(plan, args.seeds, autoencoders),
    }
    (args.output / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(record["means"]))


if __name__ == "__main__":
    main()
