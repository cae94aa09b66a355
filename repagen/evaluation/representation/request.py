"""What a sweep is asked for, and what of it is refused before anything is computed."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from repagen.data import ImageDataset
from repagen.encoders import VisionEncoder
from repagen.errors import UserError, naming
from repagen.evaluation.representation.harvest import Change, FeatureType, Harvest, harvest
from repagen.evaluation.representation.readouts import PROBES, SIMILARITIES, ReadOut, ReadOutSettings
from repagen.evaluation.representation.result import T_95
from repagen.evaluation.representation.sources import EncoderSource, FeatureSource, GeneratorSource
from repagen.randomness import generator_for

DEFAULT_TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
TEST_SHARE = 0.2
_LEAST_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `evaluate_representation`, which says what each is."""

    subject: Any
    data: ImageDataset
    test_data: ImageDataset | None
    readouts: tuple[ReadOut, ...]
    blocks: Sequence[int] | None
    timesteps: Sequence[float] | None
    target: VisionEncoder | None
    num_images: int | None
    seeds: tuple[int, ...]
    null_label: bool
    batch_size: int
    settings: ReadOutSettings
    dtype: FeatureType
    cache: str | Path | None

    @property
    def of_encoder(self) -> bool:
        """Whether the layers of an encoder are read, whose features know no seed."""
        return isinstance(self.subject, VisionEncoder)

    @property
    def measured(self) -> ImageDataset:
        """The images that read-outs which train nothing look at."""
        return self.data if self.test_data is None else self.test_data

    def wants(self, readouts: Sequence[ReadOut]) -> bool:
        """Whether any of these is asked for."""
        return any(name in readouts for name in self.readouts)

    def source(self, seed: int, draw: int = 0) -> FeatureSource:
        """What features are read from, with the noise of a seed."""
        if isinstance(self.subject, VisionEncoder):
            return EncoderSource(self.subject, self.blocks)
        times = DEFAULT_TIMESTEPS if self.timesteps is None else self.timesteps
        return GeneratorSource(
            self.subject, blocks=self.blocks, timesteps=times, seed=seed, null_label=self.null_label, draw=draw
        )

    def harvest(
        self, source: FeatureSource, dataset: ImageDataset, indices: Sequence[int], change: Change | None = None
    ) -> Harvest:
        """Features of chosen images, in the type and with the cache that were asked for."""
        return harvest(
            source,
            dataset,
            batch_size=self.batch_size,
            indices=indices,
            dtype=self.dtype,
            cache=self.cache,
            change=change,
        )

    def chosen(self, dataset: ImageDataset) -> list[int]:
        """The images to use of a dataset, ascending; drawn by the first seed.

        Raises:
            UserError: there are not as many, or too few are asked for.
        """
        if self.num_images is None or self.num_images == len(dataset):
            return list(range(len(dataset)))
        if self.num_images < _LEAST_IMAGES:
            raise UserError(f"num_images: {self.num_images} are too few; give at least {_LEAST_IMAGES}")
        if self.num_images > len(dataset):
            raise UserError(f"num_images: {self.num_images} given, the dataset has {len(dataset)}; give fewer")
        order = torch.randperm(len(dataset), generator=generator_for(self.seeds[0], "representation images"))
        return order[: self.num_images].sort().values.tolist()

    def rows(self, train: torch.Tensor, test: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which images probes are trained and tested on, as rows of the training and the test images.

        Args:
            train: labels (N,) of the images of `data`.
            test: labels (M,) of the images of `test_data`; the same N without it.
            seed: of the split.

        Raises:
            UserError: see `ReadOutSettings.require_enough`.
        """
        rows = torch.arange(len(train)), torch.arange(len(test))
        if self.test_data is None and self.wants(PROBES):
            rows = split_rows(train, seed)
        labels = (train[rows[0]], test[rows[1]]) if self.wants(PROBES) else None
        with naming({} if self.num_images is None else {"data: ": "num_images: "}):
            self.settings.require_enough(self.readouts, len(test), labels)
        return rows

    def check(self) -> None:
        """Refuse what does not fit together, before anything is computed.

        Raises:
            UserError: naming the argument.
        """
        known = typing.get_args(ReadOut)
        wrong = [name for name in self.readouts if name not in known]
        if wrong or not self.readouts or len(set(self.readouts)) != len(self.readouts):
            given = " ".join(wrong or self.readouts) or "none"
            raise UserError(f"readouts: {given}: give different ones of {', '.join(known)}")
        if self.of_encoder and self.timesteps is not None:
            raise UserError("timesteps: they are for generators; an encoder sees clean images, leave them out")
        self._check_target()
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or len(self.seeds) > max(T_95):
            raise UserError(f"seeds: give 1 to {max(T_95)} different seeds, got {len(self.seeds)}")
        self._check_images("data", self.data)
        if self.test_data is not None:
            self._check_images("test_data", self.test_data)
            if self.test_data.class_names != self.data.class_names:
                raise UserError("test_data: its classes are not those of data; give images of the same classes")
        train, test = (dataset.labels[self.chosen(dataset)] for dataset in (self.data, self.measured))
        for seed in self.seeds:
            self.rows(train, test, seed)

    def _check_target(self) -> None:
        needy = [name for name in self.readouts if name in SIMILARITIES]
        if self.target is None and needy:
            raise UserError(f"readouts: {needy[0]} compares with an encoder; give it as target")
        if self.target is not None and not needy:
            raise UserError(
                f"target: {' and '.join(SIMILARITIES)} alone compare with it; read one of them, or drop it"
            )

    def _check_images(self, argument: str, dataset: ImageDataset) -> None:
        if len(dataset) < _LEAST_IMAGES:
            raise UserError(f"{argument}: {len(dataset)} images are too few; give at least {_LEAST_IMAGES}")
        if not dataset.num_classes and (needy := [name for name in self.readouts if name in PROBES]):
            raise UserError(
                f"{argument}: the images have no labels, which the read-out {needy[0]} needs; give class folders, or "
                "read-outs without labels (cknna, cka, lds, cds, rmsc, pck)"
            )


def split_rows(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (N',) for training and (M,) for testing, ascending, drawn by the seed.

    A fifth of each class is tested on, rounded, but at least one of two images; a single one is trained on.
    """
    keys = torch.rand(len(labels), generator=generator_for(seed, "representation split"))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        count = max(round(TEST_SHARE * len(rows)), 1) if len(rows) > 1 else 0
        test[rows[keys[rows].argsort()][:count]] = True
    return (~test).nonzero().flatten(), test.nonzero().flatten()
