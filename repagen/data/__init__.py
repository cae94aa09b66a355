"""Training data: image folders, Hugging Face datasets, the bundled digits, latent shards, and the resumable stream."""

from __future__ import annotations

from repagen.data.config import DataConfig
from repagen.data.dataset import ImageDataset, ImageSample, SampleDataset
from repagen.data.digits import digits_encoder_path, digits_to_images, load_digits
from repagen.data.loading import load_batches, open_dataset
from repagen.data.sampler import StreamBatchSampler, sample_indices

__all__ = [
    "DataConfig",
    "ImageDataset",
    "ImageSample",
    "SampleDataset",
    "StreamBatchSampler",
    "digits_encoder_path",
    "digits_to_images",
    "load_batches",
    "load_digits",
    "open_dataset",
    "sample_indices",
]
