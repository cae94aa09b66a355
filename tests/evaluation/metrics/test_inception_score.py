from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity_run import torch_fidelity_run

from repagen.errors import UserError
from repagen.evaluation.metrics.inception_score import (
    InceptionScore,
    InceptionScoreSums,
    shuffled_positions,
    split_of_position,
)


def score(logits: torch.Tensor, order: str, splits: int = 10, batch: int = 37) -> InceptionScore:
    count = len(logits)
    split = split_of_position(shuffled_positions(count, order), count, splits)  # type: ignore[arg-type]
    sums = InceptionScoreSums(splits)
    for part, rows in zip(split.split(batch), logits.split(batch), strict=True):
        sums.update(part, rows)
    return sums.result()


def score_by_definition(logits: torch.Tensor, splits: int) -> tuple[float, float]:
    """Equal parts in the order given, one image and one class at a time."""
    p = logits.double().softmax(dim=1).numpy()
    scores = []
    for part in np.split(p, splits):
        q = part.mean(0)
        scores.append(np.exp(np.mean([sum(x * np.log(x / y) for x, y in zip(row, q, strict=True)) for row in part])))
    return float(np.mean(scores)), float(np.std(scores))


def test_it_equals_torch_fidelity() -> None:
    """403 images do not divide by 10, and its shuffle decides which share a split."""
    run = torch_fidelity_run()
    found, figures = score(run.logits, "torch-fidelity"), run.figures
    assert found.mean == pytest.approx(figures["inception_score_mean"], rel=1e-9)
    assert found.std == pytest.approx(figures["inception_score_std"], rel=1e-9)
    assert found.mean != pytest.approx(score(run.logits, "file").mean, rel=1e-4)


@pytest.mark.parametrize(("seed", "order"), [(0, "seeded"), (2020, "torch-fidelity")])
def test_seeded_orders_are_numpys_permutations(seed: int, order: str) -> None:
    logits = torch.randn(60, 7) * 3
    permuted = logits[np.random.RandomState(seed).permutation(60)]
    found = score(logits, order, splits=4)
    assert (found.mean, found.std) == pytest.approx(score_by_definition(permuted, 4), rel=1e-12)


def test_file_order_takes_consecutive_chunks() -> None:
    logits = torch.randn(60, 7) * 3
    found = score(logits, "file", splits=4)
    assert (found.mean, found.std) == pytest.approx(score_by_definition(logits, 4), rel=1e-12)


def test_sure_images_of_all_classes_score_the_number_of_classes() -> None:
    """Also where softmax underflows to 0; files ordered by class lose it in their own order."""
    logits = torch.eye(8).repeat_interleave(50, dim=0) * 2000
    assert score(logits, "seeded", splits=1).mean == pytest.approx(8)
    assert score(logits, "file", splits=8) == InceptionScore(1, 0)
    assert score(torch.zeros(40, 8), "file", splits=4).mean == pytest.approx(1)


def test_parts_join_to_the_whole_in_any_order() -> None:
    logits = torch.randn(90, 5) * 2
    split = split_of_position(shuffled_positions(90, "seeded"), 90, 10)
    whole, first, second = (InceptionScoreSums(10) for _ in range(3))
    whole.update(split, logits)
    second.update(split[50:], logits[50:].numpy())
    second.update(split[:0], logits[:0])
    first.update(split[:50], logits[:50])
    second.merge(first)
    second.merge(InceptionScoreSums(10))
    expected = whole.result()
    assert second.result().mean == pytest.approx(expected.mean, rel=1e-13)
    assert second.result().std == pytest.approx(expected.std, rel=1e-11)


@pytest.mark.parametrize(("count", "splits"), [(10, 10), (11, 10), (403, 10), (50_000, 10), (7, 3), (5, 1)])
def test_splits_begin_where_torch_fidelitys_do(count: int, splits: int) -> None:
    split = split_of_position(torch.arange(count), count, splits)
    for number in range(splits):
        begin, end = number * count // splits, (number + 1) * count // splits
        assert (split[begin:end] == number).all()


@pytest.mark.parametrize("order", ["file", "torch-fidelity", "seeded"])
def test_every_image_has_its_position(order: str) -> None:
    positions = shuffled_positions(101, order)  # type: ignore[arg-type]
    assert positions.dtype == torch.int64
    assert sorted(positions.tolist()) == list(range(101))


def test_wrong_use_is_named() -> None:
    sums = InceptionScoreSums(2)
    with pytest.raises(UserError, match="got 0 images in 0"):
        sums.result()
    sums.update(torch.tensor([0, 0]), torch.randn(2, 4))
    with pytest.raises(UserError, match="each of its 2 splits, got 2 images in 1"):
        sums.result()
    with pytest.raises(UserError, match="logits of 5 classes with 4"):
        sums.update(torch.tensor([1]), torch.randn(1, 5))
    with pytest.raises(UserError, match=r"one split in \[0, 2\)"):
        sums.update(torch.tensor([2]), torch.randn(1, 4))
    with pytest.raises(UserError, match=r"one split in \[0, 2\)"):
        sums.update(torch.tensor([1, 1]), torch.randn(1, 4))
    with pytest.raises(UserError, match="sample 1 are not finite"):
        sums.update(torch.tensor([1, 1]), torch.tensor([[0.0], [torch.nan]]))
    with pytest.raises(UserError, match="cannot merge 3 splits with 2"):
        sums.merge(InceptionScoreSums(3))
    with pytest.raises(UserError, match="at least 1 split, got 0"):
        InceptionScoreSums(0)
    with pytest.raises(UserError, match="10 splits needs as many images, got 9"):
        split_of_position(torch.arange(9), 9, 10)
    with pytest.raises(UserError, match=r"lie in \[0, 9\), got 0 to 9"):
        split_of_position(torch.arange(10), 9, 3)
    with pytest.raises(UserError, match="'random' is none of file, torch-fidelity, seeded"):
        shuffled_positions(9, "random")  # type: ignore[arg-type]
