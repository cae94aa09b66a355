"""Adapters with random weights, and what the tests of adapters do again and again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from tiny_pipelines import inputs, text_inputs

from repagen import ClassToImagePipeline, TextToImagePipeline

FILE = "pytorch_lora_weights.safetensors"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
WIDTH = 16


def add_adapter(pipe: ClassToImagePipeline, name: str = "default", seed: int = 1, **config: Any) -> None:
    """Give the transformer an adapter as training leaves it: every weight of it non-zero."""
    torch.manual_seed(seed)
    arguments = {"r": 4, "lora_alpha": 4, "target_modules": ATTENTION, "init_lora_weights": False, **config}
    with warnings.catch_warnings():  # peft warns of the second adapter
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        pipe.transformer.add_adapter(LoraConfig(**arguments), adapter_name=name)
    for key, parameter in pipe.transformer.named_parameters():
        if ".lora_" in key and f".{name}" in key:
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn(parameter.shape))


def state_of(pipe: ClassToImagePipeline, name: str = "default") -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():  # peft takes a bias of LoRA layers for a shard
        warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape")
        return get_peft_model_state_dict(pipe.transformer, adapter_name=name)


def save_adapter(
    pipe: ClassToImagePipeline, folder: Path, name: str = "default", label_rows: dict[str, torch.Tensor] | None = None
) -> Path:
    """Write an adapter that a pipeline has, as a training program does."""
    pipe.save_lora_weights(
        folder,
        state_of(pipe, name),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config[name].to_dict(),
        label_rows=label_rows,
    )
    return folder


def make_adapter(make_pipe: Any, folder: Path, label_rows: Any = None, seed: int = 1, **config: Any) -> Path:
    """Write an adapter of pipelines that `make_pipe` makes."""
    pipe = make_pipe()
    add_adapter(pipe, seed=seed, **config)
    return save_adapter(pipe, folder, label_rows=label_rows)


def rows(*names: str, width: int = WIDTH, seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(width) for name in names}


def latents(pipe: ClassToImagePipeline | TextToImagePipeline, **overrides: Any) -> torch.Tensor:
    call = text_inputs if isinstance(pipe, TextToImagePipeline) else inputs
    return pipe(**call(output_type="latent", **overrides)).images


def close(result: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Up to a share of the largest value: two steps of a DDPM with random weights end in the hundreds."""
    largest = max(1.0, expected.abs().max().item())
    return torch.allclose(result, expected, rtol=0, atol=tolerance * largest)
