"""Opening a dataset by its config, and loading batches of it with or without worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from repagen.data.config import DataConfig
from repagen.data.dataset import ImageDataset, ImageSample, SampleDataset
from repagen.data.sampler import sample_indices
from repagen.errors import UserError
from repagen.randomness import generator_for


def open_dataset(config: DataConfig) -> SampleDataset:
    """Open the dataset a config names.

    Raises:
        UserError: the config contradicts itself, nothing usable is found where it points, or there are no captions
            where it asks for them.
    """
    config.validate()
    dataset = _open(config)
    if config.captions is not None and not dataset.has_captions:
        raise UserError(
            f"data.captions: given, but data.kind={config.kind} {config.path or ''} has none; drop data.captions, or "
            "use images with captions"
        )
    return dataset


def _open(config: DataConfig) -> SampleDataset:
    if config.kind == "digits":
        from repagen.data.digits import DigitsDataset

        return DigitsDataset(config)
    if config.kind == "shapes":
        from repagen.data.shapes import ShapesDataset

        return ShapesDataset(config)
    if config.kind == "datasets":
        from repagen.data.hub import HuggingFaceDataset

        return HuggingFaceDataset(config)
    if config.kind == "webdataset":
        from repagen.data.webdataset import WebDataset

        return WebDataset(config)
    if config.kind == "latents":
        from repagen.data.shards import LatentShards

        return LatentShards(config.path or "", verify=config.verify_shards)
    from repagen.data.folders import FolderDataset

    return FolderDataset(config)


def open_image_dataset(config: DataConfig, *, several_sizes: bool = False) -> ImageDataset:
    """Open the dataset a config names, which must hold images.

    Args:
        config: of the dataset.
        several_sizes: whether the images may have several sizes, as `data.buckets` asks for.

    Raises:
        UserError: as `open_dataset`; and for latents, and for several sizes where they may not be.
    """
    if config.buckets and not several_sizes:
        raise UserError("data.buckets: given, but here all images must have one size; drop it")
    dataset = open_dataset(config)
    if not isinstance(dataset, ImageDataset):
        raise UserError(
            f"data.kind={config.kind} holds no images; allowed: folder, datasets, webdataset, digits, shapes"
        )
    return dataset


class KeyedSamples(Dataset[Any]):
    """A dataset addressed by (sample, position); the position in the stream keys the augmentations.

    Items are the dataset's own with `position` added. An error the user can repair is returned instead of raised,
    since a loader worker would bury its one line in a traceback; `load_batches` raises it.
    """

    def __init__(self, dataset: SampleDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | UserError:
        index, position = key
        try:
            sample = self.dataset.load(index, generator_for(self.seed, "augmentation", position))
        except UserError as error:
            return error
        return {**sample, "position": position}


class _InOrder(Dataset[Any]):
    """An image dataset whose bad images are None and whose errors are returned."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> ImageSample | UserError | None:
        try:
            return self.dataset.try_load(index)
        except UserError as error:
            return error


def _collate(samples: list[Any]) -> dict[str, Any] | UserError | None:
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    present = [sample for sample in samples if sample is not None]
    return default_collate(present) if present else None


def load_batches(
    dataset: SampleDataset,
    batches: Iterable[list[tuple[int, int]]],
    seed: int,
    *,
    num_workers: int = 0,
    worker_timeout_s: float = 300.0,
    pin_memory: bool = False,
) -> Iterator[dict[str, Any]]:
    """Load batches of (sample, position) pairs, in order.

    The batches are the same for every number of workers.

    Args:
        dataset: the samples.
        batches: which samples, for example a `StreamBatchSampler`.
        seed: the run's seed; keys the augmentations together with the position.
        num_workers: loader processes; 0 loads in this process.
        worker_timeout_s: how long to wait for a batch of the workers, in seconds.
        pin_memory: copy batches to pinned memory, for transfers to a GPU.

    Yields:
        The dataset's items collated, for images {"image" (B, 3, S, S), "label" (B,), "index" (B,), "position" (B,)}.

    Raises:
        UserError: too many bad images, or a worker died or hung.
    """
    loader = DataLoader(
        KeyedSamples(dataset, seed),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        timeout=worker_timeout_s if num_workers else 0,
        generator=generator_for(seed, "loader"),  # else opening draws from the global random state
    )
    return _iterate(loader)


def indices_of_largest(dataset: SampleDataset) -> Sequence[int]:
    """Return the samples of one size, in order: all, or where there are buckets those of the largest that has any."""
    if dataset.buckets is None:
        return range(len(dataset))
    areas = torch.tensor([height * width for height, width in dataset.bucket_sizes])[dataset.buckets]
    largest = dataset.buckets[areas.argmax()]
    found: list[int] = (dataset.buckets == largest).nonzero().flatten().tolist()
    return found


def load_first(dataset: SampleDataset, count: int, seed: int) -> dict[str, Any]:
    """Return the first samples of a run's stream as one batch; where there are buckets, of the largest size.

    Raises:
        UserError: too many bad images.
    """
    members = indices_of_largest(dataset)
    indices = [members[place] for place in sample_indices(0, count, len(members), seed)]
    [batch] = load_batches(dataset, [list(zip(indices, range(count), strict=True))], seed)
    return batch


def load_in_order(
    dataset: ImageDataset,
    indices: Sequence[int],
    batch_size: int,
    *,
    num_workers: int = 0,
    worker_timeout_s: float = 300.0,
) -> Iterator[dict[str, Any]]:
    """Load chosen images once, in order, without augmentation; bad images are left out rather than replaced.

    Yields:
        {"image" (B, 3, S, S), "label" (B,), "index" (B,)} with B at most `batch_size`.

    Raises:
        UserError: too many bad images, or a worker died or hung.
    """
    batches = [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]
    loader = DataLoader(
        _InOrder(dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        timeout=worker_timeout_s if num_workers else 0,
        generator=generator_for(0, "loader"),
    )
    return _iterate(loader)


def _iterate(loader: DataLoader[Any]) -> Iterator[dict[str, Any]]:
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if loader.num_workers and "DataLoader" in str(error):
                raise UserError(
                    f"data: a loader worker died or gave nothing for {loader.timeout:g} s ({error}); often memory or "
                    "a network file system: try fewer workers, or none"
                ) from error
            raise
        if isinstance(batch, UserError):
            raise batch
        if batch is not None:
            yield batch
