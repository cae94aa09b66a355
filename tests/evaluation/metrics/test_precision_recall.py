from __future__ import annotations

import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity_run import torch_fidelity_run

from repagen.errors import UserError
from repagen.evaluation import precision_recall


def test_it_equals_a_run_of_torch_fidelity(capsys: pytest.CaptureFixture[str]) -> None:
    run = torch_fidelity_run()
    ours = precision_recall(run.samples, run.reference)
    assert (ours.precision, ours.recall) == (run.figures["precision"], run.figures["recall"])
    assert 0.2 < ours.recall < ours.precision < 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_do_not_count(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, real = torch.randn(300, 8, dtype=dtype) * 0.8 + 0.3, torch.randn(250, 8, dtype=dtype)
    whole = prc_features_to_metric(samples, real, prc_neighborhood=4, save_cpu_ram=False, verbose=False)
    monkeypatch.setattr("repagen.evaluation.metrics.neighbourhoods.ROWS", 64)
    ours = precision_recall(samples, real, neighbours=4)
    assert (ours.precision, ours.recall) == (whole["precision"], whole["recall"])


def test_it_follows_its_definition() -> None:
    samples, real = torch.randn(40, 3, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64) * 1.5

    def fraction_inside(points: torch.Tensor, centres: torch.Tensor) -> float:
        radii = [sorted((centre - other).norm().item() for other in centres)[3] for centre in centres]
        inside = [
            any((point - centre).norm() <= radius for centre, radius in zip(centres, radii, strict=True))
            for point in points
        ]
        return sum(inside) / len(inside)

    found = precision_recall(samples, real)
    assert found.precision == pytest.approx(fraction_inside(samples, real))
    assert found.recall == pytest.approx(fraction_inside(real, samples))


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


def test_a_number_of_neighbours_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="precision and recall needs at least 1 neighbour, got 0"):
        precision_recall(torch.randn(9, 2), torch.randn(9, 2), neighbours=0)
