"""Published names: this list may only grow."""

from __future__ import annotations

import pytest

import repagen

PUBLISHED = [
    "AlignmentBatch",
    "AlignmentTarget",
    "AlignmentTerm",
    "AttentionAlignment",
    "ClassToImagePipeline",
    "ClassToImagePipelineOutput",
    "ClassTokenDenoising",
    "DDPMDiTTransformer2DModel",
    "DDTTransformer2DModel",
    "DiTDHTransformer2DModel",
    "DispersiveLoss",
    "ELTTransformer2DModel",
    "FlowMatchEulerMaruyamaScheduler",
    "FlowMatchEulerTruncatedScheduler",
    "FlowMatchHeunScheduler",
    "GuidanceInterval",
    "LightningDiTTransformer2DModel",
    "PixelAutoencoder",
    "RAEv2Transformer2DModel",
    "RepresentationAlignment",
    "RepresentationAutoencoder",
    "SVGAutoencoder",
    "SamplerPreset",
    "SelfAlignment",
    "SiTTransformer2DModel",
    "TextEncoder",
    "TextToImagePipeline",
    "TextToImagePipelineOutput",
    "TimeDistribution",
    "TimeShift",
    "UserError",
    "VisionEncoder",
    "__version__",
    "convert_checkpoint",
    "export_checkpoint",
    "frechet_distance",
    "images_to_latents",
    "latents_to_images",
    "sampler_preset",
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_name_is_still_there(name):
    assert getattr(repagen, name) is not None
    assert name in repagen.__all__ and name in dir(repagen)


def test_no_name_is_public_without_being_published_here():
    assert sorted(repagen.__all__) == sorted(PUBLISHED)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'repagen' has no attribute 'Transformer'"):
        _ = repagen.Transformer
