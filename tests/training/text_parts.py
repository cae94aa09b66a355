"""Tiny real components of text-to-image training, and a configuration that points at them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from generator_parts import settings, stop_after, write_parts, write_settings

sys.path.append(str(Path(__file__).parents[1] / "encoders"))

from tiny_text_encoders import save_tiny  # found through the line above


def write_text_parts(folder: Path) -> Path:
    """Write what class-conditional training has, a T5 (`text`) of 32 wide and a Qwen3 (`qwen`) of 32."""
    write_parts(folder)
    save_tiny(folder / "text", "t5")
    save_tiny(folder / "qwen", "qwen3")
    return folder


def text_settings(parts: Path, output: Path) -> dict[str, Any]:
    """A tiny aligned DiT^DH on captioned shapes."""
    values = settings(parts, output)
    values["data"] = {"kind": "shapes", "image_size": 32, "num_images": 40}
    values["text"] = {"encoder": str(parts / "text"), "max_length": 12, "dropout": 0.3}
    values["max_steps"] = 4
    return values


def train_text(values: dict[str, Any], folder: Path, *words: str) -> Path:
    """Train from settings, written into `folder` first; => the run's folder."""
    from repagen.config import load_config
    from repagen.training.text_to_image import train
    from repagen.training.text_to_image_config import TextToImageConfig

    folder.mkdir(parents=True, exist_ok=True)
    values = {**values, "output_dir": str(folder / "run")}
    train(load_config(TextToImageConfig, write_settings(values, folder / "config.yaml"), words))
    return folder / "run"


def stop_text_after(values: dict[str, Any], folder: Path, steps: int, *words: str) -> Path:
    """Train and stop by a signal within the last of `steps` steps; => the run's folder."""
    return stop_after(values, folder, steps, *words, train=train_text)


def save_wider(folder: Path) -> Path:
    """Write a T5 of width 48; => its folder."""
    from transformers import T5Config, T5EncoderModel

    save_tiny(folder, "t5")
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=320, d_model=48, d_kv=16, d_ff=48, num_layers=1, num_heads=2)).save_pretrained(
        folder
    )
    return folder
