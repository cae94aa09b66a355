"""How much memory an evaluation takes, beside networks and the images in hand."""

from __future__ import annotations

from collections.abc import Mapping

from repagen.evaluation.measures import feature_of, needs_of
from repagen.evaluation.metrics.mind import DIRECTIONS
from repagen.evaluation.moments import ROWS
from repagen.evaluation.protocol import EvaluationProtocol, MetricName

Dimensions = Mapping[str, Mapping[str, int]]
_MIND_DIRECTIONS = 1000
_FLOAT32, _FLOAT64 = 4, 8


def kept_bytes(protocol: EvaluationProtocol, dimensions: Dimensions, *, reference: bool) -> int:
    """Return the bytes of the features and covariances that are kept of a side, at most.

    Args:
        protocol: names the metrics.
        dimensions: space => feature, as `pool`, => number of features D.
        reference: of the reference images, not of the samples.
    """
    needs = needs_of(protocol, dimensions, reference=reference)
    kept = sum(
        _FLOAT32 * _width(feature, dimensions) * _limited(protocol, count, reference)
        for feature, count in needs.kept.items()
    )
    return kept + sum(_FLOAT64 * _width(feature, dimensions) ** 2 for feature in needs.moments)


def working_bytes(protocol: EvaluationProtocol, dimensions: Dimensions) -> int:
    """Return the bytes that computing the metrics takes on top: what the largest one does, and factored references.

    Arguments are those of `kept_bytes`.
    """
    images = max(_images(protocol, dimensions, reference) for reference in (False, True))
    largest = max(
        (
            _of_metric(protocol, metric, _width(feature_of(metric, space), dimensions), images)
            for space in protocol.spaces
            for metric in space.metrics
        ),
        default=0,
    )
    factored = needs_of(protocol, dimensions).moments
    return largest + sum(_FLOAT64 * _width(feature, dimensions) ** 2 for feature in factored)


def _of_metric(protocol: EvaluationProtocol, metric: MetricName, width: int, images: int) -> int:
    """Bytes of the arrays that a metric has at once; how many of a kind is measured, see the test."""
    block, rows = ROWS**2, ROWS * width
    match metric:
        case "fd" | "sfid":
            return 7 * _FLOAT64 * width**2
        case "precision_recall":
            return _FLOAT32 * (16 * block + 2 * rows)
        case "density_coverage":
            return _FLOAT64 * (8 * block + 9 * rows)
        case "cmmd":
            return _FLOAT64 * (2 * block + 6 * rows)
        case "mind":
            return _FLOAT64 * (6 * DIRECTIONS * images + 2 * rows + 2 * _MIND_DIRECTIONS * width)
        case "kid":
            size = protocol.kernel.subset_size
            return _FLOAT32 * (5 * size**2 + 2 * size * width)
    return 0


def _images(protocol: EvaluationProtocol, dimensions: Dimensions, reference: bool) -> int:
    counts = needs_of(protocol, dimensions, reference=reference).kept.values()
    return max((_limited(protocol, count, reference) for count in counts), default=0)


def _limited(protocol: EvaluationProtocol, count: int, reference: bool) -> int:
    return count if reference or protocol.num_samples is None else min(count, protocol.num_samples)


def _width(feature: str, dimensions: Dimensions) -> int:
    space, name = feature.split(".")
    return dimensions[space][name]
