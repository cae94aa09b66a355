from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from repagen.errors import UserError
from repagen.evaluation.metrics.density_coverage import density_coverage
from repagen.evaluation.metrics.kernel_distance import clip_mmd, kernel_inception_distance
from repagen.evaluation.metrics.mind import monge_inception_distance
from repagen.evaluation.metrics.pairs import feature_pair
from repagen.evaluation.metrics.precision_recall import precision_recall
from repagen.evaluation.moments import Features

Metric = Callable[[Features, Features], object]


def kid(samples: Features, reference: Features) -> object:
    return kernel_inception_distance(samples, reference, subset_size=10)


METRICS: list[tuple[Metric, str, int]] = [
    (precision_recall, "precision and recall with k=3", 4),
    (density_coverage, "density and coverage with k=5", 6),
    (kid, "KID with subset_size=10", 10),
    (clip_mmd, "CMMD", 1),
    (monge_inception_distance, "MIND", 2),
]


@pytest.mark.parametrize(("metric", "name", "least"), METRICS)
def test_too_few_images_are_refused_and_just_enough_are_not(metric: Metric, name: str, least: int) -> None:
    few, enough = torch.randn(least - 1, 4), torch.randn(least, 4)
    with pytest.raises(UserError, match=f"{name}.* needs at least {least} images .* {least - 1} samples and 50 ref"):
        metric(few, torch.randn(50, 4))
    with pytest.raises(UserError, match=f"got 50 samples and {least - 1} reference"):
        metric(torch.randn(50, 4), few)
    metric(enough, enough + 1)


@pytest.mark.parametrize(("metric", "name", "least"), METRICS)
def test_wrong_features_are_refused(metric: Metric, name: str, least: int) -> None:
    good, bad = torch.randn(50, 4), torch.randn(50, 4)
    bad[7, 2] = torch.nan
    with pytest.raises(UserError, match="samples: features of sample 7 are not finite"):
        metric(bad, good)
    with pytest.raises(UserError, match="reference: features of sample 7 are not finite"):
        metric(good, bad)
    with pytest.raises(UserError, match="cannot compare 4 features with 5"):
        metric(good, torch.randn(50, 5))
    with pytest.raises(UserError, match=r"samples: features must be a matrix"):
        metric(torch.randn(50), good)


@pytest.mark.parametrize(("metric", "name", "least"), METRICS)
def test_arrays_and_half_floats_are_features_too(metric: Metric, name: str, least: int) -> None:
    samples, reference = torch.randn(2, 60, 4).half()
    assert metric(samples.numpy(), reference.numpy()) == metric(samples.float(), reference.float())


def test_the_precision_is_that_of_the_finer_side() -> None:
    single, double, half = torch.zeros(1, 1), np.zeros((1, 1)), torch.zeros(1, 1).half()
    for sides, dtype in (((single, double), torch.float64), ((half, single.numpy()), torch.float32)):
        assert [side.dtype for side in feature_pair(*sides, metric="a metric", least=1)] == [dtype, dtype]
    kept = feature_pair(single, single.numpy(), metric="a metric", least=1)
    assert [side.data_ptr() for side in kept] == [single.data_ptr()] * 2  # nothing is copied
