"""Evaluation: features of images, their statistics, and metrics by named protocols."""

from __future__ import annotations

from repagen.evaluation.encoder_extractors import EncoderExtractor, open_extractor
from repagen.evaluation.extractor import ExtractorIdentity, ExtractorRule, FeatureExtractor
from repagen.evaluation.generation import evaluate_generation, open_extractors
from repagen.evaluation.inception import InceptionExtractor
from repagen.evaluation.metrics.frechet import expected_frechet_bias, frechet_distance
from repagen.evaluation.moments import FeatureMoments, Statistics
from repagen.evaluation.pipeline_images import PipelineImages
from repagen.evaluation.protocol import EvaluationProtocol, SpaceRule, encoder_protocol, load_protocol, protocol_names
from repagen.evaluation.reference import ReferenceStatistics, load_statistics, open_reference, save_statistics
from repagen.evaluation.result import GenerationResult
from repagen.evaluation.samples import (
    DatasetImages,
    FolderImages,
    ImageSource,
    NpzImages,
    TensorImages,
    open_images,
    to_uint8,
)

__all__ = [
    "DatasetImages",
    "EncoderExtractor",
    "EvaluationProtocol",
    "ExtractorIdentity",
    "ExtractorRule",
    "FeatureExtractor",
    "FeatureMoments",
    "FolderImages",
    "GenerationResult",
    "ImageSource",
    "InceptionExtractor",
    "NpzImages",
    "PipelineImages",
    "ReferenceStatistics",
    "SpaceRule",
    "Statistics",
    "TensorImages",
    "encoder_protocol",
    "evaluate_generation",
    "expected_frechet_bias",
    "frechet_distance",
    "load_protocol",
    "load_statistics",
    "open_extractor",
    "open_extractors",
    "open_images",
    "open_reference",
    "protocol_names",
    "save_statistics",
    "to_uint8",
]
