from __future__ import annotations

import numpy as np
import pytest
import torch

from repagen.errors import UserError
from repagen.evaluation import FeatureMoments


def moments_of(batches: list[torch.Tensor]) -> FeatureMoments:
    moments = FeatureMoments(batches[0].shape[1])
    for batch in batches:
        moments.update(batch)
    return moments


def relative_error(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).abs().max() / right.abs().max()).item()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(501, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 3


def test_batches_give_numpys_mean_and_covariance(features: torch.Tensor) -> None:
    statistics = moments_of(list(features.split(37))).statistics()
    assert statistics.count == 501
    assert relative_error(statistics.mean, torch.from_numpy(features.numpy().mean(0))) < 1e-13
    assert relative_error(statistics.covariance, torch.from_numpy(np.cov(features.numpy(), rowvar=False))) < 1e-13


@pytest.mark.parametrize("batch_size", [1, 3, 500, 501])
def test_order_and_batch_size_do_not_matter(features: torch.Tensor, batch_size: int) -> None:
    whole = moments_of([features]).statistics()
    shuffled = moments_of(list(features[torch.randperm(501)].split(batch_size))).statistics()
    assert relative_error(shuffled.mean, whole.mean) < 1e-12
    assert relative_error(shuffled.covariance, whole.covariance) < 1e-12


def test_merging_processes_equals_one_process(features: torch.Tensor) -> None:
    whole = moments_of([features]).statistics()
    shares = [moments_of([features[rank::3]]) for rank in range(3)]
    empty = FeatureMoments(12)
    for share in (*shares, FeatureMoments(12)):
        empty.merge(share)
    merged = empty.statistics()
    assert merged.count == whole.count
    assert relative_error(merged.mean, whole.mean) < 1e-12
    assert relative_error(merged.covariance, whole.covariance) < 1e-12


def test_a_large_mean_does_not_eat_the_covariance(features: torch.Tensor) -> None:
    """Raw sums of squares would lose 12 of 16 digits here."""
    exact = moments_of(list(features.split(50))).statistics().covariance
    shifted = moments_of(list((features + 2.0**20).split(50))).statistics().covariance
    assert relative_error(shifted, exact) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_float_dtype_is_accumulated_in_float64(dtype: torch.dtype) -> None:
    features = torch.randn(64, 5).to(dtype)
    statistics = moments_of(list(features.split(7))).statistics()
    expected = torch.from_numpy(np.cov(features.double().numpy(), rowvar=False))
    assert relative_error(statistics.covariance, expected) < 1e-13


def test_one_sample_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2 samples, got 1"):
        moments_of([torch.randn(1, 3)]).statistics()


def test_a_feature_that_is_not_finite_is_refused_by_row() -> None:
    features = torch.randn(5, 3)
    features[3, 1] = torch.nan
    with pytest.raises(UserError, match="sample 3 are not finite"):
        moments_of([features])
