from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from repagen.errors import UserError
from repagen.evaluation.representation.similarity import cknna, unbiased_cka


def hsic_by_loops(k: torch.Tensor, l: torch.Tensor) -> float:  # noqa: E741
    """The unbiased HSIC as a sum over distinct indices: U-statistic of Gretton et al. 2005, all quadruples."""
    n = len(k)
    pairs = triples = 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                pairs += (k[i, j] * l[j, i]).item()
                triples += sum((k[i, j] * l[j, q]).item() for q in range(n) if q not in (i, j))
    quadruples = sum(
        (k[i, j] * l[q, r]).item()
        for i in range(n)
        for j in range(n)
        for q in range(n)
        for r in range(n)
        if len({i, j, q, r}) == 4
    )
    return pairs / (n * (n - 1)) + quadruples / math.perm(n, 4) - 2 * triples / math.perm(n, 3)


def cknna_by_loops(x: torch.Tensor, y: torch.Tensor, neighbours: int) -> float:
    x, y = (F.normalize(features.double(), dim=1) for features in (x, y))
    n = len(x)

    def near(features: torch.Tensor) -> list[set[int]]:
        return [
            set(sorted((j for j in range(n) if j != i), key=lambda j: -float(features[i] @ features[j]))[:neighbours])
            for i in range(n)
        ]

    near_x, near_y = near(x), near(y)

    def kernel(features: torch.Tensor, *masks: list[set[int]]) -> torch.Tensor:
        value = torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                if all(j in mask[i] for mask in masks):
                    value[i, j] = features[i] @ features[j]
        return value

    shared = unbiased_hsic_of_song(kernel(x, near_x, near_y), kernel(y, near_x, near_y))
    own_x = unbiased_hsic_of_song(kernel(x, near_x), kernel(x, near_x))
    own_y = unbiased_hsic_of_song(kernel(y, near_y), kernel(y, near_y))
    return shared / math.sqrt(own_x * own_y)


def unbiased_hsic_of_song(k: torch.Tensor, l: torch.Tensor) -> float:  # noqa: E741
    """As the authors of CKNNA write it, with the product of the matrices."""
    n = len(k)
    off = 1 - torch.eye(n, dtype=torch.float64)
    k, l = k * off, l * off  # noqa: E741
    value = (k * l.T).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (k @ l).sum() / (n - 2)
    return (value / (n * (n - 3))).item()


def test_cka_is_the_u_statistic_over_distinct_samples() -> None:
    x, y = torch.randn(8, 3).double(), torch.randn(8, 5).double()
    y[:, 0] = x[:, 0]
    k, l = x @ x.T, y @ y.T  # noqa: E741
    expected = hsic_by_loops(k, l) / math.sqrt(hsic_by_loops(k, k) * hsic_by_loops(l, l))
    assert unbiased_cka(x, y) == pytest.approx(expected, abs=1e-10)


def test_cknna_is_its_definition() -> None:
    x = torch.randn(40, 6)
    y = torch.cat([x[:, :3] + 0.3 * torch.randn(40, 3), torch.randn(40, 4)], dim=1)
    for neighbours in (3, 10, 25):
        assert cknna(x, y, neighbours) == pytest.approx(cknna_by_loops(x, y, neighbours), abs=1e-12)


@pytest.mark.parametrize("count", [30, 400])
def test_features_equal_themselves_rotated_and_scaled(count: int) -> None:
    x = torch.randn(count, 12)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    assert cknna(x, x) == pytest.approx(1, abs=1e-12)
    assert cknna(x, 3 * x.double() @ rotation) == pytest.approx(1, abs=1e-9)
    assert unbiased_cka(x, 3 * x.double() @ rotation + 100) == pytest.approx(1, abs=1e-9)


def test_all_neighbours_make_cknna_the_cka_of_normalised_rows() -> None:
    x, y = torch.randn(60, 5).double(), torch.randn(60, 7).double()
    y[:, :3] += x[:, :3]
    expected = unbiased_cka(F.normalize(x, dim=1), F.normalize(y, dim=1))
    assert cknna(x, y, neighbours=59) == pytest.approx(expected, abs=1e-12)
    assert abs(expected) > 0.05


def test_unrelated_features_are_near_zero_where_the_biased_cka_is_not() -> None:
    """The fact sheet's measurement at N = 400, D = 64: biased .132, unbiased -.007, CKNNA .019."""
    x, y = torch.randn(400, 64).double(), torch.randn(400, 64).double()
    a, b = x - x.mean(0), y - y.mean(0)
    biased = (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    assert biased > 0.12
    assert abs(unbiased_cka(x, y)) < 0.02
    assert 0 <= cknna(x, y) < 0.04


def test_similarity_falls_with_noise_and_knows_the_order_of_images() -> None:
    x = torch.randn(300, 16)
    values = [cknna(x, x + noise * torch.randn(300, 16)) for noise in (0.1, 0.5, 2.0)]
    assert 1 > values[0] > values[1] > values[2] > cknna(x, x.roll(1, 0))


def test_half_precision_and_other_widths_are_taken() -> None:
    x = torch.randn(50, 8)
    assert cknna(x.bfloat16(), torch.randn(50, 3).half()) < 0.5


def test_user_mistakes_are_refused() -> None:
    x = torch.randn(20, 4)
    with pytest.raises(UserError, match="at least 4 samples, got 3"):
        unbiased_cka(x[:3], x[:3])
    with pytest.raises(UserError, match="20 samples with those of 19"):
        cknna(x, x[:19])
    with pytest.raises(UserError, match="from 1 to 19 with 20 samples, got 20"):
        cknna(x, x, neighbours=20)
    with pytest.raises(UserError, match="same features"):
        unbiased_cka(x, torch.ones(20, 2))
    broken, dead = x.clone(), x.clone()
    broken[7, 1], dead[5] = torch.nan, 0
    with pytest.raises(UserError, match="sample 7 are not finite"):
        unbiased_cka(x, broken)
    with pytest.raises(UserError, match="sample 5 are all zero"):
        cknna(x, dead)
