"""The quickstart from prompts to pictures: a shipped text-to-image pipeline judged, and a small one from scratch.

Prompts ask for drawn scenes of shapes, and a checker that needs no network reads whether the pictures show them. The
second part trains by the program and preset of real training, `text_to_image` and `shapes_text_to_image`, in the
latents and with the frozen encoders of the shipped pipeline, but for minutes instead of hours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from repagen.config import load_config
from repagen.data import shapes_pipeline_path
from repagen.data.shapes import check_picture
from repagen.data.shapes.prompts import ScenePrompt
from repagen.errors import UserError
from repagen.evaluation.reporting import aligned
from repagen.evaluation.text_to_image.prompted import PipelinePromptImages
from repagen.evaluation.text_to_image.shapes import GROUPS, ShapesPrompts, ShapesScore, evaluate_shapes
from repagen.pipelines.text_to_image import TextToImagePipeline
from repagen.quickstart.clock import Clock, readable_seconds
from repagen.quickstart.figures import save_score_plot, save_sheet
from repagen.training import text_to_image
from repagen.training.shapes_curve import score_curve
from repagen.training.text_to_image_config import TextToImageConfig

SEEN_GROUPS = [group for group in GROUPS if group.combinations == "seen" and group.num_objects < 3]
PROMPTS_OF_A_GROUP, PROMPTS_OF_A_POINT, SHEET_PROMPTS = 125, 64, 24
SCRATCH_STEPS, POINTS = 1200, 6
BATCH_SIZE = 64


def run(output: Path, seed: int) -> str:
    """Run the quickstart and describe what it made.

    Args:
        output: folder of everything.
        seed: of scenes, noise, weights and batches.

    Raises:
        UserError: the folder cannot be used, or was begun with another seed.
    """
    config = scratch_config(output / "generator", seed)
    _refuse_other_seed(output, config)
    clock = Clock()
    output.mkdir(parents=True, exist_ok=True)
    clock.begin("shipped pipeline", "shipped pipeline: load it, draw fresh prompts, read the pictures")
    pipeline = TextToImagePipeline.from_pretrained(shapes_pipeline_path())
    prompts = ShapesPrompts(PROMPTS_OF_A_GROUP, seed)
    shipped = evaluate_shapes(pipeline, prompts, batch_size=BATCH_SIZE)
    write_sheet(pipeline, replace(prompts, num_prompts=SHEET_PROMPTS // len(GROUPS)), output / "prompts.png")

    clock.begin("training", "text_to_image: train a generator from scratch in the same latents")
    folder = text_to_image.train(config)
    clock.begin("curve", "its score after more and more images")
    prompts_of_a_point = ShapesPrompts(PROMPTS_OF_A_POINT, seed, SEEN_GROUPS)
    curve = score_curve(config, folder, prompts_of_a_point, batch_size=BATCH_SIZE)
    save_score_plot(
        {
            f"{group}: {name}": {
                seen: (share.value, *share.interval)
                for seen, score in curve.items()
                for share in [score.shares[group][name]]
            }
            for group, name in zip(SEEN_GROUPS, ("kind", "all four"), strict=True)
        },
        output / "score.png",
    )
    write_sheet(
        TextToImagePipeline.from_pretrained(folder),
        ShapesPrompts(SHEET_PROMPTS // 2, seed, SEEN_GROUPS),
        output / "scratch.png",
    )
    clock.begin("")
    record = {
        "shipped": shipped.as_dict(),
        "from_scratch": {seen: score.metrics() for seen, score in curve.items()},
        "seconds": clock.seconds,
    }
    (output / "metrics.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return _summary(output, folder, shipped.score, curve, clock)


def _refuse_other_seed(output: Path, config: TextToImageConfig) -> None:
    """Refuse, before anything is overwritten, what the training would refuse after the first part."""
    begun = Path(config.output_dir) / "config.yaml"
    if begun.is_file() and (before := load_config(TextToImageConfig, str(begun), []).seed) != config.seed:
        raise UserError(
            f"--seed is {config.seed}, but {output} was begun with --seed {before}; give that one, or another --output"
        )


def write_sheet(pipeline: TextToImagePipeline, prompts: ShapesPrompts, path: Path) -> None:
    """Draw prompts and write the pictures with their prompts below, in red where a picture does not show them."""
    asked: list[ScenePrompt] = [prompt for _, prompt in prompts]
    drawn = PipelinePromptImages(pipeline, prompts.prompt_set())
    images: list[Any] = drawn.load(range(len(asked)))
    pictures = [image.permute(1, 2, 0).numpy() for image in images]
    right = [check_picture(picture, prompt).right for picture, prompt in zip(pictures, asked, strict=True)]
    save_sheet(pictures, [prompt.text for prompt in asked], right, path)


def scratch_config(output: Path, seed: int, overrides: Mapping[str, Any] | None = None) -> TextToImageConfig:
    """Say how a generator is trained in the latents of the shipped pipeline.

    Args:
        output: folder of the run.
        seed: of the run.
        overrides: key => value of other settings, for example fewer steps.
    """
    settings = {
        "output_dir": output,
        "seed": seed,
        "autoencoder.path": shapes_pipeline_path(),
        "autoencoder.subfolder": "vae",
        "max_steps": SCRATCH_STEPS,
        "checkpoint.every_steps": SCRATCH_STEPS // POINTS,
        "checkpoint.keep": POINTS,
        "sample.every_steps": 0,
        **(overrides or {}),
    }
    return load_config(
        TextToImageConfig, "shapes_text_to_image", [f"{key}={value}" for key, value in settings.items()]
    )


def _percent(score: ShapesScore, attribute: str, num_objects: int) -> str:
    return f"{score.share(attribute, num_objects).value:.1%}"


def _summary(output: Path, folder: Path, shipped: ShapesScore, curve: dict[int, ShapesScore], clock: Clock) -> str:
    rising = ", ".join(f"{_percent(score, 'kind', 1)} ({seen:,})" for seen, score in curve.items())
    last = list(curve.values())[-1]
    return f"""
shipped pipeline, pictures of fresh prompts:
{aligned(shipped.rows())}

from scratch       one object: shape and colour right after images seen: {rising}
                   two objects: shapes, colours and positions right at the end: {_percent(last, "all four", 2)}
wall clock         {readable_seconds(clock.seconds)}
files              {output}/prompts.png, scratch.png, score.png, metrics.json; the new pipeline in {folder}

Next:
  repagen sample --model {shapes_pipeline_path()} --prompt "a red circle above a blue square" --output {output}/more
  repagen recipes"""
