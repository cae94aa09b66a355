from __future__ import annotations

import numpy as np
import pytest
import torch

from repagen.errors import UserError
from repagen.evaluation.metrics.mind import monge_inception_distance


def test_a_set_has_no_distance_to_itself_in_any_order() -> None:
    features = torch.randn(300, 16) * 5 + 3
    assert monge_inception_distance(features, features) == 0
    assert monge_inception_distance(features, features[torch.randperm(300)]) < 1e-20


def test_a_mean_shift_has_the_closed_form() -> None:
    features, shift = torch.randn(200, 24), torch.randn(24)
    found = monge_inception_distance(features, features + shift, directions=10_000)
    assert found == pytest.approx(3 * shift.square().sum().item(), rel=0.04)


def test_a_scale_has_the_closed_form() -> None:
    """x and 2x differ by x along each direction: 3 times the mean squared length."""
    features = torch.randn(200, 24)
    found = monge_inception_distance(features, 2 * features, directions=10_000)
    assert found == pytest.approx(3 * features.square().sum(dim=1).mean().item(), rel=0.04)


def test_one_feature_needs_no_direction() -> None:
    """Both directions of a line give 3 mean (x_(j) - y_(j))^2."""
    x, y = np.random.default_rng(0).normal(size=(2, 50, 1))
    expected = 3 * np.mean((np.sort(x[:, 0]) - np.sort(y[:, 0])) ** 2)
    assert monge_inception_distance(x, y, directions=7) == pytest.approx(expected, rel=1e-12)


def test_more_directions_than_a_chunk_are_each_used_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(40, 6), torch.randn(40, 6) * 2
    expected = monge_inception_distance(x, y, directions=100)
    monkeypatch.setattr("repagen.evaluation.metrics.mind.DIRECTIONS", 9)
    assert monge_inception_distance(x, y, directions=100) == pytest.approx(expected, rel=1e-13)
    assert monge_inception_distance(y, x, directions=100) == pytest.approx(expected, rel=1e-13)
    assert monge_inception_distance(x, y, directions=100, seed=1) != pytest.approx(expected, rel=1e-3)


def test_the_larger_set_is_brought_to_the_size_of_the_other() -> None:
    """Sets whose rows are all equal keep their value whatever rows are drawn; else the draw depends on the seed."""
    x, y = torch.zeros(10, 4), torch.ones(37, 4)
    equal_sizes = monge_inception_distance(x, y[:10])
    assert monge_inception_distance(x, y) == pytest.approx(equal_sizes, rel=1e-12)
    assert monge_inception_distance(y, x) == pytest.approx(equal_sizes, rel=1e-12)
    many = torch.randn(500, 4)
    part = monge_inception_distance(many, many[:400])
    assert 0 < part < 0.2
    assert monge_inception_distance(many, many[:400]) == part
    # Sorted rows: the first ones would lie far from the rest.
    ordered = many.sort(dim=0).values
    assert monge_inception_distance(ordered, ordered[torch.randperm(500)[:250]]) < 1
    assert monge_inception_distance(ordered[:250], ordered[250:]) > 10


def test_no_direction_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1 direction, got 0"):
        monge_inception_distance(torch.randn(9, 2), torch.randn(9, 2), directions=0)
