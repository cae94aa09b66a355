"""Evaluation: features of images, their statistics, and distances between distributions."""

from __future__ import annotations

from repagen.evaluation.features import EncoderExtractor, ExtractorIdentity, InceptionExtractor, open_extractor
from repagen.evaluation.metrics.frechet import frechet_distance
from repagen.evaluation.generation import GenerationResult, evaluate_generation
from repagen.evaluation.moments import FeatureMoments, Statistics
from repagen.evaluation.metrics.precision_recall import PrecisionRecall, precision_recall
from repagen.evaluation.reference import ReferenceStatistics, load_statistics, open_reference, save_statistics
from repagen.evaluation.samples import DatasetImages, FolderImages, ImageSource, NpzImages, PipelineImages, open_images

__all__ = [
    "DatasetImages",
    "EncoderExtractor",
    "ExtractorIdentity",
    "FeatureMoments",
    "FolderImages",
    "GenerationResult",
    "ImageSource",
    "InceptionExtractor",
    "NpzImages",
    "PipelineImages",
    "PrecisionRecall",
    "ReferenceStatistics",
    "Statistics",
    "evaluate_generation",
    "frechet_distance",
    "load_statistics",
    "open_extractor",
    "open_images",
    "open_reference",
    "precision_recall",
    "save_statistics",
]
