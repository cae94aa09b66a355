"""Pictures that are no squares: the pipeline of drawn shapes goes on in aspect buckets.

    python benchmarks/shapes_buckets.py [--output DIR] [--pipeline FOLDER] [--decoder-steps N] [--steps N]

The bundled pipeline was trained on squares of 32 px alone, decoder and generator. Both go on from there by the
programs that users run, on scenes drawn in 1:1, 3:2, 2:3 and 16:9 (`data.buckets`): the decoder with
`autoencoder.pretrained`, the generator with `transformer.pretrained`. Encoder and statistics stay, and so do the
latents.

The judge is the exact checker of the shapes. In every size, and in 9:16, which nothing is trained on, it says

- which reconstructions of held-out scenes are right: what a perfect generator could reach;
- which pictures of fresh prompts of one and of two objects are right, drawn from the same noise by the pipeline as
  bundled, with the decoder that went on, and with the generator that went on, too.

A part that is finished is not trained again. Writes OUTPUT/results.json, OUTPUT/table.md, and OUTPUT/sizes.png: the
same prompts in every size, as bundled and below with both parts that went on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import repagen
from repagen.config import load_config
from repagen.data import DataConfig, ShapesDataset, shapes_pipeline_path
from repagen.data.shapes import ScenePrompt, check_picture, check_scene
from repagen.evaluation.samples import to_uint8
from repagen.evaluation.text_to_image.shapes import SceneGroup, ShapesPrompts, ShapesScore, Share
from repagen.models.latents import images_to_latents, latents_to_images
from repagen.pipelines.grid import image_grid
from repagen.randomness import generator_for
from repagen.training import decoder, text_to_image
from repagen.training.decoder_config import DecoderConfig
from repagen.training.latent_identity import open_autoencoder
from repagen.training.text_to_image_config import TextToImageConfig

Size = tuple[int, int]
TOKEN_PX = 8
TRAINED: dict[str, Size] = {"1:1": (32, 32), "3:2": (32, 48), "2:3": (48, 32), "16:9": (32, 56)}
"""Ratio of width to height => height and width in pixels; 16:9 is 7:4, the nearest in tokens of 8 px."""
SIZES = {**TRAINED, "9:16": (56, 32)}
STAGES = ("as bundled", "decoder went on", "both went on")
GROUPS = [SceneGroup("seen", 1), SceneGroup("seen", 2)]
SHOWN_PROMPTS = 8
BUCKETS = [f"data.buckets={[list(size) for size in TRAINED.values()]}", f"data.bucket_step={TOKEN_PX}"]
COMMON = [*BUCKETS, "device=cpu", "num_workers=0", "sample.every_steps=0", "progress_bar=false"]


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        output: folder of everything.
        pipeline: that goes on.
        decoder_steps, steps: of decoder and generator, of `batch_size` images each.
        num_prompts: fresh ones of each sort.
        num_reconstructions: held-out scenes.
        decoder_words, words: further `key=value` settings of decoder and generator.
    """

    output: Path
    pipeline: Path
    decoder_steps: int = 800
    steps: int = 1500
    batch_size: int = 64
    num_prompts: int = 100
    num_reconstructions: int = 200
    decoder_words: Sequence[str] = ()
    words: Sequence[str] = ()


def train_decoder(plan: Plan) -> Path:
    """Let the pipeline's decoder go on in the buckets; => folder of the autoencoder."""
    words = [
        f"output_dir={plan.output / 'decoder'}", f"max_steps={plan.decoder_steps}",
        f"global_batch_size={plan.batch_size}", f"autoencoder.pretrained={plan.pipeline / 'vae'}",
        "autoencoder.encoder=null", "autoencoder.decoder_patch_size=null", "autoencoder.decoder=vit-xl",
        "statistics=false", "optimizer.learning_rate=1.5e-3", *COMMON, *plan.decoder_words,
    ]  # fmt: skip
    return decoder.train(load_config(DecoderConfig, "shapes_decoder", words))


def train_generator(plan: Plan, autoencoder: Path) -> Path:
    """Let the pipeline's generator go on in the buckets; => folder of the new pipeline."""
    words = [
        f"output_dir={plan.output / 'generator'}", f"max_steps={plan.steps}",
        f"global_batch_size={plan.batch_size}", f"autoencoder.path={autoencoder}", "alignment={}",
        f"transformer.pretrained={plan.pipeline}", "text.encoder=null", "text.max_length=null",
        *(f"transformer.{key}=null" for key in ("architecture", "size", "patch_size", "prediction")),
        "transformer.overrides={}", "optimizer.learning_rate=1e-3", "optimizer.schedule.warmup_steps=50",
        "ema.decay=0.99", *COMMON, *plan.words,
    ]  # fmt: skip
    return text_to_image.train(load_config(TextToImageConfig, "shapes_text_to_image", words))


def as_pictures(images: torch.Tensor) -> Any:
    """Images (B, 3, H, W) in [0, 1] as the checker reads them, (B, H, W, 3) uint8."""
    return to_uint8(images, "round").permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def reconstruction_facts(autoencoder: Any, size: Size, count: int) -> dict[str, Any]:
    """What is left of held-out scenes, drawn in a size, in their latents."""
    data = ShapesDataset(
        DataConfig(
            kind="shapes", subset="validation", image_size=min(size), num_images=count, buckets=[list(size)],
            bucket_step=TOKEN_PX,
        )
    )  # fmt: skip
    images = torch.stack([data[index]["image"] for index in range(count)])
    drawn = latents_to_images(autoencoder, images_to_latents(autoencoder, images, sample_posterior=False))
    right = [check_scene(picture, data.scene(index)).right for index, picture in enumerate(as_pictures(drawn))]
    mean_square = (drawn - images).square().flatten(1).mean(1)
    return {"psnr_db": (-10 * mean_square.log10()).mean().item(), **share_facts(Share(sum(right), count))}


def share_facts(share: Share) -> dict[str, Any]:
    """A share and its 95 % interval, as JSON has them."""
    return {"share": share.value, "confidence_95": list(share.interval)}


def draw_latents(
    pipeline: Any, prompts: Sequence[ScenePrompt], size: Size, batch_size: int = 50, **options: Any
) -> torch.Tensor:
    """Sample latents (N, C, h, w) of prompts in a size; noise is a function of the prompt's number and the size."""
    pipeline.set_progress_bar_config(disable=True)
    found = []
    for start in range(0, len(prompts), batch_size):
        texts = [prompt.text for prompt in prompts[start : start + batch_size]]
        generators = [generator_for(0, "noise in buckets", start + place) for place in range(len(texts))]
        call = {"height": size[0], "width": size[1], "generator": generators, "output_type": "latent", **options}
        found.append(pipeline(texts, **call).images)
    return torch.cat(found)


def score(pictures: Any, asked: Sequence[tuple[SceneGroup, ScenePrompt]]) -> ShapesScore:
    """Read pictures (N, H, W, 3) uint8 of prompts."""
    verdicts = [check_picture(picture, prompt) for picture, (_, prompt) in zip(pictures, asked, strict=True)]
    return ShapesScore.of([group for group, _ in asked], verdicts)


@torch.no_grad()
def draw_in_every_size(
    bundled: Any, gone_on: Any, asked: Sequence[tuple[SceneGroup, ScenePrompt]], **options: Any
) -> dict[str, dict[str, torch.Tensor]]:
    """Ratio => stage => images (N, 3, H, W) in [0, 1] of the prompts, from the same noise at every stage."""
    prompts = [prompt for _, prompt in asked]
    drawn = {}
    for ratio, size in SIZES.items():
        before = draw_latents(bundled, prompts, size, **options)
        after = draw_latents(gone_on, prompts, size, **options)
        pairs = ((bundled.vae, before), (gone_on.vae, before), (gone_on.vae, after))
        images = [latents_to_images(autoencoder, latents) for autoencoder, latents in pairs]
        drawn[ratio] = dict(zip(STAGES, images, strict=True))
    return drawn


def prompt_facts(
    drawn: dict[str, dict[str, torch.Tensor]], asked: Sequence[tuple[SceneGroup, ScenePrompt]]
) -> dict[str, Any]:
    """Ratio => stage => sort of scenes => shares that are right in shape and colour, and in all four."""

    def facts(images: torch.Tensor) -> dict[str, Any]:
        shares = score(as_pictures(images), asked).shares
        names = ("kind", "all four")
        return {str(group): {name: share_facts(found[name]) for name in names} for group, found in shares.items()}

    return {ratio: {stage: facts(images) for stage, images in stages.items()} for ratio, stages in drawn.items()}


def show(drawn: dict[str, dict[str, torch.Tensor]], path: Path) -> None:
    """Write two rows for each size: the first prompts as bundled, and below with what went on."""
    rows = []
    for stages in drawn.values():
        for stage in (STAGES[0], STAGES[-1]):
            images = stages[stage]
            chosen = images[:: max(1, len(images) // SHOWN_PROMPTS)][:SHOWN_PROMPTS]
            rows.append(image_grid(chosen, columns=len(chosen), enlarge=2, gap_px=4))
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height + 4 for row in rows)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + 4
    sheet.save(path, optimize=True)


def run(plan: Plan, **options: Any) -> dict[str, Any]:
    """Train, draw and judge; => what came out.

    Args:
        plan: what is run.
        options: sampling options; those not given are the pipeline's.
    """
    autoencoder, decoder_seconds = timed(lambda: train_decoder(plan))
    pipeline, seconds = timed(lambda: train_generator(plan, autoencoder))
    bundled: Any = repagen.TextToImagePipeline.from_pretrained(plan.pipeline)
    gone_on: Any = repagen.TextToImagePipeline.from_pretrained(pipeline)
    autoencoders = {STAGES[0]: bundled.vae, STAGES[1]: open_autoencoder(str(autoencoder))}
    asked = list(ShapesPrompts(plan.num_prompts, 0, GROUPS))
    drawn = draw_in_every_size(bundled, gone_on, asked, **options)
    show(drawn, plan.output / "sizes.png")
    return {
        "pixels": {ratio: list(size) for ratio, size in SIZES.items()},
        "trained_on": list(TRAINED),
        "decoder_steps": plan.decoder_steps,
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "prompts_of_each_sort": plan.num_prompts,
        "reconstructions": {
            ratio: {
                stage: reconstruction_facts(found, size, plan.num_reconstructions)
                for stage, found in autoencoders.items()
            }
            for ratio, size in SIZES.items()
        },
        "prompts": prompt_facts(drawn, asked),
        "decoder_seconds": decoder_seconds,
        "generator_seconds": seconds,
    }


def timed(action: Callable[[], Path]) -> tuple[Path, dict[str, float]]:
    """What an action gives, and its seconds by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    found = action()
    seconds = {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}
    return found, {name: round(value, 1) for name, value in seconds.items()}


def table(record: dict[str, Any]) -> str:
    """Markdown: a row for each size and stage; per cent right."""

    def percent(facts: dict[str, Any]) -> str:
        low, high = facts["confidence_95"]
        return f"{100 * facts['share']:.0f} ({100 * low:.0f} to {100 * high:.0f})"

    asked = [(str(group), name) for group in GROUPS for name in ("kind", "all four")]
    names = [f"{group.removeprefix('seen, ')}: {name}" for group, name in asked]
    lines = [f"| size | | reconstructed | {' | '.join(names)} |", "| --- " * (len(names) + 3) + "|"]
    for ratio, (height, width) in record["pixels"].items():
        for stage in STAGES:
            facts = record["reconstructions"][ratio].get(stage)
            limit = "" if facts is None else f"{percent(facts)}, {facts['psnr_db']:.1f} dB"
            shares = [percent(record["prompts"][ratio][stage][group][name]) for group, name in asked]
            lines.append(f"| {ratio} ({width} x {height}) | {stage} | {limit} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run it and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/shapes_buckets"))
    parser.add_argument(
        "--pipeline", type=Path, default=shapes_pipeline_path(), help="of shapes, 32 px (the bundled one)"
    )
    parser.add_argument("--decoder-steps", type=int, default=Plan.decoder_steps)
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of the generator")
    parser.add_argument("--num-prompts", type=int, default=Plan.num_prompts, help="of each sort (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args.output.mkdir(parents=True, exist_ok=True)
    plan = Plan(args.output, args.pipeline, args.decoder_steps, args.steps, num_prompts=args.num_prompts)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "repagen": repagen.__version__},
        **run(plan),
    }
    (args.output / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (args.output / "table.md").write_text(table(record), encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
