"""How the score of shapes rises in a training of text to image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repagen.evaluation.text_to_image.shapes import ShapesPrompts, ShapesScore, evaluate_shapes
from repagen.pipelines.text_to_image import TextToImagePipeline
from repagen.training.checkpoint import CheckpointFolder, read_checkpoint
from repagen.training.text_to_image_config import TextToImageConfig


def score_curve(
    config: TextToImageConfig, pipeline_folder: Path, prompts: ShapesPrompts, **options: Any
) -> dict[int, ShapesScore]:
    """Score the averaged weights of every checkpoint that a run kept.

    Args:
        config: of the run.
        pipeline_folder: what it released.
        prompts: what each is asked for, with the same noise.
        options: of `evaluate_shapes`.

    Returns:
        Training images seen => score, rising.

    Raises:
        UserError: a checkpoint is damaged, or an option does not fit the pipeline.
    """
    pipeline = TextToImagePipeline.from_pretrained(pipeline_folder)
    scores = {}
    for path in reversed(CheckpointFolder(Path(config.output_dir) / "checkpoints").paths()):
        checkpoint = read_checkpoint(path)
        pipeline.transformer.load_state_dict(checkpoint.part("ema")["shadow"])
        seen = checkpoint.step * config.global_batch_size
        scores[seen] = evaluate_shapes(pipeline, prompts, **options).score
    return scores
