from __future__ import annotations

import pytest
import torch

from repagen.errors import UserError
from repagen.evaluation import precision_recall


def test_it_equals_torch_fidelity_on_the_same_features() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_prc")
    samples, real = torch.randn(300, 8).double() * 0.8 + 0.3, torch.randn(250, 8).double()
    theirs = metric.prc_features_to_metric(samples, real, verbose=False, prc_neighborhood=3)
    ours = precision_recall(samples, real)
    assert (ours.precision, ours.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)
    assert 0.2 < ours.recall < ours.precision < 1


def test_a_set_covers_itself_and_nothing_far_away() -> None:
    real = torch.randn(100, 5)
    same = precision_recall(real, real)
    far = precision_recall(real + 100, real)
    assert (same.precision, same.recall) == (1, 1)
    assert (far.precision, far.recall) == (0, 0)


def test_a_missing_mode_costs_recall_and_not_precision() -> None:
    real = torch.cat([torch.randn(100, 5), torch.randn(300, 5) + 50])
    result = precision_recall(real[:100], real)
    assert result.precision == 1
    assert result.recall == pytest.approx(0.25)


def test_balls_reach_the_kth_neighbour_including_its_edge() -> None:
    """On a line at 0, 1, 3, 7 the nearest other points lie 1, 1, 2 and 4 away."""
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    samples = torch.tensor([[-1.0], [-1.5], [11.0], [11.5]])
    assert precision_recall(samples, real, neighbours=1).precision == 0.5


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match="more than 3 images on each side, got 3 and 9"):
        precision_recall(torch.randn(3, 2), torch.randn(9, 2))
