from __future__ import annotations

import math

import pytest
import torch
from torch_fidelity_run import SUBSET_SIZE, SUBSETS, torch_fidelity_run

from repagen.errors import UserError
from repagen.evaluation.metrics import kernel_distance
from repagen.evaluation.metrics.kernel_distance import clip_mmd, kernel_inception_distance


def clip_mmd_by_definition(samples: torch.Tensor, reference: torch.Tensor) -> float:
    x, y = (side.double() / side.double().norm(dim=1, keepdim=True) for side in (samples, reference))

    def mean(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.fsum(math.exp(-(p - q).square().sum().item() / 200) for p in a for q in b) / (len(a) * len(b))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_kid_equals_torch_fidelity() -> None:
    run = torch_fidelity_run()
    found = kernel_inception_distance(run.samples, run.reference, subsets=SUBSETS, subset_size=SUBSET_SIZE)
    figures = run.figures
    assert found.mean == pytest.approx(figures["kernel_inception_distance_mean"], rel=1e-6)
    assert found.std == pytest.approx(figures["kernel_inception_distance_std"], rel=1e-6)


def test_kid_of_all_images_is_the_unbiased_estimate() -> None:
    """One subset of all: mean k(x, x') + mean k(y, y') over pairs of different images - 2 mean k(x, y)."""
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64) + 0.5

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / 6 + 1) ** 3

    off = 1 - torch.eye(30, dtype=torch.float64)
    expected = ((kernel(x, x) + kernel(y, y)) * off).sum() / (30 * 29) - 2 * kernel(x, y).mean()
    found = kernel_inception_distance(x, y, subsets=3, subset_size=30)
    assert found.mean == pytest.approx(expected.item(), rel=1e-10)
    assert found.std == pytest.approx(0, abs=1e-12)


def test_kid_depends_on_its_seed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = torch.randn(200, 4), torch.randn(200, 4)
    first = kernel_inception_distance(x, y, subsets=5, subset_size=50)
    assert kernel_inception_distance(x, y, subsets=5, subset_size=50) == first
    assert kernel_inception_distance(x, y, subsets=5, subset_size=50, seed=1) != first
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("subsets", "size"), [(0, 10), (5, 1)])
def test_kid_needs_subsets_of_pairs(subsets: int, size: int) -> None:
    with pytest.raises(UserError, match=f"got {subsets} of {size}"):
        kernel_inception_distance(torch.randn(20, 4), torch.randn(20, 4), subsets=subsets, subset_size=size)


def test_kid_of_fewer_images_than_a_subset_is_refused() -> None:
    with pytest.raises(UserError, match=r"subset_size=1000 .*at least 1000 images .*999 samples and 1200 reference"):
        kernel_inception_distance(torch.randn(999, 2), torch.randn(1200, 2))


def test_cmmd_follows_its_definition_for_any_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(23, 5) + 1, torch.randn(31, 5) * 3
    expected = clip_mmd_by_definition(x, y)
    assert expected > 1
    assert clip_mmd(x, y) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(kernel_distance, "ROWS", 7)
    assert clip_mmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert clip_mmd(y, x) == pytest.approx(expected, rel=1e-9)


def test_cmmd_of_a_set_with_itself_is_zero_and_lengths_do_not_count() -> None:
    x = torch.randn(200, 16)
    assert 0 <= clip_mmd(x, x) < 1e-10
    assert clip_mmd(x, x[torch.randperm(200)] * (torch.rand(200, 1) + 0.1)) < 1e-10


def test_cmmd_of_opposite_points_has_the_closed_form() -> None:
    x = torch.tensor([[0.0, 2.0]])
    assert clip_mmd(x, -x) == pytest.approx(2000 * (1 - math.exp(-4 / 200)), rel=1e-12)


def test_a_zero_embedding_is_named() -> None:
    x = torch.randn(9, 4)
    x[5] = 0
    with pytest.raises(UserError, match="embedding of sample 5 is zero"):
        clip_mmd(torch.randn(3, 4), x)
