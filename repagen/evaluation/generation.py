"""How far generated images are from real ones: the figures, and beside them everything they depend on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from repagen.evaluation.extraction import Extraction, extract
from repagen.evaluation.features import ExtractorIdentity, FeatureExtractor, is_published_inception
from repagen.evaluation.metrics.frechet import frechet_distance
from repagen.evaluation.moments import Statistics
from repagen.evaluation.metrics.precision_recall import PrecisionRecall, precision_recall
from repagen.evaluation.reference import ReferenceStatistics
from repagen.evaluation.reporting import aligned, described, distance_remarks, software_versions
from repagen.evaluation.samples import ImageSource

_NEIGHBOURS = 3


@dataclass(frozen=True)
class GenerationResult:
    """Figures and protocol of one evaluation.

    Attributes:
        frechet_distance: in squared units of the features; with published Inception weights the FID.
        precision: fraction of samples inside the manifold of the reference (k = 3), None without reference images.
        recall: fraction of the reference inside the manifold of the samples, None without reference images.
        num_samples: images behind the samples' statistics.
        num_reference: images behind the reference's statistics; None where a file does not say it.
        num_precision_recall: (samples, reference images) behind precision and recall.
        extractor: what made the features.
        samples: protocol and pixel hash of the samples.
        reference: protocol and hash of the reference.
        remarks: why the distance must not stand beside figures from elsewhere; empty where it may.
        versions: of the packages involved, and the device.
        reference_statistics: for `save_statistics`.
    """

    frechet_distance: float
    precision: float | None
    recall: float | None
    num_samples: int
    num_reference: int | None
    num_precision_recall: tuple[int, int] | None
    extractor: ExtractorIdentity
    samples: dict[str, Any]
    reference: dict[str, Any]
    remarks: tuple[str, ...]
    versions: dict[str, str]
    reference_statistics: Statistics = field(repr=False, compare=False)

    @property
    def comparable(self) -> bool:
        """Whether the distance may stand beside figures made elsewhere by the same protocol."""
        return not self.remarks

    def as_dict(self) -> dict[str, Any]:
        """Everything but the reference's matrices, ready for JSON."""
        shown = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "reference_statistics"}
        return {**shown, "extractor": self.extractor.as_dict(), "comparable": self.comparable}

    def table(self) -> str:
        """The result as aligned lines of text."""
        rows = [
            (self._distance_name(), f"{self.frechet_distance:.6g}{'' if self.comparable else '  (not comparable)'}")
        ]
        if self.precision is not None and self.recall is not None and self.num_precision_recall is not None:
            counts = "{} samples, {} reference images".format(*self.num_precision_recall)
            rows.append(("precision, recall", f"{self.precision:.4f}, {self.recall:.4f} (k={_NEIGHBOURS}; {counts})"))
        rows += [
            ("N", f"{self.num_samples} samples, {self.num_reference or 'unknown number of'} reference images"),
            ("extractor", str(self.extractor)),
            ("samples", described(self.samples)),
            ("reference", described(self.reference)),
            ("versions", described(self.versions)),
            *(("not comparable", remark) for remark in self.remarks),
        ]
        return aligned(rows)

    def _distance_name(self) -> str:
        return "FID" if is_published_inception(self.extractor) else "Frechet distance"


def evaluate_generation(
    samples: ImageSource,
    reference: ImageSource | ReferenceStatistics,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 50,
    max_bad_images: int = 0,
    precision_recall_images: int = 10_000,
) -> GenerationResult:
    """Compare samples with a reference.

    Under `accelerate launch` every process takes a share of the images, and all return the same result.

    Args:
        samples: generated images; see `repagen.evaluation.samples`.
        reference: real images of the same size, or statistics made with the same extractor.
        extractor: what turns images into features.
        batch_size: images at once, per process; also the batch of a pipeline that samples on the fly.
        max_bad_images: unreadable images allowed on each side; they are left out and listed.
        precision_recall_images: use this many first images of each side for precision and recall; 0 leaves them out.

    Raises:
        UserError: on images that cannot be read, differ in size, or give features that are not finite; on statistics
            of another extractor; on fewer than two images on a side.
    """
    extract_from = partial(
        extract,
        extractor=extractor,
        batch_size=batch_size,
        max_bad_images=max_bad_images,
        keep_features=precision_recall_images,
    )
    # The reference first: where it fails, no hours of sampling are lost.
    if isinstance(reference, ReferenceStatistics):
        reference.require_extractor(extractor.identity)
        carried = reference.images if precision_recall_images else None
        real = extract_from(carried, title="reference") if carried else None
        statistics, facts = reference.statistics, _statistics_facts(reference)
    else:
        real = extract_from(reference, title="reference")
        statistics, facts = real.statistics, _image_facts(reference, real)
    generated = extract_from(samples, title="samples", expected_size=real.image_size if real else None)
    near = _precision_recall(generated, real) if real else None
    return GenerationResult(
        frechet_distance=frechet_distance(generated.statistics, statistics),
        precision=near.precision if near else None,
        recall=near.recall if near else None,
        num_samples=generated.count,
        num_reference=statistics.count,
        num_precision_recall=(len(generated.features), len(real.features)) if near and real else None,
        extractor=extractor.identity,
        samples=_image_facts(samples, generated),
        reference=facts,
        remarks=distance_remarks(
            {"samples": generated.count, "reference images": statistics.count},
            statistics.dimension,
            extractor.identity,
        ),
        versions=software_versions(),
        reference_statistics=statistics,
    )


def _precision_recall(generated: Extraction, real: Extraction) -> PrecisionRecall | None:
    if min(len(generated.features), len(real.features)) <= _NEIGHBOURS:
        return None
    return precision_recall(generated.features, real.features, _NEIGHBOURS)


def _image_facts(source: ImageSource, extraction: Extraction) -> dict[str, Any]:
    height, width = extraction.image_size
    left_out = {"left_out": [image.name for image in extraction.unreadable]} if extraction.unreadable else {}
    return {**source.protocol, "size": f"{width}x{height}", "pixels_sha256": extraction.pixels_sha256, **left_out}


def _statistics_facts(reference: ReferenceStatistics) -> dict[str, Any]:
    made_from = reference.protocol or {"extractor": "not recorded, taken for Inception (ADM layout)"}
    return {"kind": "statistics", "path": str(reference.path), "sha256": reference.sha256, "of": made_from}
