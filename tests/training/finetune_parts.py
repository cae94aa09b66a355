"""A tiny saved pipeline, a folder of drawn classes, and configurations of fine-tuning that point at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from generator_parts import DITDH_WIDTHS, write_parts, write_settings
from PIL import Image

from repagen import ClassToImagePipeline, DiTDHTransformer2DModel, RepresentationAutoencoder
from repagen.randomness import generator_for

CLASSES = ["bird", "cat"]
OLD_CLASSES = ["tabby, cat", "dog", "fish"]  # `cat` is a synonym of class 0


def write_pipeline(folder: Path, *, num_classes: int = 3, **parts: Any) -> Path:
    """Write autoencoder and encoder into `folder`, and a pipeline of random weights: => the pipeline."""
    if not (folder / "rae").is_dir():
        write_parts(folder)
    torch.manual_seed(1)
    model = DiTDHTransformer2DModel(
        sample_size=4,
        in_channels=16,
        patch_size=1,
        num_classes=num_classes,
        class_dropout_prob=0.1 if num_classes else 0.0,
        prediction_type="sample",
        **DITDH_WIDTHS,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    components = {
        "transformer": model,
        "vae": RepresentationAutoencoder.from_pretrained(folder / "rae"),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=2.5),
        "id2label": {str(k): name for k, name in enumerate(OLD_CLASSES[:num_classes])} or None,
        "sampling_defaults": {"num_inference_steps": 2},
        **parts,
    }
    ClassToImagePipeline(**components).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def write_images(folder: Path, classes: list[str] = CLASSES, count: int = 3) -> Path:
    """Write a folder of class folders with random images; without classes a flat one."""
    for number, name in enumerate(classes or [""]):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = torch.randint(0, 256, (32, 32, 3), generator=generator_for(number, "pixels", index))
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name / f"{index}.png")
    return folder


def write_pipeline_and_images(folder: Path) -> Path:
    """Write a pipeline of 3 classes and a folder of 2, one of them known to it: => the folder of both."""
    write_pipeline(folder)
    write_images(folder / "images")
    return folder


def finetune_settings(pipeline: Path, images: Path, mode: str) -> dict[str, Any]:
    """A few steps of a mode; of `decoder` without perceptual networks."""
    values: dict[str, Any] = {
        "output_dir": "",
        "mode": mode,
        "pipeline": str(pipeline),
        "max_steps": 4,
        "global_batch_size": 4,
        "micro_batch_size": "auto",
        "device": "cpu",
        "progress_bar": False,
        "data": {"path": str(images), "image_size": 32},
        "optimizer": {"name": "auto", "learning_rate": 1e-2},
        "ema": {"decay": 0.5},
        "checkpoint": {"every_steps": 2},
    }
    if mode == "lora":
        values["lora"] = {"rank": 2}
    if mode == "decoder":
        values["lpips"] = {"weight": 0.0}
    return values


def finetune(values: dict[str, Any], folder: Path, *words: str) -> Path:
    """Fine-tune from settings, written into `folder` first; => the run's folder."""
    from repagen.training.finetune import train
    from repagen.training.finetune_config import load_finetune_config

    folder.mkdir(parents=True, exist_ok=True)
    config = write_settings({**values, "output_dir": str(folder / "run")}, folder / "config.yaml")
    train(load_finetune_config(config, words))
    return folder / "run"


def result_bytes(run: Path) -> dict[str, bytes]:
    """The bytes of every tensor file in the newest checkpoint and in what was released."""
    newest = max((run / "checkpoints").iterdir())
    released = next(run / name for name in ("pipeline", "adapter") if (run / name).is_dir())
    files = [*newest.glob("*.safetensors"), *released.rglob("*.safetensors")]
    assert files
    return {str(path.relative_to(run)): path.read_bytes() for path in files}
