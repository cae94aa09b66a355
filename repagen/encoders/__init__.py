"""Frozen vision encoders: one contract over transformers and timm."""

from __future__ import annotations

from repagen.encoders.families import FAMILIES, EncoderFamily
from repagen.encoders.spec import Combination, EncoderSpec, Layers
from repagen.encoders.vision import VisionEncoder, VisionEncoderOutput

__all__ = [
    "FAMILIES",
    "Combination",
    "EncoderFamily",
    "EncoderSpec",
    "Layers",
    "VisionEncoder",
    "VisionEncoderOutput",
]
