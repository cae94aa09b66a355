"""Training data: image folders, Hugging Face datasets, digits, drawn shapes, latent shards, the resumable stream."""

from __future__ import annotations

from repagen.data.captions import Captions
from repagen.data.combined import CombinedDataset
from repagen.data.config import CaptionConfig, DataConfig, data_config_from_words
from repagen.data.dataset import CaptionedSample, ImageDataset, ImageSample, SampleDataset
from repagen.data.digits import digits_encoder_path, digits_to_images, load_digits
from repagen.data.loading import (
    indices_of_largest,
    load_batches,
    load_first,
    load_in_order,
    open_dataset,
    open_image_dataset,
)
from repagen.data.sampler import StreamBatchSampler, sample_indices
from repagen.data.shapes import ShapesDataset, shapes_encoders_path, shapes_pipeline_path
from repagen.data.shards import LatentShards

__all__ = [
    "CaptionConfig",
    "CaptionedSample",
    "Captions",
    "CombinedDataset",
    "DataConfig",
    "ImageDataset",
    "ImageSample",
    "LatentShards",
    "SampleDataset",
    "ShapesDataset",
    "StreamBatchSampler",
    "data_config_from_words",
    "digits_encoder_path",
    "digits_to_images",
    "indices_of_largest",
    "load_batches",
    "load_digits",
    "load_first",
    "load_in_order",
    "open_dataset",
    "open_image_dataset",
    "sample_indices",
    "shapes_encoders_path",
    "shapes_pipeline_path",
]
