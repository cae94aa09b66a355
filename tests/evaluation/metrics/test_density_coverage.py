from __future__ import annotations

import pytest
import torch

from repagen.errors import UserError
from repagen.evaluation.metrics.density_coverage import DensityCoverage, density_coverage


def by_definition(samples: torch.Tensor, real: torch.Tensor, k: int) -> DensityCoverage:
    balls, covered = 0, 0
    for number, centre in enumerate(real):
        others = [(centre - other).norm().item() for i, other in enumerate(real) if i != number]
        radius = sorted(others)[k - 1]
        inside = sum((centre - sample).norm().item() < radius for sample in samples)
        balls += inside
        covered += inside > 0
    return DensityCoverage(balls / (k * len(samples)), covered / len(real))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_it_follows_its_definition_for_any_block_size(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, real = torch.randn(70, 4, dtype=torch.float64) * 0.7 + 0.3, torch.randn(60, 4, dtype=torch.float64)
    expected = by_definition(samples, real, k)
    assert expected.density != expected.coverage
    for rows in (1024, 13):
        monkeypatch.setattr("repagen.evaluation.metrics.neighbourhoods.ROWS", rows)
        found = density_coverage(samples, real, k)
        assert (found.density, found.coverage) == pytest.approx((expected.density, expected.coverage), rel=1e-12)


def test_balls_are_without_their_edge() -> None:
    """On a line at 0, 1, 3, 7 the nearest other points lie 1, 1, 2 and 4 away."""
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert density_coverage(torch.tensor([[-1.0], [11.0]]), real, 1) == DensityCoverage(0, 0)
    assert density_coverage(torch.tensor([[-0.9], [10.9]]), real, 1) == DensityCoverage(1, 0.5)


def test_nothing_is_near_far_away() -> None:
    real = torch.randn(100, 5)
    assert density_coverage(real + 1000, real) == DensityCoverage(0, 0)
    assert density_coverage(real, real).coverage == 1


def test_two_draws_of_one_distribution_have_the_expected_values() -> None:
    """E density = 1, E coverage = 1 - (N-1)...(N-k) / ((M+N-1)...(M+N-k)); N = M = 2000, k = 5."""
    found = density_coverage(torch.randn(2000, 3), torch.randn(2000, 3))
    expected = 1.0
    for step in range(1, 6):
        expected *= (2000 - step) / (4000 - step)
    assert found.density == pytest.approx(1, abs=0.05)
    assert found.coverage == pytest.approx(1 - expected, abs=0.02)


def test_a_number_of_neighbours_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="density and coverage needs at least 1 neighbour, got 0"):
        density_coverage(torch.randn(9, 2), torch.randn(9, 2), neighbours=0)
