"""What an evaluation of reconstructions returns: figures, the figures of single images, and what they depend on."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from repagen.evaluation.extractor import ExtractorIdentity
from repagen.evaluation.inception import is_published_inception
from repagen.evaluation.reporting import aligned, described
from repagen.evaluation.result import SCHEMA

Metric = Literal["psnr", "ssim", "lpips", "rfid"]
PairedMetric = Literal["psnr", "ssim", "lpips"]


@dataclass(frozen=True)
class Spread:
    """Spread of a metric over the images: standard deviation (division by N - 1), and that of the mean."""

    std: float
    standard_error: float


@dataclass(frozen=True)
class ImageFigures:
    """The paired metrics of one image.

    Attributes:
        index: of the image in its source.
        name: what the source calls it.
        values: metric => value.
    """

    index: int
    name: str
    values: dict[PairedMetric, float]


@dataclass(frozen=True)
class ReconstructionResult:
    """Figures and protocol of one evaluation.

    Attributes:
        metrics: metric => figure; of paired metrics the mean over images. PSNR in dB; rFID in squared units of the
            features, which is the rFID of the literature with published Inception weights.
        spread: paired metric => its spread over the images.
        num_samples: images behind every figure.
        per_image: the paired metrics of single images, in the order of their indices; empty where none was asked for.
        spaces: what made the features of rFID, `inception` or `encoder` => its identity; empty without rFID.
        definitions: how each paired metric is computed.
        samples: the reconstructions: autoencoder, hash of its weights, dtype, hash of the pixels, rounding.
        reference: the originals: protocol and hash of the pixels.
        remarks: why rFID must not stand beside figures from elsewhere; empty where it may.
        versions: of the packages involved, and the device.
        wall_time_s: of the evaluation, in seconds.
    """

    metrics: dict[Metric, float]
    spread: dict[PairedMetric, Spread]
    num_samples: int
    spaces: dict[str, ExtractorIdentity]
    definitions: dict[PairedMetric, str]
    samples: dict[str, Any]
    reference: dict[str, Any]
    remarks: tuple[str, ...]
    versions: dict[str, str]
    wall_time_s: float
    per_image: tuple[ImageFigures, ...] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the figures of single images, ready for JSON."""
        shown = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "per_image"}
        return {
            "schema": SCHEMA,
            "kind": "reconstruction",
            **shown,
            "spread": {metric: asdict(spread) for metric, spread in self.spread.items()},
            "spaces": {name: identity.as_dict() for name, identity in self.spaces.items()},
            "remarks": list(self.remarks),
        }

    def per_image_csv(self) -> str:
        """The figures of single images as CSV: index, name, and a column for each paired metric."""
        content = io.StringIO()
        writer = csv.writer(content, lineterminator="\n")
        writer.writerow(["index", "name", *self.spread])
        writer.writerows([image.index, image.name, *image.values.values()] for image in self.per_image)
        return content.getvalue()

    def table(self) -> str:
        """The result as aligned lines of text."""
        rows = [*self._distance_rows(), *self._paired_rows()]
        rows += [
            ("N", f"{self.num_samples} images, each with its reconstruction"),
            *((f"space {space}", str(identity)) for space, identity in self.spaces.items()),
            ("originals", described(self.reference)),
            ("reconstructions", described(self.samples)),
            ("versions", described(self.versions)),
            ("wall time", f"{self.wall_time_s:.1f} s"),
            *(("not comparable", remark) for remark in self.remarks),
        ]
        return aligned(rows)

    def _distance_rows(self) -> list[tuple[str, str]]:
        if "rfid" not in self.metrics:
            return []
        published = all(is_published_inception(identity) for identity in self.spaces.values())
        mark = "  (not comparable)" if self.remarks else ""
        return [("rFID" if published else "Frechet distance", f"{self.metrics['rfid']:.6g}{mark}")]

    def _paired_rows(self) -> list[tuple[str, str]]:
        rows = []
        for metric, spread in self.spread.items():
            digits, unit = (2, " dB") if metric == "psnr" else (4, "")
            figure = f"{self.metrics[metric]:.{digits}f} +- {spread.standard_error:.{digits}f}{unit}"
            rows.append(
                (metric.upper(), f"{figure}  (std {spread.std:.{digits}f} over images; {self.definitions[metric]})")
            )
        return rows


def spreads(per_image: Mapping[PairedMetric, torch.Tensor]) -> dict[PairedMetric, Spread]:
    """Return the spread of each metric from its values (N,) float64, N >= 2."""
    deviations = {metric: values.std().item() for metric, values in per_image.items()}
    return {metric: Spread(std, std / len(per_image[metric]) ** 0.5) for metric, std in deviations.items()}
