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
from repagen.evaluation.reporting import software_versions
from repagen.evaluation.representation.correspondence import warp_images
from repagen.evaluation.representation.harvest import Change, FeatureType, Harvest
from repagen.evaluation.representation.hyperfeatures import HyperfeatureResult
from repagen.evaluation.representation.readouts import (
    PAIRS,
    PROBES,
    Harvests,
    ReadOut,
    ReadOutSettings,
    half_of_pairs,
    known_warps,
    mix_for_classes,
    mix_for_points,
    read_slice,
    unmoved_pck,
)
from repagen.evaluation.representation.request import TEST_SHARE, Request
from repagen.evaluation.representation.result import Reading, RepresentationResult
from repagen.evaluation.representation.sources import EncoderSource, FeatureSlice, FeatureSource
from repagen.evaluation.samples import DatasetImages
from repagen.randomness import generator_for


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
    `data` (at least one of two), drawn by each seed anew. What trains nothing looks at all images of `test_data`, or
    of `data` without it. A seed decides noise, split and probes; images and pairs are drawn by the first seed, so that
    all seeds see the same.

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
            target or the labels they need, a target that none needs, too few or too many images, neighbours or seeds,
            datasets of different classes.
    """
    started = time.monotonic()
    request = Request(
        subject=subject,
        data=data,
        test_data=test_data,
        readouts=tuple(readouts),
        blocks=blocks,
        timesteps=timesteps,
        target=target,
        num_images=num_images,
        seeds=tuple(seeds),
        null_label=null_label,
        batch_size=batch_size,
        settings=settings or ReadOutSettings(),
        dtype=dtype,
        cache=cache,
    )
    request.check()
    source = request.source(request.seeds[0])
    sweep = _Sweep(request)
    for seed in request.seeds:
        sweep.read(seed)
    return sweep.result(source, time.monotonic() - started)


@dataclass
class _Sweep:
    """What was found so far of what was asked for.

    Attributes:
        request: what was asked for.
        values: of each read-out and slice, one a seed.
        mixes: of each read-out that mixes slices, one a seed.
        counts: numbers of images, by what they are for.
        pixels: hashes of the images, by dataset.
        of_encoder: features of an encoder, which know no seed.
    """

    request: Request
    values: dict[tuple[ReadOut, FeatureSlice | None], list[float]] = field(default_factory=dict)
    mixes: dict[str, list[HyperfeatureResult]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    pixels: dict[str, str] = field(default_factory=dict)
    of_encoder: Harvests | None = None

    def read(self, seed: int) -> None:
        """Harvest and read all slices for one seed."""
        readouts, settings = self.request.readouts, self.request.settings
        harvests = self._harvests(seed)
        places = harvests.test.slices
        for place in places:
            for name, value in read_slice(harvests, place, readouts, settings).items():
                self.values.setdefault((name, place), []).append(value)
        for name, mix in (("hyperfeatures", mix_for_classes), ("hyperfeatures_pck", mix_for_points)):
            if name in readouts:
                result = mix(harvests, places, settings)
                self.mixes.setdefault(name, []).append(result)
                self.values.setdefault((typing.cast(ReadOut, name), None), []).append(result.accuracy)

    def _harvests(self, seed: int) -> Harvests:
        request = self.request
        if self.of_encoder is not None:  # the split alone knows the seed
            return self._split(self.of_encoder.train, self.of_encoder.test, seed, like=self.of_encoder)
        source = request.source(seed)
        train = request.harvest(source, request.data, request.chosen(request.data))
        self.pixels["data"] = train.pixels_sha256
        test = train
        if request.test_data is not None:
            test = request.harvest(source, request.test_data, request.chosen(request.test_data))
            self.pixels["test_data"] = test.pixels_sha256
        harvests = self._split(train, test, seed)
        if request.of_encoder:
            self.of_encoder = harvests
        return harvests

    def _split(self, train: Harvest, test: Harvest, seed: int, like: Harvests | None = None) -> Harvests:
        """Everything but the features themselves: rows, target, pairs. All but rows is taken from `like`."""
        train_rows, test_rows = self.request.rows(train.labels, test.labels, seed)
        if self.request.wants(PROBES):
            self.counts |= {"train": len(train_rows), "test": len(test_rows)}
        self.counts["measured"] = len(test)
        pair_rows, warped = (like.pair_rows, like.warped) if like else self._pairs(test, seed)
        target = like.target if like else self._target_features(test)
        return Harvests(seed, train, train_rows, test, test_rows, target, pair_rows, warped)

    def _target_features(self, test: Harvest) -> torch.Tensor | None:
        if self.request.target is None:
            return None
        source = EncoderSource(self.request.target, [-1])
        features = self.request.harvest(source, self.request.measured, test.indices.tolist())
        return features.pooled(source.slices[0])

    def _pairs(self, test: Harvest, seed: int) -> tuple[torch.Tensor, dict[str, Harvest]]:
        request = self.request
        if not request.wants(PAIRS):
            return torch.empty(0, dtype=torch.long), {}
        order = torch.randperm(len(test), generator=generator_for(request.seeds[0], "representation pairs"))
        rows = order[: request.settings.num_pairs(len(test))].sort().values
        self._count_pairs(len(rows))
        warped = {}
        for number, (name, warp) in enumerate(known_warps(test.image_size).items()):
            if name != "identity" or "pck_identity" in request.readouts:
                change = Change(f"{warp!r}", partial(warp_images, warp=warp))
                source = request.source(seed, draw=number + 1)
                warped[name] = request.harvest(source, request.measured, test.indices[rows].tolist(), change)
        return rows, warped

    def _count_pairs(self, count: int) -> None:
        self.counts["pairs"] = count
        if "hyperfeatures_pck" in self.request.readouts:
            half = half_of_pairs(count)
            self.counts |= {"pairs_train": half, "pairs_test": count - half}

    def result(self, source: FeatureSource, seconds: float) -> RepresentationResult:
        """All of it, with what it depends on.

        Args:
            source: what features were read from, with the noise of any seed.
            seconds: that it took.
        """
        request = self.request
        return RepresentationResult(
            subject={key: value for key, value in source.describe().items() if key not in ("seed", "draw")},
            target=EncoderSource(request.target, [-1]).describe() if request.target is not None else None,
            data=self.describe_data(),
            readouts=request.readouts,
            slices=tuple(source.slices),
            last=tuple(source.last),
            readings=self.readings(),
            mixes=self.mixes,
            seeds=request.seeds,
            settings=_described_settings(request),
            versions=software_versions(),
            seconds=seconds,
        )

    def readings(self) -> tuple[Reading, ...]:
        """All values, read-out by read-out in the order asked for."""
        return tuple(
            Reading(name, place, tuple(values))
            for wanted in self.request.readouts
            for (name, place), values in self.values.items()
            if name == wanted
        )

    def describe_data(self) -> dict[str, Any]:
        """The images: where from, how many, which for what."""
        facts: dict[str, Any] = {"data": self._described("data", self.request.data)}
        if self.request.test_data is not None:
            facts["test_data"] = self._described("test_data", self.request.test_data)
        elif self.request.wants(PROBES):
            facts["split"] = f"{TEST_SHARE:g} of each class for testing (at least 1 of 2), drawn by each seed"
        return {**facts, "images": self.counts}

    def _described(self, name: str, dataset: ImageDataset) -> dict[str, Any]:
        identity = {"fingerprint": dataset.fingerprint(), "pixels_sha256": self.pixels[name]}
        return {**DatasetImages(dataset).protocol, **identity}


def _described_settings(request: Request) -> dict[str, Any]:
    """Settings of the read-outs; with PCK, what features of mere position would get."""
    facts = {**asdict(request.settings), "features": request.dtype}
    if request.wants(("pck", "hyperfeatures_pck")):
        facts["pck_of_unmoved_points"] = unmoved_pck(request.measured.config.image_size, request.settings.pck_alpha)
    return {name: value for name, value in facts.items() if value is not None}
