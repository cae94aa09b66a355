"""Prior preservation (DreamBooth 2208.12242, section 3.3): a pipeline's own images, to train on beside new ones."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from repagen.data import DataConfig, ImageDataset, open_image_dataset
from repagen.files import put_file
from repagen.models.modes import in_eval_mode
from repagen.randomness import generator_for
from repagen.training.finetune_config import FinetuneConfig
from repagen.training.run import Run

_FACTS = "prior.json"


def prior_dataset(run: Run, config: FinetuneConfig, pipeline: Any, classes: Sequence[int], facts: Any) -> ImageDataset:
    """The pipeline's own images of some of its classes: its labels are these, in this order.

    They are drawn where they are not there yet, by all processes; an interrupted drawing goes on. Each image's noise
    depends on (seed, class, number) alone.

    Args:
        run: in whose folder they are kept.
        config: how many there are, and how they are drawn.
        pipeline: as it was before fine-tuning.
        classes: its ids.
        facts: what identifies its networks; images of others are drawn anew.

    Raises:
        UserError: the folder cannot be used, or images in it were damaged.
    """
    folder = run.folder / "prior"
    with run.aside(), in_eval_mode(pipeline.transformer, pipeline.vae):
        run.on_main(lambda: _begin(folder, config, classes, facts))
        _draw_missing(run, folder, config, pipeline, classes)
        run.on_main(lambda: None)  # all processes have drawn their share
    data = DataConfig(path=str(folder), image_size=config.data.image_size, horizontal_flip=config.data.horizontal_flip)
    return open_image_dataset(data)


def _begin(folder: Path, config: FinetuneConfig, classes: Sequence[int], facts: Any) -> None:
    """Make the folder, or keep it where it holds images that were made alike."""
    settings = {"seed": config.seed, "classes": list(classes), "prior": asdict(config.prior), "pipeline": facts}
    made_of = json.dumps(settings)
    if not (folder / _FACTS).is_file() or (folder / _FACTS).read_text(encoding="utf-8") != made_of:
        shutil.rmtree(folder, ignore_errors=True)
        for number in range(len(classes)):
            _path(folder, number, 0).parent.mkdir(parents=True)
        put_file(folder / _FACTS, made_of.encode())


def _draw_missing(run: Run, folder: Path, config: FinetuneConfig, pipeline: Any, classes: Sequence[int]) -> None:
    size = config.prior.forward_batch_size
    pairs = [(number, index) for number in range(len(classes)) for index in range(config.prior.images_per_class)]
    batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    own = batches[run.accelerator.process_index :: run.plan.processes]
    missing = [batch for batch in own if not all(_path(folder, *pair).is_file() for pair in batch)]
    shown = config.progress_bar and run.is_main and bool(missing)
    for batch in tqdm(missing, desc="prior images", unit="batch", disable=not shown):
        for pair, content in zip(batch, _draw(config, pipeline, classes, batch), strict=True):
            put_file(_path(folder, *pair), content)


def _path(folder: Path, number: int, index: int) -> Path:
    return folder / f"{number:06d}" / f"{index:06d}.png"


@torch.no_grad()
def _draw(
    config: FinetuneConfig, pipeline: Any, classes: Sequence[int], batch: Sequence[tuple[int, int]]
) -> Iterator[bytes]:
    """The PNG files of a batch of (place of the class, number of the image)."""
    images = pipeline(
        class_labels=[classes[number] for number, _ in batch],
        num_inference_steps=config.prior.num_inference_steps,
        guidance_scale=config.prior.guidance_scale,
        generator=[generator_for(config.seed, "prior", classes[number], index) for number, index in batch],
    ).images
    for image in images:
        stream = io.BytesIO()
        image.save(stream, format="PNG")
        yield stream.getvalue()
