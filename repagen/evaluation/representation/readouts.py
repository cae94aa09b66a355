"""The read-outs of a sweep by name, on features that are harvested already."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from repagen.errors import UserError
from repagen.evaluation.representation.correspondence import (
    Warp,
    affine_warp,
    flip_warp,
    identity_warp,
    pck,
    points_inside,
    regular_points,
    translation_warp,
    warp_pck,
    warp_points,
)
from repagen.evaluation.representation.harvest import Harvest
from repagen.evaluation.representation.hyperfeatures import (
    HyperfeatureResult,
    TokenPair,
    train_hyperfeature_correspondence,
    train_hyperfeature_probe,
)
from repagen.evaluation.representation.probes import ProbeResult, attentive_probe, knn_probe, linear_probe
from repagen.evaluation.representation.similarity import cknna, unbiased_cka
from repagen.evaluation.representation.sources import FeatureSlice
from repagen.evaluation.representation.spatial import SpatialStructure, spatial_structure

logger = logging.getLogger(__name__)

ReadOut = Literal[
    "linear", "knn", "attentive", "cknna", "cka", "lds", "cds", "rmsc", "pck", "pck_identity",
    "hyperfeatures", "hyperfeatures_pck",
]  # fmt: skip
PROBES: tuple[ReadOut, ...] = ("linear", "knn", "attentive", "hyperfeatures")
"""Those that are trained on labels."""
SIMILARITIES: tuple[ReadOut, ...] = ("cknna", "cka")
"""Those that need a target encoder."""
MIXES: tuple[ReadOut, ...] = ("hyperfeatures", "hyperfeatures_pck")
"""Those with one value for all slices together."""
SPATIAL: tuple[ReadOut, ...] = ("lds", "cds", "rmsc")
PAIRS: tuple[ReadOut, ...] = ("pck", "pck_identity", "hyperfeatures_pck")
"""Those that look at an image and a warped version of it."""

_PCK_IMAGES = 100
_CHUNK = 256  # images whose tokens are in float64 at once


@dataclass(frozen=True)
class ReadOutSettings:
    """How read-outs are trained and computed; see the functions of the same names.

    Attributes:
        linear_epochs: most iterations of L-BFGS; see `linear_probe`.
        attentive_epochs: passes of the attentive probe.
        knn_neighbours, knn_temperature: of the kNN vote.
        cknna_neighbours: k.
        pck_images: images that PCK looks at, drawn from those at hand by the first seed; None for 100, or all where
            there are fewer.
        pck_alpha: radius of a hit over the image's side.
        hyperfeature_width: features of the mix.
        hyperfeature_epochs: most iterations of L-BFGS, of the mix of classes and of each slice beside it.
        correspondence_epochs: passes of the mix that learns to match.
    """

    linear_epochs: int = 1000
    attentive_epochs: int = 30
    knn_neighbours: int = 20
    knn_temperature: float = 0.07
    cknna_neighbours: int = 10
    pck_images: int | None = None
    pck_alpha: float = 0.1
    hyperfeature_width: int = 64
    hyperfeature_epochs: int = 20
    correspondence_epochs: int = 10

    def num_pairs(self, measured: int) -> int:
        """Images that are warped, where so many are measured."""
        return min(_PCK_IMAGES, measured) if self.pck_images is None else self.pck_images

    def require_enough(
        self, readouts: Sequence[ReadOut], measured: int, labels: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        """Refuse what cannot be computed of so many images.

        Args:
            readouts: that are wanted.
            measured: images that those which train nothing look at.
            labels: of the training and the test images of `PROBES`; None where none is wanted.

        Raises:
            UserError: naming the setting, or `data`.
        """
        if "cknna" in readouts and not 1 <= self.cknna_neighbours < measured:
            raise UserError(
                f"settings.cknna_neighbours: must be from 1 to {measured - 1} with {measured} images, got "
                f"{self.cknna_neighbours}; give another number, or more images"
            )
        if labels is not None:
            _require_classes(*labels)
            if "knn" in readouts and not 1 <= self.knn_neighbours <= len(labels[0]):
                raise UserError(
                    f"settings.knn_neighbours: must be from 1 to the {len(labels[0])} training images, got "
                    f"{self.knn_neighbours}; give another number, or more images"
                )
        least = 2 if "hyperfeatures_pck" in readouts else 1
        if set(readouts) & set(PAIRS) and not least <= self.num_pairs(measured) <= measured:
            halves = "; hyperfeatures_pck learns from one half of them and is tested on the other" if least > 1 else ""
            raise UserError(
                f"settings.pck_images: must be from {least} to the {measured} images, got {self.num_pairs(measured)}"
                f"{halves}"
            )


def _require_classes(train: torch.Tensor, test: torch.Tensor) -> None:
    """Refuse labels that no probe can be trained on and tested with."""
    if not len(test):
        raise UserError(f"data: no class of the {len(train)} images has 2, one of them to test on; give more images")
    if len(train.unique()) < 2:
        raise UserError("data: the training images are all of one class, a probe needs at least 2; give more images")
    if absent := test[~torch.isin(test, train)].unique().tolist():
        raise UserError(
            f"data: the training images have none of the test images' class {absent[0]}; give more images, or "
            "the same classes"
        )


def known_warps(image_size: int) -> dict[str, Warp]:
    """The warps whose truth PCK knows, by name; all but `identity` move most points by more than 0.1 of the image."""
    size = (image_size, image_size)
    return {
        "identity": identity_warp(size),
        "shift": translation_warp(size, (image_size / 4, image_size / 8)),
        "turn": affine_warp(size, degrees=30),
        "flip": flip_warp(size),
    }


def unmoved_pck(image_size: int, alpha: float) -> float:
    """PCK of answering each point with itself, mean over the warps of `pck`: what features of mere position get."""
    values = []
    for name, warp in known_warps(image_size).items():
        if name != "identity":
            points, truth = _points(warp)
            values.append(pck(points, truth, image_size=warp.image_size, alpha=alpha))
    return sum(values) / len(values)


@dataclass
class Harvests:
    """Everything that read-outs of one seed look at.

    Attributes:
        seed: of probes.
        train, train_rows: features, and which of their images probes are trained on.
        test, test_rows: those that probes are tested on. What trains nothing looks at all images of `test`.
        target: mean tokens (N, D) of the target encoder of all images of `test`; None without target.
        pair_rows: images of `test` that were warped.
        warped: these images, by the name of the warp; with other noise than the unwarped.
    """

    seed: int
    train: Harvest
    train_rows: torch.Tensor
    test: Harvest
    test_rows: torch.Tensor
    target: torch.Tensor | None
    pair_rows: torch.Tensor
    warped: dict[str, Harvest]

    @property
    def labels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels of the training and of the test images of probes."""
        return self.train.labels[self.train_rows], self.test.labels[self.test_rows]

    def tokens(self, place: FeatureSlice) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of the training and of the test images of probes."""
        return self.train.tokens(place)[self.train_rows], self.test.tokens(place)[self.test_rows]


def read_slice(
    harvests: Harvests, place: FeatureSlice, readouts: Sequence[ReadOut], settings: ReadOutSettings
) -> dict[ReadOut, float]:
    """Compute read-outs of one slice, all but `MIXES`."""
    wanted = set(readouts)
    return {
        **_probe(harvests, place, wanted, settings),
        **_measure(harvests, place, wanted, settings),
        **_match(harvests, place, wanted, settings),
    }


def _probe(
    harvests: Harvests, place: FeatureSlice, wanted: set[ReadOut], settings: ReadOutSettings
) -> dict[ReadOut, float]:
    if not wanted & {"linear", "knn", "attentive"}:
        return {}
    train, test = harvests.tokens(place)
    train_labels, test_labels = harvests.labels
    pooled = (train.float().mean(dim=1), train_labels, test.float().mean(dim=1), test_labels)
    seed = harvests.seed
    compute: dict[ReadOut, Callable[[], float]] = {
        "linear": lambda: _linear(linear_probe(*pooled, epochs=settings.linear_epochs, seed=seed), place),
        "knn": lambda: (
            knn_probe(*pooled, neighbours=settings.knn_neighbours, temperature=settings.knn_temperature).accuracy
        ),
        "attentive": lambda: (
            attentive_probe(
                train, train_labels, test, test_labels, epochs=settings.attentive_epochs, seed=seed
            ).accuracy
        ),
    }
    return {name: function() for name, function in compute.items() if name in wanted}


def _linear(result: ProbeResult, place: FeatureSlice) -> float:
    if not result.converged:
        logger.warning("linear probe of %s: not converged; its accuracy may move with more linear_epochs", place)
    return result.accuracy


def _measure(
    harvests: Harvests, place: FeatureSlice, wanted: set[ReadOut], settings: ReadOutSettings
) -> dict[ReadOut, float]:
    found: dict[ReadOut, float] = {}
    if wanted & set(SIMILARITIES):
        pooled, target = harvests.test.pooled(place), harvests.target
        assert target is not None
        if "cknna" in wanted:
            found["cknna"] = cknna(pooled, target, settings.cknna_neighbours)
        if "cka" in wanted:
            found["cka"] = unbiased_cka(pooled, target)
    if wanted & set(SPATIAL):
        structure = _structure(harvests.test.tokens(place), harvests.test.grid)
        found |= {name: getattr(structure, name) for name in SPATIAL if name in wanted}
    return found


def _structure(tokens: torch.Tensor, grid: tuple[int, int]) -> SpatialStructure:
    """`spatial_structure` in parts: all three scores are means over images."""
    parts = [(len(part), spatial_structure(part, grid)) for part in tokens.split(_CHUNK)]

    def mean(name: str) -> float:
        return sum(count * getattr(part, name) for count, part in parts) / len(tokens)

    return SpatialStructure(lds=mean("lds"), cds=mean("cds"), rmsc=mean("rmsc"))


def _match(
    harvests: Harvests, place: FeatureSlice, wanted: set[ReadOut], settings: ReadOutSettings
) -> dict[ReadOut, float]:
    if not wanted & {"pck", "pck_identity"}:
        return {}
    source = harvests.test.tokens(place)[harvests.pair_rows]
    values = {
        name: warp_pck(
            source,
            harvests.warped[name].tokens(place),
            harvests.test.grid,
            warp,
            alpha=settings.pck_alpha,
        )
        for name, warp in known_warps(harvests.test.image_size).items()
        if ("pck_identity" if name == "identity" else "pck") in wanted
    }
    found: dict[ReadOut, float] = {}
    if "pck_identity" in wanted:
        found["pck_identity"] = values.pop("identity")
    if values:
        found["pck"] = sum(values.values()) / len(values)
    return found


def mix_for_classes(
    harvests: Harvests, places: Sequence[FeatureSlice], settings: ReadOutSettings
) -> HyperfeatureResult:
    """Read-out `hyperfeatures`: classes from a learned mix of all slices, beside each slice alone."""
    sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for place in places:  # the trainer takes means over tokens; taken here, one slice is in memory at a time
        for side, tokens in zip(sides, harvests.tokens(place), strict=True):
            side.append(tokens.float().mean(dim=1, keepdim=True))
    train_labels, test_labels = harvests.labels
    return train_hyperfeature_probe(
        sides[0],
        train_labels,
        sides[1],
        test_labels,
        width=settings.hyperfeature_width,
        epochs=settings.hyperfeature_epochs,
        seed=harvests.seed,
    )


def half_of_pairs(count: int) -> int:
    """How many of so many warped images `hyperfeatures_pck` learns from; it is tested on the others."""
    return count // 2


def mix_for_points(
    harvests: Harvests, places: Sequence[FeatureSlice], settings: ReadOutSettings
) -> HyperfeatureResult:
    """Read-out `hyperfeatures_pck`: points matched by a learned mix, trained on half of the warped images."""
    pairs: list[list[TokenPair]] = [[] for _ in harvests.pair_rows]
    sources = [harvests.test.tokens(place)[harvests.pair_rows] for place in places]
    for name, warp in known_warps(harvests.test.image_size).items():
        if name == "identity":
            continue
        points, truth = _points(warp)
        targets = [harvests.warped[name].tokens(place) for place in places]
        for number, of_image in enumerate(pairs):
            source, target = ([tokens[number] for tokens in side] for side in (sources, targets))
            of_image.append(TokenPair(source, target, points, truth))
    half = half_of_pairs(len(pairs))
    train, test = ([pair for of_image in part for pair in of_image] for part in (pairs[:half], pairs[half:]))
    size = harvests.test.image_size
    return train_hyperfeature_correspondence(
        train,
        test,
        grid=harvests.test.grid,
        image_size=(size, size),
        width=settings.hyperfeature_width,
        epochs=settings.correspondence_epochs,
        seed=harvests.seed,
        alpha=settings.pck_alpha,
    )


def _points(warp: Warp) -> tuple[torch.Tensor, torch.Tensor]:
    """The regular points that a warp keeps in the image, and where they go."""
    points = regular_points(warp.image_size)
    points = points[points_inside(warp_points(points, warp), warp.image_size)]
    return points, warp_points(points, warp)
