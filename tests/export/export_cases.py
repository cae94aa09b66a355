"""Tiny pipelines of every generator, with every kind of autoencoder and scheduler among them; two take prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from models.autoencoder_cases import tiny_autoencoder, tiny_svg
from pipelines.tiny_pipelines import ID2LABEL, any_size_autoencoder, tiny_text_pipeline, tiny_transformer

from repagen import (
    ClassToImagePipeline,
    DDPMDiTTransformer2DModel,
    DDTTransformer2DModel,
    DiTDHTransformer2DModel,
    ELTTransformer2DModel,
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchEulerTruncatedScheduler,
    FlowMatchHeunScheduler,
    LightningDiTTransformer2DModel,
    PixelAutoencoder,
    RAEv2Transformer2DModel,
    SiTTransformer2DModel,
    TextToImagePipeline,
    sampler_preset,
)


def tiny_kl() -> AutoencoderKL:
    torch.manual_seed(0)
    model: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=4)
    return model.eval()


def tiny_pixels() -> PixelAutoencoder:
    return PixelAutoencoder(image_size=4).eval()


def _make(generator: type, autoencoder: Callable[[], Any], channels: int, scheduler: Any, **more: Any) -> Any:
    transformer = tiny_transformer(generator, in_channels=channels)
    pipe = ClassToImagePipeline(transformer, autoencoder(), scheduler, id2label=ID2LABEL, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# An autoencoder's latents have 32 channels (RAE), 36 (SVG), 4 (KL) or 3 (pixels), on a grid of 4 x 4.
CASES: dict[str, Callable[[], ClassToImagePipeline | TextToImagePipeline]] = {
    "sit-rae": lambda: _make(SiTTransformer2DModel, tiny_autoencoder, 32, FlowMatchEulerDiscreteScheduler(shift=2.0)),
    "dit-kl": lambda: _make(DDPMDiTTransformer2DModel, tiny_kl, 4, sampler_preset("dit-ddpm")[0]),
    "lightningdit-svg": lambda: _make(LightningDiTTransformer2DModel, tiny_svg, 36, FlowMatchHeunScheduler()),
    "ditdh-rae": lambda: _make(
        DiTDHTransformer2DModel, tiny_autoencoder, 32, FlowMatchEulerTruncatedScheduler(),
        guidance_transformer=tiny_transformer(SiTTransformer2DModel, seed=5, in_channels=32),
    ),
    "raev2-pixels": lambda: _make(RAEv2Transformer2DModel, tiny_pixels, 3, FlowMatchEulerDiscreteScheduler()),
    "ddt-pixels": lambda: _make(DDTTransformer2DModel, tiny_pixels, 3, FlowMatchEulerMaruyamaScheduler()),
    "elt-kl": lambda: _make(
        ELTTransformer2DModel, tiny_kl, 4, FlowMatchEulerDiscreteScheduler(), sampling_defaults={"num_loops": 2}
    ),
    "text-ditdh-rae": tiny_text_pipeline,
    "text-raev2-kl": lambda: tiny_text_pipeline(RAEv2Transformer2DModel, vae=any_size_autoencoder()),
}  # fmt: skip
TEXT_CASES = tuple(name for name in CASES if name.startswith("text-"))
