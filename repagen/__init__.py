"""repagen: train and use image generators in representation latents.

Every public name is importable from here. Importing repagen registers its models, schedulers and pipelines with
diffusers, so that `DiffusionPipeline.from_pretrained` and `AutoModel.from_pretrained` find them.
"""

from __future__ import annotations

import importlib
from typing import Any

from repagen.registration import LOADER_BASES, register

__version__ = "0.1.0"

# Public name => module that holds it. Published names may be added, never removed (tests/test_public_names.py).
_PUBLIC_NAMES = {
    "AlignmentBatch": "repagen.alignment",
    "AlignmentTarget": "repagen.alignment",
    "AlignmentTerm": "repagen.alignment",
    "AttentionAlignment": "repagen.alignment",
    "ClassToImagePipeline": "repagen.pipelines.class_to_image",
    "ClassToImagePipelineOutput": "repagen.pipelines.class_to_image",
    "ClassTokenDenoising": "repagen.alignment",
    "DDPMDiTTransformer2DModel": "repagen.models.transformer_dit",
    "DDTTransformer2DModel": "repagen.models.transformer_ddt",
    "DiTDHTransformer2DModel": "repagen.models.transformer_ditdh",
    "DispersiveLoss": "repagen.alignment",
    "ELTTransformer2DModel": "repagen.models.transformer_elt",
    "FlowMatchEulerMaruyamaScheduler": "repagen.schedulers.euler_maruyama",
    "FlowMatchEulerTruncatedScheduler": "repagen.schedulers.euler_truncated",
    "FlowMatchHeunScheduler": "repagen.schedulers.heun",
    "GuidanceInterval": "repagen.flow.guidance",
    "LightningDiTTransformer2DModel": "repagen.models.transformer_lightningdit",
    "PixelAutoencoder": "repagen.models.autoencoder_pixel",
    "RAEv2Transformer2DModel": "repagen.models.transformer_raev2",
    "RepresentationAlignment": "repagen.alignment",
    "RepresentationAutoencoder": "repagen.models.autoencoder_representation",
    "SVGAutoencoder": "repagen.models.autoencoder_svg",
    "SamplerPreset": "repagen.schedulers.presets",
    "SelfAlignment": "repagen.alignment",
    "SiTTransformer2DModel": "repagen.models.transformer_sit",
    "TextEncoder": "repagen.encoders.text",
    "TextToImagePipeline": "repagen.pipelines.text_to_image",
    "TextToImagePipelineOutput": "repagen.pipelines.text_to_image",
    "TimeDistribution": "repagen.flow.time",
    "TimeShift": "repagen.flow.time",
    "UserError": "repagen.errors",
    "VisionEncoder": "repagen.encoders",
    "convert_checkpoint": "repagen.conversion",
    "export_checkpoint": "repagen.conversion",
    "frechet_distance": "repagen.evaluation.metrics.frechet",
    "images_to_latents": "repagen.models.latents",
    "latents_to_images": "repagen.models.latents",
    "sampler_preset": "repagen.schedulers.presets",
}

__all__ = ["__version__", *sorted(_PUBLIC_NAMES)]


def __getattr__(name: str) -> Any:
    module_name = "diffusers" if name in LOADER_BASES else _PUBLIC_NAMES.get(name)
    if module_name is None:
        raise AttributeError(f"module 'repagen' has no attribute {name!r}")
    value = getattr(importlib.import_module(module_name), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC_NAMES})


register()
