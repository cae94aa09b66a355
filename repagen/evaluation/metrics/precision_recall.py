"""Improved precision and recall (1904.06991): how much of each set lies inside the other's neighbourhoods."""

from __future__ import annotations

from dataclasses import dataclass

from repagen.evaluation.metrics.pairs import given_precision, neighbourhood_pair
from repagen.evaluation.moments import Features

_ROWS = 2048  # rows of a distance matrix in memory at once


@dataclass(frozen=True)
class PrecisionRecall:
    """Fractions in [0, 1]: precision = samples near some real image, recall = real images near some sample."""

    precision: float
    recall: float


def precision_recall(samples: Features, reference: Features, neighbours: int = 3) -> PrecisionRecall:
    """Compute Eq. 2 of 1904.06991 with torch-fidelity, edges of balls included.

    Float32 features are computed with in float32, as torch-fidelity does, so that the figures agree; float64 features
    in float64.

    Args:
        samples: features (N, D) of generated images.
        reference: features (M, D) of real images.
        neighbours: k; a point's ball reaches its k-th nearest other point of its own set (ADM: 3).

    Raises:
        UserError: when a set has no more than k points, k is below 1, features are not finite (the row is named), or
            the numbers of features differ.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    generated, real = neighbourhood_pair(samples, reference, metric="precision and recall", neighbours=neighbours)
    dtype = given_precision(samples, reference)
    figures = prc_features_to_metric(
        generated.to(dtype),
        real.to(dtype),
        prc_neighborhood=neighbours,
        prc_batch_size=_ROWS,
        save_cpu_ram=True,  # by blocks of rows; its other way holds all pairs at once
        verbose=False,
    )
    return PrecisionRecall(figures[KEY_METRIC_PRECISION], figures[KEY_METRIC_RECALL])
