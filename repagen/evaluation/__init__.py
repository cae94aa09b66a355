"""Evaluation: features of images, their statistics, and metrics by named protocols."""

from __future__ import annotations

from repagen.evaluation.encoder_extractors import EncoderExtractor, open_extractor
from repagen.evaluation.extractor import ExtractorIdentity, ExtractorRule, FeatureExtractor
from repagen.evaluation.generation import evaluate_generation, open_extractors
from repagen.evaluation.inception import InceptionExtractor
from repagen.evaluation.metrics.density_coverage import density_coverage
from repagen.evaluation.metrics.frechet import expected_frechet_bias, frechet_distance
from repagen.evaluation.metrics.inception_score import InceptionScoreSums
from repagen.evaluation.metrics.kernel_distance import clip_mmd, kernel_inception_distance
from repagen.evaluation.metrics.mind import monge_inception_distance
from repagen.evaluation.metrics.precision_recall import precision_recall
from repagen.evaluation.metrics.ratios import frechet_distance_ratio, load_normalisers
from repagen.evaluation.moments import FeatureMoments, Statistics
from repagen.evaluation.pipeline_images import PipelineImages
from repagen.evaluation.protocol import EvaluationProtocol, SpaceRule, encoder_protocol, load_protocol, protocol_names
from repagen.evaluation.reconstruction.evaluate import evaluate_reconstruction
from repagen.evaluation.reference import ReferenceStatistics, load_statistics, open_reference, save_statistics
from repagen.evaluation.reference_building import import_statistics, make_reference, merge_references
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
from repagen.evaluation.torch_fidelity_bridge import register_with_torch_fidelity

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
    "InceptionScoreSums",
    "NpzImages",
    "PipelineImages",
    "ReferenceStatistics",
    "SpaceRule",
    "Statistics",
    "TensorImages",
    "clip_mmd",
    "density_coverage",
    "encoder_protocol",
    "evaluate_generation",
    "evaluate_reconstruction",
    "expected_frechet_bias",
    "frechet_distance",
    "frechet_distance_ratio",
    "import_statistics",
    "kernel_inception_distance",
    "load_normalisers",
    "load_protocol",
    "load_statistics",
    "make_reference",
    "merge_references",
    "monge_inception_distance",
    "open_extractor",
    "open_extractors",
    "open_images",
    "open_reference",
    "precision_recall",
    "protocol_names",
    "register_with_torch_fidelity",
    "save_statistics",
    "to_uint8",
]
