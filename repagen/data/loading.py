"""Opening a dataset by its config, and loading batches of it with or without worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from repagen.data.config import DataConfig
from repagen.data.dataset import SampleDataset
from repagen.errors import UserError
from repagen.randomness import generator_for


def open_dataset(config: DataConfig) -> SampleDataset:
    """Open the dataset a config names.

    Raises:
        UserError: the config contradicts itself, or nothing usable is found where it points.
    """
    config.validate()
    if config.kind == "digits":
        from repagen.data.digits import DigitsDataset

        return DigitsDataset(config)
    if config.kind == "datasets":
        from repagen.data.hub import HuggingFaceDataset

        return HuggingFaceDataset(config)
    if config.kind == "latents":
        from repagen.data.shards import LatentShards

        return LatentShards(config.path or "", verify=config.verify_shards)
    from repagen.data.folders import FolderDataset

    return FolderDataset(config)


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


def _collate(samples: list[dict[str, Any] | UserError]) -> dict[str, Any] | UserError:
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    return default_collate(samples)


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
        persistent_workers=False,
    )
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if num_workers and "DataLoader" in str(error):
                raise UserError(
                    f"data: a loader worker died or gave nothing for {worker_timeout_s:g} s ({error}); often memory "
                    "or a network file system: try fewer workers, or none"
                ) from error
            raise
        if isinstance(batch, UserError):
            raise batch
        yield batch
