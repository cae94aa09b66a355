"""Tiny pipelines of every generator over the latents of one tiny autoencoder, and a few digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

import repagen
from repagen.data import DataConfig, ImageDataset, open_image_dataset
from repagen.encoders import VisionEncoder

COMMON: dict[str, Any] = {
    "sample_size": 4, "patch_size": 1, "in_channels": 16, "hidden_size": 16, "num_heads": 2, "num_classes": 10,
}  # fmt: skip
HEAD = {"head_hidden_size": 24, "head_depth": 1, "head_num_heads": 2}
GENERATORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sit": (repagen.SiTTransformer2DModel, {"depth": 3}),
    "dit": (repagen.DDPMDiTTransformer2DModel, {"depth": 3}),
    "lightningdit": (repagen.LightningDiTTransformer2DModel, {"depth": 3}),
    "ditdh": (repagen.DiTDHTransformer2DModel, {"depth": 3, **HEAD}),
    "raev2": (repagen.RAEv2Transformer2DModel, {"depth": 3, "base_depth": 2, **HEAD}),
    "ddt": (repagen.DDTTransformer2DModel, {"depth": 3, "head_depth": 1}),
    "elt": (repagen.ELTTransformer2DModel, {"depth": 3, "num_loops": 2}),
}


@pytest.fixture(scope="session")
def vae(encoder: VisionEncoder) -> Any:
    """Images of 16 px to latents (16, 4, 4)."""
    decoder = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return repagen.RepresentationAutoencoder.from_encoder(encoder, decoder=decoder, image_size=16).eval()


@pytest.fixture(scope="session")
def make_pipeline(vae: Any) -> Callable[..., Any]:
    def make(kind: str = "sit", **config: Any) -> Any:
        model_class, own = GENERATORS[kind]
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model = model_class(**{**COMMON, **own, **config}).eval()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        if kind == "dit":
            scheduler = DDPMScheduler(variance_type="learned_range", beta_start=1e-4, beta_end=0.02)
        pipeline = repagen.ClassToImagePipeline(model, vae, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture(scope="session")
def digits() -> ImageDataset:
    """The 355 held-out digits at 16 px."""
    return open_image_dataset(DataConfig(kind="digits", image_size=16, subset="validation"))
