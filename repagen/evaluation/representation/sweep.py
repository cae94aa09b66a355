"""Every read-out of every slice of a generator or an encoder, over seeds."""

from __future__ import annotations

import time
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from repagen.data import ImageDataset
from repagen.encoders import VisionEncoder
from repagen.errors import UserError
from repagen.evaluation.reporting import software_versions
from repagen.evaluation.representation.correspondence import warp_images
from repagen.evaluation.representation.harvest import Change, FeatureType, Harvest, harvest
from repagen.evaluation.representation.hyperfeatures import HyperfeatureResult
from repagen.evaluation.representation.readouts import (
    PAIRS,
    PROBES,
    SIMILARITIES,
    Harvests,
    ReadOut,
    ReadOutSettings,
    known_warps,
    mix_for_classes,
    mix_for_points,
    read_slice,
    unmoved_pck,
)
from repagen.evaluation.representation.result import T_95, Reading, RepresentationResult
from repagen.evaluation.representation.sources import EncoderSource, FeatureSlice, FeatureSource, GeneratorSource
from repagen.evaluation.samples import DatasetImages
from repagen.randomness import generator_for

DEFAULT_TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
_TEST_SHARE = 0.2
_LEAST_IMAGES = 8


def evaluate_representation(
    subject: Any,
    data: ImageDataset,
    *,
    test_data: ImageDataset | None = None,
    readouts: Sequence[ReadOut] = ("linear", "knn"),
    blocks: Sequence[int] | None = None,
    timesteps: Sequence[float] | None = None,
    target: VisionEncoder | None = None,
    num_images: int | None = None,
    seeds: Sequence[int] = (0,),
    null_label: bool = True,
    batch_size: int = 50,
    settings: ReadOutSettings | None = None,
    dtype: FeatureType = "float32",
    cache: str | Path | None = None,
) -> RepresentationResult:
    """Read what features know.

    Probes are trained on `data` and tested on `test_data`; without it, on a fifth of the images of each class of
    `data`, drawn by each seed anew. What trains nothing looks at all images of `test_data`, or of `data` without it. A
    seed decides noise, split and probes; images and pairs are drawn by the first seed, so that all seeds see the same.

    Args:
        subject: a `ClassToImagePipeline`, or a `VisionEncoder`, on its device.
        data: images.
        test_data: other images of the same classes.
        readouts: names of `ReadOut`.
        blocks: of a generator, counted from 1; or layers of an encoder, counted from 0. None for all.
        timesteps: t in [0, 1] of a generator's input; `DEFAULT_TIMESTEPS` by default. None for an encoder.
        target: the encoder that `cknna` and `cka` compare with: mean patch token of its last layer.
        num_images: use so many images of each dataset, drawn at random.
        seeds: of which 10 at most.
        null_label: see `GeneratorSource`.
        batch_size: images at once.
        settings: of the read-outs.
        dtype: in which features are stored.
        cache: folder that keeps features; see `FeatureCache`.

    Raises:
        UserError: as `GeneratorSource`, `EncoderSource` and the read-outs; unknown read-outs, those without the
            target or the labels they need, too few or too many images or seeds, datasets of different classes.
    """
    started = time.monotonic()
    settings = settings or ReadOutSettings()
    _check(subject, data, test_data, readouts, timesteps, target, seeds)
    sweep = _Sweep(
        subject, data, test_data, tuple(readouts), blocks, timesteps, target, num_images, tuple(seeds),
        null_label, settings, partial(harvest, batch_size=batch_size, dtype=dtype, cache=cache),
    )  # fmt: skip
    for seed in seeds:
        sweep.read(seed)
    source = sweep.source(seeds[0])
    return RepresentationResult(
        subject={key: value for key, value in source.describe().items() if key not in ("seed", "draw")},
        target=EncoderSource(target, [-1]).describe() if target is not None and sweep.wants(SIMILARITIES) else None,
        data=sweep.describe_data(),
        readouts=sweep.readouts,
        slices=tuple(source.slices),
        last=tuple(source.last),
        readings=sweep.readings(),
        mixes=sweep.mixes,
        seeds=sweep.seeds,
        settings=sweep.describe_settings() | {"features": dtype},
        versions=software_versions(),
        seconds=time.monotonic() - started,
    )


@dataclass
class _Sweep:
    """The arguments of `evaluate_representation`, and what was found so far."""

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
    settings: ReadOutSettings
    harvest: Any
    values: dict[tuple[ReadOut, FeatureSlice | None], list[float]] = field(default_factory=dict)
    mixes: dict[str, list[HyperfeatureResult]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    _of_encoder: Harvests | None = None

    def wants(self, readouts: Sequence[ReadOut]) -> bool:
        return any(name in readouts for name in self.readouts)

    def source(self, seed: int, draw: int = 0) -> FeatureSource:
        if isinstance(self.subject, VisionEncoder):
            return EncoderSource(self.subject, self.blocks)
        times = DEFAULT_TIMESTEPS if self.timesteps is None else self.timesteps
        return GeneratorSource(
            self.subject, blocks=self.blocks, timesteps=times, seed=seed, null_label=self.null_label, draw=draw
        )

    def read(self, seed: int) -> None:
        """Harvest and read all slices for one seed."""
        harvests = self._harvests(seed)
        places = harvests.test.slices
        for place in places:
            for name, value in read_slice(harvests, place, self.readouts, self.settings).items():
                self.values.setdefault((name, place), []).append(value)
        for name, mix in (("hyperfeatures", mix_for_classes), ("hyperfeatures_pck", mix_for_points)):
            if name in self.readouts:
                result = mix(harvests, places, self.settings)
                self.mixes.setdefault(name, []).append(result)
                self.values.setdefault((typing.cast(ReadOut, name), None), []).append(result.accuracy)

    def _harvests(self, seed: int) -> Harvests:
        if self._of_encoder is not None:  # an encoder's features know no seed, the split does
            return self._split(self._of_encoder.train, self._of_encoder.test, seed, like=self._of_encoder)
        source = self.source(seed)
        train = self.harvest(source, self.data, indices=self._chosen(self.data))
        test = train
        if self.test_data is not None:
            test = self.harvest(source, self.test_data, indices=self._chosen(self.test_data))
        harvests = self._split(train, test, seed)
        if isinstance(self.subject, VisionEncoder):
            self._of_encoder = harvests
        return harvests

    def _split(self, train: Harvest, test: Harvest, seed: int, like: Harvests | None = None) -> Harvests:
        """Everything but the features themselves: rows, target, pairs. All but rows is taken from `like`."""
        train_rows, test_rows = torch.arange(len(train)), torch.arange(len(test))
        if self.test_data is None and self.wants(PROBES):
            train_rows, test_rows = split_rows(train.labels, seed)
        if self.wants(PROBES):
            self.counts |= {"train": len(train_rows), "test": len(test_rows)}
        self.counts["measured"] = len(test)
        pair_rows, warped = (like.pair_rows, like.warped) if like else self._pairs(test, seed)
        target = like.target if like else self._target_features(test)
        return Harvests(seed, train, train_rows, test, test_rows, target, pair_rows, warped)

    @property
    def _measured(self) -> ImageDataset:
        return self.data if self.test_data is None else self.test_data

    def _target_features(self, test: Harvest) -> torch.Tensor | None:
        if self.target is None or not self.wants(SIMILARITIES):
            return None
        source = EncoderSource(self.target, [-1])
        features = self.harvest(source, self._measured, indices=test.indices.tolist())
        return features.pooled(source.slices[0])

    def _pairs(self, test: Harvest, seed: int) -> tuple[torch.Tensor, dict[str, Harvest]]:
        if not self.wants(PAIRS):
            return torch.empty(0, dtype=torch.long), {}
        order = torch.randperm(len(test), generator=generator_for(self.seeds[0], "representation pairs"))
        rows = order[: self.settings.pck_images].sort().values
        self.counts["pairs"] = len(rows)
        warped = {}
        for number, (name, warp) in enumerate(known_warps(test.image_size).items()):
            if name != "identity" or "pck_identity" in self.readouts:
                change = Change(f"{warp!r}", partial(warp_images, warp=warp))
                source = self.source(seed, draw=number + 1)
                warped[name] = self.harvest(source, self._measured, indices=test.indices[rows].tolist(), change=change)
        return rows, warped

    def _chosen(self, dataset: ImageDataset) -> list[int]:
        if self.num_images is None or self.num_images == len(dataset):
            return list(range(len(dataset)))
        if self.num_images < _LEAST_IMAGES:
            raise UserError(f"--num-images {self.num_images}: too few; give at least {_LEAST_IMAGES}")
        if self.num_images > len(dataset):
            raise UserError(f"--num-images {self.num_images}: the dataset has {len(dataset)} images; give fewer")
        order = torch.randperm(len(dataset), generator=generator_for(self.seeds[0], "representation images"))
        return order[: self.num_images].sort().values.tolist()

    def readings(self) -> tuple[Reading, ...]:
        """All values, read-out by read-out in the order asked for."""
        return tuple(
            Reading(name, place, tuple(values))
            for wanted in self.readouts
            for (name, place), values in self.values.items()
            if name == wanted
        )

    def describe_data(self) -> dict[str, Any]:
        """The images: where from, how many, which for what."""
        facts: dict[str, Any] = {"data": _described_dataset(self.data)}
        if self.test_data is not None:
            facts["test_data"] = _described_dataset(self.test_data)
        elif self.wants(PROBES):
            facts["split"] = f"{_TEST_SHARE:g} of each class for testing, drawn by each seed"
        return {**facts, "images": self.counts}

    def describe_settings(self) -> dict[str, Any]:
        """Settings of the read-outs; with PCK, what features of mere position would get."""
        facts = asdict(self.settings)
        if "pck" in self.readouts or "hyperfeatures_pck" in self.readouts:
            facts["pck_of_unmoved_points"] = unmoved_pck(self._measured.config.image_size, self.settings.pck_alpha)
        return facts


def split_rows(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (N',) for training and (M,) for testing: a fifth of each class, rounded, drawn by the seed; ascending."""
    keys = torch.rand(len(labels), generator=generator_for(seed, "representation split"))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        test[rows[keys[rows].argsort()][: round(_TEST_SHARE * len(rows))]] = True
    return (~test).nonzero().flatten(), test.nonzero().flatten()


def _check(
    subject: Any,
    data: ImageDataset,
    test_data: ImageDataset | None,
    readouts: Sequence[str],
    timesteps: Sequence[float] | None,
    target: VisionEncoder | None,
    seeds: Sequence[int],
) -> None:
    """Refuse what does not fit together, before anything is computed."""
    known = typing.get_args(ReadOut)
    wrong = [name for name in readouts if name not in known]
    if wrong or not readouts or len(set(readouts)) != len(readouts):
        raise UserError(
            f"--readouts {' '.join(wrong or readouts) or 'none'}: give different ones of {', '.join(known)}"
        )
    if isinstance(subject, VisionEncoder) and timesteps is not None:
        raise UserError("--timesteps is for generators; an encoder sees clean images, leave it out")
    if target is None and (needy := [name for name in readouts if name in SIMILARITIES]):
        raise UserError(f"--readouts {needy[0]} compares with an encoder; name one with --target")
    if not seeds or len(set(seeds)) != len(seeds) or len(seeds) > max(T_95):
        raise UserError(f"--seeds: give 1 to {max(T_95)} different seeds, got {len(seeds)}")
    for option, dataset in (("--data", data), ("--test-data", test_data)):
        if dataset is None:
            continue
        if len(dataset) < _LEAST_IMAGES:
            raise UserError(f"{option}: {len(dataset)} images are too few; give at least {_LEAST_IMAGES}")
        if not dataset.num_classes and (needy := [name for name in readouts if name in PROBES]):
            raise UserError(
                f"{option}: the images have no labels, which --readouts {needy[0]} needs; give class folders, or "
                "read-outs without labels (cknna, cka, lds, cds, rmsc, pck)"
            )
    if test_data is not None and test_data.class_names != data.class_names:
        raise UserError("--test-data: its classes are not those of --data; give images of the same classes")


def _described_dataset(dataset: ImageDataset) -> dict[str, Any]:
    return {**DatasetImages(dataset).protocol, "fingerprint": dataset.fingerprint()}
