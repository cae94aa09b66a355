"""Tiny real components of generator training, on disk as users have them, and a configuration that points at them."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from repagen.encoders import VisionEncoder
from repagen.errors import run_as_program
from repagen.models.autoencoder_representation import RepresentationAutoencoder
from repagen.training.generator import main

ENCODER = {
    "model_type": "dinov2_with_registers",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
    "num_register_tokens": 1,
    "mlp_ratio": 2,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
DITDH_WIDTHS = {
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "head_hidden_size": 32,
    "head_depth": 1,
    "head_num_heads": 2,
}
SIT_WIDTHS = {"hidden_size": 16, "depth": 2, "num_heads": 2}
HEAD_WIDTHS = {"head_hidden_size": 32, "head_depth": 1, "head_num_heads": 2}
# Architecture => a published size to start from, and tiny widths.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "sit": ("S", SIT_WIDTHS),
    "dit": ("S", SIT_WIDTHS),
    "lightningdit": ("B", SIT_WIDTHS),
    "ditdh": ("S", DITDH_WIDTHS),
    "raev2": ("XL", {**SIT_WIDTHS, **HEAD_WIDTHS, "base_depth": 1}),
    "ddt": ("XL", {**SIT_WIDTHS, "head_depth": 1}),
    "elt": ("L", {**SIT_WIDTHS, "num_loops": 3}),
}


def new_model(config: Any, latent_shape: tuple[int, int, int], num_classes: int, **more: Any) -> Any:
    """The network of a configuration, for so many classes."""
    from repagen.training.conditioning import ClassConditioning
    from repagen.training.generator_model import build_model

    names = [str(label) for label in range(num_classes)]
    arguments = ClassConditioning.of_all(names, config.label_dropout).model_arguments
    return build_model(config, latent_shape, arguments, **more)


def write_parts(folder: Path) -> Path:
    """Write an encoder, a representation autoencoder (16, 4, 4) and a KL autoencoder (4, 8, 8), both for 32 px."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    encoder = VisionEncoder.from_config({"family": "dinov2_with_registers", "config": ENCODER})
    encoder.save_pretrained(folder / "encoder")
    autoencoder = RepresentationAutoencoder.from_encoder(encoder, decoder=DECODER, image_size=32)
    autoencoder.save_pretrained(folder / "rae")
    kl = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
    )
    kl.save_pretrained(folder / "kl")
    return folder


def settings(parts: Path, output: Path) -> dict[str, Any]:
    """A tiny aligned DiT^DH on the digits."""
    return {
        "output_dir": str(output),
        "max_steps": 6,
        "global_batch_size": 8,
        "device": "cpu",
        "progress_bar": False,
        "data": {"kind": "digits", "image_size": 32},
        "autoencoder": {"path": str(parts / "rae")},
        "transformer": {"architecture": "ditdh", "prediction": "sample", "overrides": DITDH_WIDTHS},
        "flow": {"time": "logit_normal"},
        "alignment": {"targets": [{"encoder": str(parts / "encoder"), "block": 1, "projector_dim": 16}]},
        "optimizer": {"learning_rate": 1e-3, "schedule": {"kind": "linear", "warmup_steps": 2}},
        "ema": {"decay": 0.9},
        "sampler": {"preset": "repa-ode", "num_inference_steps": 2},
        "checkpoint": {"every_steps": 2},
    }


def tiny_settings(parts: Path, output: Path, architecture: str) -> dict[str, Any]:
    """A tiny network of any architecture on the digits, without alignment."""
    size, widths = TINY[architecture]
    values = settings(parts, output)
    values["transformer"] = {"architecture": architecture, "size": size, "overrides": widths}
    if architecture == "dit":
        values["sampler"]["preset"] = "dit-ddpm"
        del values["flow"]
    del values["alignment"]
    return values


def train_settings(values: dict[str, Any], folder: Path, *words: str) -> Path:
    """Train from settings, written into `folder` first; => the run's folder."""
    from repagen.config import load_config
    from repagen.training.generator import train
    from repagen.training.generator_config import GeneratorConfig

    folder.mkdir(parents=True, exist_ok=True)
    values = {**values, "output_dir": str(folder / "run")}
    train(load_config(GeneratorConfig, write_settings(values, folder / "config.yaml"), words))
    return folder / "run"


def stop_after(
    values: dict[str, Any], folder: Path, steps: int, *words: str, train: Callable[..., Path] = train_settings
) -> Path:
    """Train and send SIGTERM to this process within the last of `steps` steps; => the run's folder."""
    import signal

    import pytest

    from repagen.training.launch import RunStopped
    from repagen.training.run import Run

    log = Run.log

    def log_and_signal(self: Run, step: int, row: Any) -> None:
        log(self, step, row)
        if step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log_and_signal)
        with pytest.raises(RunStopped, match=f"stopped after step {steps} of"):
            train(values, folder, *words)
    return folder / "run"


def metric_rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run without the columns that hold times."""
    from repagen.training.log import MetricsLog, read_metrics

    return [
        {name: value for name, value in row.items() if name not in MetricsLog.TIME_COLUMNS}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def training_state(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of tensors in the newest checkpoint and in the released pipeline."""
    newest = max((folder / "checkpoints").iterdir())
    files = [*newest.glob("*.safetensors"), *(folder / "pipeline").rglob("*.safetensors")]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def write_settings(values: dict[str, Any], path: Path) -> Path:
    import yaml

    path.write_text(yaml.safe_dump(values))
    return path


def command(config: Path, *words: str, processes: int = 1, program: str = "generator") -> list[str]:
    """The command line of a training, under torchrun for several processes."""
    module = ["-m", f"repagen.training.{program}", "--config", str(config), *words]
    if processes == 1:
        return [sys.executable, *module]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--no-python"]
    return [sys.executable, *launcher, sys.executable, *module]


def start(config: Path, *words: str, processes: int = 1, program: str = "generator") -> subprocess.Popen[str]:
    """Start a training in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(config, *words, processes=processes, program=program),
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def fork(config: Path, *words: str, prepare: Callable[[], None] = lambda: None) -> multiprocessing.Process:
    """Start generator training, after `prepare`, in a child of this process, which has loaded everything already."""

    def program() -> None:
        prepare()
        run_as_program(main, ["--config", str(config), *words])

    process = multiprocessing.get_context("fork").Process(target=program)
    process.start()
    return process


def join(process: multiprocessing.Process) -> int | None:
    """Wait for a forked program: => exit code."""
    process.join(timeout=300)
    return process.exitcode


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process: => exit code, what it wrote to stderr."""
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors
