"""Tiny real components of decoder training, on disk as users have them, and a configuration that points at them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lpips_parts import write_lpips
from PIL import Image

from repagen.training.decoder_config import DecoderConfig
from repagen.training.log import read_metrics


def tiny_vit():
    """A ViT of DINO v1's kind: 3 blocks, 16 tokens."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    )
    return ViTModel(config, add_pooling_layer=False)


def write_parts(folder: Path) -> Path:
    """Write encoder, LPIPS and DINO to `folder`."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    write_lpips(folder)
    tiny_vit().save_pretrained(folder / "dino")
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_register_tokens=1,
    )
    Dinov2WithRegistersModel(config).save_pretrained(folder / "encoder")
    return folder


def settings(parts: Path) -> dict[str, Any]:
    """Overrides that put the tiny components into any decoder preset."""
    return {
        "data.kind": "digits",
        "data.path": "null",
        "data.crop": "center",
        "data.resize_px": "null",
        "data.image_size": 32,
        "data.subset": "train",
        "autoencoder.encoder": parts / "encoder",
        "autoencoder.decoder_patch_size": 8,
        "autoencoder.decoder": "{decoder_hidden_size: 32, decoder_num_hidden_layers: 2, "
        "decoder_num_attention_heads: 2, decoder_intermediate_size: 64}",
        "lpips.trunk": parts / "tiny_vgg.pth",
        "lpips.heads": parts / "tiny_heads.pth",
        "adversarial.backbone": parts / "dino",
        "adversarial.blocks": "[0, 1, 2]",
        "adversarial.kernel_size": 3,
        "num_workers": 0,
        "device": "cpu",
        "progress_bar": "false",
    }


def words(values: dict[str, Any]) -> list[str]:
    """As `key=value` words of a command line."""
    return [f"{key}={value}" for key, value in values.items()]


def rows(config: DecoderConfig) -> list[dict[str, Any]]:
    """The rows of a run's log without the columns that measure time."""
    found = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in ("time_s", "images_per_s")} for row in found]


SIZES = {
    "data__kind": "shapes",
    "data__num_images": 24,
    "data__bucket_step": 8,
    "data__buckets": "[[48, 48], [24, 40], [40, 24]]",
}
"""Changes of a `configured` fixture: scenes in three sizes."""


def train_in_sizes(
    train: Callable[[DecoderConfig], Path], configured: Callable[..., DecoderConfig], folder: Path, **changes: Any
) -> Path:
    """Train on images of several sizes, whole and in micro-batches of 2; => the release.

    Every size must have had a step, and the splits the same losses.
    """
    told = {"max_steps": 3, "sample__every_steps": 3, **SIZES, **changes}
    whole = configured(output_dir=folder / "whole", **told)
    released = train(whole)
    split = configured(output_dir=folder / "split", micro_batch_size=2, **told)
    train(split)
    assert len(rows(whole)) == 3
    for one, two in zip(rows(whole), rows(split), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
    with Image.open(folder / "whole" / "samples" / "step-00000003.png") as grid:
        assert grid.width % 48 == 0 and grid.height % 96 == 0  # the largest, above their reconstructions
    return released


def run_two_processes(module: str, config: Path) -> None:
    """Run a training program under torchrun on two processes; it must succeed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", module, "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
