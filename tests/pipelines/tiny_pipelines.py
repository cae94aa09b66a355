"""Tiny pipelines of real components with random, non-zero weights."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from repagen import (
    ClassToImagePipeline,
    DDPMDiTTransformer2DModel,
    DDTTransformer2DModel,
    DiTDHTransformer2DModel,
    ELTTransformer2DModel,
    LightningDiTTransformer2DModel,
    RAEv2Transformer2DModel,
    RepresentationAutoencoder,
    SiTTransformer2DModel,
    TextEncoder,
    TextToImagePipeline,
    sampler_preset,
)

NUM_CLASSES = 4
CHANNELS, SIDE, PATCH = 8, 4, 4
ID2LABEL = {"0": "tabby, tabby cat", "1": "Golden Retriever", "2": "crane", "3": "forklift, crane"}

_STACK = {"patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2}
_WITH_HEAD = {
    "hidden_size": 16, "depth": 2, "num_heads": 2, "head_hidden_size": 24, "head_depth": 1, "head_num_heads": 2,
}  # fmt: skip
SIZES = {
    SiTTransformer2DModel: _STACK,
    DDPMDiTTransformer2DModel: _STACK,
    LightningDiTTransformer2DModel: _STACK,
    ELTTransformer2DModel: {**_STACK, "num_loops": 3},
    DDTTransformer2DModel: {"patch_size": 2, "hidden_size": 16, "depth": 2, "head_depth": 1, "num_heads": 2},
    DiTDHTransformer2DModel: _WITH_HEAD,
    RAEv2Transformer2DModel: {**_WITH_HEAD, "base_depth": 1},
}


def tiny_transformer(cls: type = SiTTransformer2DModel, seed: int = 0, **overrides: Any) -> Any:
    """A transformer whose zero-initialised layers are refilled, so that its output depends on every input."""
    torch.manual_seed(seed)
    arguments = {"sample_size": SIDE, "in_channels": CHANNELS, "num_classes": NUM_CLASSES, **SIZES[cls], **overrides}
    model = cls(**arguments)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def tiny_autoencoder(seed: int = 1) -> RepresentationAutoencoder:
    torch.manual_seed(seed)
    model = RepresentationAutoencoder(
        latent_channels=CHANNELS,
        latent_size=SIDE,
        decoder_patch_size=PATCH,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    model.set_statistics(0.1 * torch.randn(model.latent_shape), 1 + 0.1 * torch.rand(model.latent_shape))
    return model.eval()


def tiny_components(cls: type = SiTTransformer2DModel, **overrides: Any) -> dict[str, Any]:
    discrete = cls is DDPMDiTTransformer2DModel
    components = {
        "transformer": tiny_transformer(cls),
        "vae": tiny_autoencoder(),
        "scheduler": sampler_preset("dit-ddpm")[0] if discrete else FlowMatchEulerDiscreteScheduler(shift=2.0),
    }
    return {**components, **overrides}


def tiny_pipeline(cls: type = SiTTransformer2DModel, **overrides: Any) -> ClassToImagePipeline:
    pipe = ClassToImagePipeline(**tiny_components(cls, **overrides))
    pipe.set_progress_bar_config(disable=True)
    return pipe


TEXT_GENERATORS: dict[type, dict[str, Any]] = {
    DiTDHTransformer2DModel: {"text_conditioning": "in_context"},
    RAEv2Transformer2DModel: {"text_conditioning": "cross_attention"},
}
TEXT_LENGTH, TEXT_DIM = 20, 32


def tiny_text_encoder() -> TextEncoder:
    """A T5 of random weights with a tokenizer of bytes."""
    return copy.deepcopy(_saved_text_encoder())


@cache
def _saved_text_encoder() -> TextEncoder:
    from encoders.tiny_text_encoders import save_tiny

    with tempfile.TemporaryDirectory() as folder:
        encoder = TextEncoder.from_encoder(save_tiny(Path(folder), "t5"), max_length=TEXT_LENGTH)
        encoder.save_pretrained(Path(folder) / "whole")
        return TextEncoder.from_pretrained(Path(folder) / "whole")


def tiny_text_transformer(cls: type = DiTDHTransformer2DModel, seed: int = 0, **overrides: Any) -> Any:
    arguments = {"num_classes": 0, "text_dim": TEXT_DIM, "text_dropout_prob": 0.1, **TEXT_GENERATORS[cls]}
    return tiny_transformer(cls, seed, **{**arguments, **overrides})


def any_size_autoencoder() -> AutoencoderKL:
    """One that decodes every grid, 2 px a token."""
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=CHANNELS,
        down_block_types=2 * ("DownEncoderBlock2D",), up_block_types=2 * ("UpDecoderBlock2D",),
    ).eval()  # fmt: skip


def tiny_text_components(cls: type = DiTDHTransformer2DModel, **overrides: Any) -> dict[str, Any]:
    components = {
        "transformer": tiny_text_transformer(cls),
        "vae": tiny_autoencoder(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0),
        "text_encoder": tiny_text_encoder(),
    }
    return {**components, **overrides}


def tiny_text_pipeline(cls: type = DiTDHTransformer2DModel, **overrides: Any) -> TextToImagePipeline:
    pipe = TextToImagePipeline(**tiny_text_components(cls, **overrides))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class PipelineMaker:
    """Constructor of tiny pipelines around one class of generator."""

    transformer_class: type

    def __call__(self, **overrides: Any) -> Any:
        return tiny_pipeline(self.transformer_class, **overrides)

    def weaker(self) -> Any:
        """Another transformer of that class, for autoguidance."""
        return tiny_transformer(self.transformer_class, seed=5)


@dataclass(frozen=True)
class TextPipelineMaker(PipelineMaker):
    """The same, of pipelines that take prompts."""

    def __call__(self, **overrides: Any) -> Any:
        return tiny_text_pipeline(self.transformer_class, **overrides)

    def weaker(self) -> Any:
        return tiny_text_transformer(self.transformer_class, seed=5)


def inputs(**overrides: Any) -> dict[str, Any]:
    """The call that most tests share."""
    arguments = {
        "class_labels": 1,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt",
    }
    return {**arguments, **overrides}


def text_inputs(**overrides: Any) -> dict[str, Any]:
    """The call that most tests of prompts share."""
    shared = {name: value for name, value in inputs().items() if name != "class_labels"}
    return {"prompt": "a red cube", **shared, **overrides}
