from __future__ import annotations

import numpy as np
import pytest
import torch

from repagen import frechet_distance
from repagen.errors import UserError
from repagen.evaluation import FeatureMoments, Statistics
from repagen.evaluation.metrics.frechet import expected_frechet_bias


def orthogonal(dimension: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(dimension, dimension, dtype=torch.float64)).Q


def gaussian(mean: torch.Tensor, variances: torch.Tensor, axes: torch.Tensor) -> Statistics:
    return Statistics(mean, axes @ torch.diag(variances) @ axes.T)


def statistics_of(features: torch.Tensor) -> Statistics:
    moments = FeatureMoments(features.shape[1])
    moments.update(features)
    return moments.statistics()


def test_commuting_gaussians_have_the_closed_form() -> None:
    """Covariances with common axes: |m1 - m2|^2 + sum (s1 - s2)^2 with standard deviations s."""
    axes = orthogonal(32)
    mean_1, mean_2 = torch.randn(2, 32, dtype=torch.float64)
    variances_1, variances_2 = torch.rand(2, 32, dtype=torch.float64) * 4
    exact = (mean_1 - mean_2).square().sum() + (variances_1.sqrt() - variances_2.sqrt()).square().sum()
    distance = frechet_distance(gaussian(mean_1, variances_1, axes), gaussian(mean_2, variances_2, axes))
    assert distance == pytest.approx(exact.item(), rel=1e-9)


def test_two_dimensional_covariances_have_the_closed_form() -> None:
    """tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)) for 2x2 matrices that need not commute."""
    a = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.5, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    product = a @ b
    root_trace = (product.trace() + 2 * product.det().sqrt()).sqrt()
    zero = torch.zeros(2, dtype=torch.float64)
    exact = (a.trace() + b.trace() - 2 * root_trace).item()
    assert frechet_distance(Statistics(zero, a), Statistics(zero, b)) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("count", [20, 400])
def test_a_set_has_no_distance_to_itself(count: int) -> None:
    features = torch.randn(count, 64) * 10 + 5
    assert frechet_distance(features, features) < 1e-6
    assert frechet_distance(statistics_of(features), statistics_of(features)) < 1e-6
    assert frechet_distance(features, features[torch.randperm(count)]) < 1e-6


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
@pytest.mark.parametrize("count", [40, 300])
def test_equal_sets_are_at_no_distance_at_any_scale(count: int, scale: float) -> None:
    features = (torch.randn(count, 64, dtype=torch.float64) * torch.linspace(0.01, 1, 64) + 10) * scale
    for a, b in ((features, features), (statistics_of(features),) * 2, (features, features.clone())):
        assert frechet_distance(a, b) == 0
    assert frechet_distance(features, features * (1 + 1e-5)) > 0


def test_it_is_symmetric_and_ignores_rotations() -> None:
    a, b = torch.randn(300, 24, dtype=torch.float64), torch.randn(200, 24, dtype=torch.float64) * 1.5 + 0.2
    distance = frechet_distance(a, b)
    axes = orthogonal(24)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-12)
    assert frechet_distance(a @ axes, b @ axes) == pytest.approx(distance, rel=1e-9)


def test_a_shift_adds_its_squared_length() -> None:
    features = torch.randn(100, 8, dtype=torch.float64)
    shift = torch.arange(8, dtype=torch.float64)
    assert frechet_distance(features, features + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)


@pytest.mark.parametrize("counts", [(10, 12), (10, 300)])
def test_fewer_samples_than_features_are_exact(counts: tuple[int, int]) -> None:
    """Features in a subspace have the distance they have inside it, where their covariances are regular."""
    low = [torch.randn(count, 6, dtype=torch.float64) * scale for count, scale in zip(counts, (1.0, 1.4), strict=True)]
    inside = frechet_distance(*low)
    embedding = orthogonal(256)[:6]
    high = [features @ embedding for features in low]
    assert frechet_distance(*high) == pytest.approx(inside, rel=1e-9)
    assert frechet_distance(*map(statistics_of, high)) == pytest.approx(inside, rel=1e-8)


def test_the_statistics_of_few_samples_know_their_rank() -> None:
    """The zero eigenvalues of a singular covariance come out as 1e-16; by their roots they would cost 1e-8 each."""
    few, many = torch.randn(20, 256, dtype=torch.float64), torch.randn(600, 256, dtype=torch.float64)
    exact = frechet_distance(few, many)
    assert frechet_distance(statistics_of(few), statistics_of(many)) == pytest.approx(exact, rel=1e-11)


def test_features_and_their_statistics_agree() -> None:
    a, b = torch.randn(500, 16), torch.randn(400, 16) * 2
    assert frechet_distance(a, statistics_of(b)) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    assert frechet_distance(a.numpy(), b.numpy()) == frechet_distance(a, b)


def test_it_equals_torch_fidelity() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = (torch.randn(800, 32).double() @ torch.randn(32, 32).double() for _ in range(2))
    theirs = [{"mu": x.numpy().mean(0), "sigma": np.cov(x.numpy(), rowvar=False)} for x in (a, b)]
    expected = metric.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_regular_covariances_take_the_fast_way_to_the_same_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvalues over six decades, as features of real networks have them."""
    axes, scales = orthogonal(96), torch.logspace(0, -6, 96, dtype=torch.float64).sqrt() * 5
    a, b = (statistics_of(torch.randn(2000, 96, dtype=torch.float64) * scales @ axes) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svdvals", None)
        fast = frechet_distance(a, b)
    monkeypatch.setattr("repagen.evaluation.metrics.frechet._ROUNDING", 0)
    assert frechet_distance(a, b) == pytest.approx(fast, abs=1e-8)


@pytest.mark.parametrize("weakest", [1e-4, 1e-13, 0])
def test_nearly_singular_covariances_have_the_closed_form(weakest: float) -> None:
    """The eigenvalues' way is left where rounding would cost it more than 1e-10; that of factors holds at any rank."""
    axes = orthogonal(64)
    variances_1, variances_2 = torch.rand(2, 64, dtype=torch.float64) + 0.5
    variances_1[:30] *= weakest
    variances_2[10:40] *= weakest
    exact = (variances_1.sqrt() - variances_2.sqrt()).square().sum().item()
    mean = torch.zeros(64, dtype=torch.float64)
    found = frechet_distance(gaussian(mean, variances_1, axes), gaussian(mean, variances_2, axes))
    assert found == pytest.approx(exact, rel=1e-7 if weakest == 1e-13 else 1e-9)


def test_common_weak_directions_cost_no_accuracy() -> None:
    """Squared, 1e-7 drowns in the rounding of 1: the eigenvalues' way would be off by 1e-8 unnoticed."""
    axes = orthogonal(64)
    variances_1, variances_2 = torch.rand(2, 64, dtype=torch.float64) + 0.5
    variances_1[:54] *= 1e-7
    variances_2[:54] *= 1e-7
    exact = (variances_1.sqrt() - variances_2.sqrt()).square().sum().item()
    mean = torch.zeros(64, dtype=torch.float64)
    found = frechet_distance(gaussian(mean, variances_1, axes), gaussian(mean, variances_2, axes))
    assert found == pytest.approx(exact, rel=1e-9)


def test_collapsed_sets_are_as_far_as_their_spread_and_means() -> None:
    """Samples that are all equal have the covariance 0: |m_a - m_b|^2 + tr S_b remains."""
    point, real = torch.full((300, 8), 2.0), torch.randn(300, 8, dtype=torch.float64)
    expected = (point[0] - real.mean(dim=0)).square().sum() + real.var(dim=0).sum()
    for a, b in ((point, real), (real, point)):
        assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)
    assert frechet_distance(point, point) == 0


def test_a_reference_is_factored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = statistics_of(torch.randn(300, 8))
    first = frechet_distance(torch.randn(200, 8), reference)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    assert frechet_distance(torch.randn(200, 8) + 1, reference) > first


def test_the_bias_has_its_closed_form_and_that_of_its_definition() -> None:
    """White features: (5/4 d + 1/4 d^2) s^2 / N."""
    white = torch.eye(24, dtype=torch.float64) * 3
    expected = (1.25 * 24 + 0.25 * 24**2) * 3
    assert expected_frechet_bias(white, num_samples=1000) == pytest.approx(expected / 1000, rel=1e-12)
    both = expected_frechet_bias(white, num_samples=1000, num_reference=500)
    assert both == pytest.approx(expected * (1 / 1000 + 1 / 500), rel=1e-12)
    variances = [0.0, 0.3, 2.0]
    pairs = sum(p * q / (p + q) for p in variances for q in variances if p + q)
    axes = orthogonal(3)
    singular = axes @ torch.diag(torch.tensor(variances, dtype=torch.float64)) @ axes.T
    assert expected_frechet_bias(singular, num_samples=2) == pytest.approx((1.25 * 2.3 + 0.5 * pairs) / 2, rel=1e-9)
    assert expected_frechet_bias(singular * 0, num_samples=2) == 0


@pytest.mark.parametrize("num_reference", [None, 1500])
def test_the_bias_of_a_finite_sample_is_measured(num_reference: int | None) -> None:
    """N = 32 d samples against the exact Gaussian, or against others."""
    dimension, trials = 32, 200
    count = 32 * dimension
    deviations = torch.linspace(0.3, 2, dimension, dtype=torch.float64)
    exact = gaussian(torch.zeros(dimension, dtype=torch.float64), deviations**2, torch.eye(dimension).double())
    total = 0.0
    for _ in range(trials):
        samples = torch.randn(count, dimension, dtype=torch.float64) * deviations
        other = torch.randn(num_reference or 0, dimension, dtype=torch.float64) * deviations
        total += frechet_distance(samples, other if num_reference else exact)
    expected = expected_frechet_bias(exact.covariance, num_samples=count, num_reference=num_reference)
    assert total / trials == pytest.approx(expected, rel=0.02)


def test_the_bias_refuses_what_has_none() -> None:
    with pytest.raises(UserError, match="at least 1 sample on each side, got 0"):
        expected_frechet_bias(torch.eye(3), num_samples=9, num_reference=0)
    with pytest.raises(UserError, match="not a covariance"):
        expected_frechet_bias(-torch.eye(3), num_samples=9)
    with pytest.raises(UserError, match=r"square matrix, got shape \(3, 4\)"):
        expected_frechet_bias(torch.randn(3, 4), num_samples=9)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.randn(1, 4), torch.randn(9, 4), "at least 2 samples on each side, got 1"),
        (torch.randn(9, 4), torch.randn(9, 5), "cannot compare 4 features with 5"),
        (np.zeros((5, 0)), np.zeros((5, 0)), r"matrix \(N, D\), got shape \(5, 0\)"),
        (torch.randn(9), torch.randn(9, 5), r"matrix \(N, D\), got shape \(9,\)"),
        (Statistics(torch.zeros(2), -torch.eye(2)), torch.randn(9, 2), "not a covariance"),
        (torch.randn(9, 2), Statistics(torch.zeros(2), -torch.eye(2)), "not a covariance"),
        (Statistics(torch.zeros(2), torch.eye(2)[:1]), torch.randn(9, 2), r"square matrix, got shape \(1, 2\)"),
        (torch.full((3, 2), torch.inf), torch.randn(9, 2), "sample 0 are not finite"),
    ],
)
def test_wrong_input_is_named(a: torch.Tensor | Statistics, b: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        frechet_distance(a, b)
