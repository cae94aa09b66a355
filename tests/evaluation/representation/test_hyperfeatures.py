from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from repagen.errors import UserError
from repagen.evaluation.representation.correspondence import regular_points, translation_warp, warp_points
from repagen.evaluation.representation.fitting import fit_full_batch
from repagen.evaluation.representation.hyperfeatures import (
    HyperfeatureMix,
    HyperfeatureResult,
    TokenPair,
    contrastive_loss,
    train_hyperfeature_correspondence,
    train_hyperfeature_probe,
)
from repagen.evaluation.representation.probes import linear_probe

Slices = list[torch.Tensor]
GRID, SIZE = (8, 8), (64, 64)


def halves_of_the_label(count: int, dims: tuple[int, ...] = (16, 24, 16)) -> tuple[Slices, torch.Tensor]:
    """Slice 0 knows label // 2, slice 1 knows label % 2, the rest is noise: only a mix knows all four classes."""
    labels = torch.randint(4, (count,))
    slices = [torch.randn(count, 4, dim) for dim in dims]
    slices[0][:, :, 0] += 3.0 * (labels // 2)[:, None]
    slices[1][:, :, 5] += 3.0 * (labels % 2)[:, None]
    return slices, labels


def shifted_pairs(count: int, noise: tuple[float, ...]) -> list[TokenPair]:
    """Random textures moved by two cells; each slice sees them through its own map and its own noise."""
    generator = torch.Generator().manual_seed(7)
    maps = [torch.randn(12, 12, generator=generator) for _ in noise]
    warp = translation_warp(SIZE, (16, 8))
    points = regular_points(SIZE, 8)
    points = points[(points < 40).all(dim=1)]
    pairs = []
    for _ in range(count):
        texture = torch.randn(8, 8, 12)
        sides = []
        for side in (texture, texture.roll((1, 2), (0, 1))):
            tokens = side.flatten(0, 1)
            sides.append([(tokens + s * torch.randn(64, 12)) @ m for s, m in zip(noise, maps, strict=True)])
        pairs.append(TokenPair(sides[0], sides[1], points, warp_points(points, warp)))
    return pairs


def test_a_mix_starts_uniform_and_is_the_weighted_sum_of_projections() -> None:
    mix = HyperfeatureMix(3, (4, 6, 5), width=4)
    torch.testing.assert_close(mix.mixing_weights, torch.full((3,), 1 / 3))
    slices = [torch.randn(2, 9, dim) for dim in (4, 6, 5)]
    with torch.no_grad():
        mix.mixing_logits.copy_(torch.tensor([0.0, 1.0, -2.0]))
    weights = torch.tensor([0.0, 1.0, -2.0]).exp() / torch.tensor([0.0, 1.0, -2.0]).exp().sum()
    expected = sum(
        weight * tokens @ projection.weight.T
        for weight, tokens, projection in zip(weights, slices, mix.projections, strict=True)
    )
    torch.testing.assert_close(mix(slices), expected)
    assert mix(slices).shape == (2, 9, 4)
    square = mix.projections[0].weight
    torch.testing.assert_close(square @ square.T, torch.eye(4), atol=1e-5, rtol=0)
    mix.mixing_weights.sum().backward()  # the weights are trained


def test_a_mix_knows_what_no_slice_knows() -> None:
    slices, labels = halves_of_the_label(600)
    train, test = [one[:400] for one in slices], [one[400:] for one in slices]
    result = train_hyperfeature_probe(train, labels[:400], test, labels[400:], width=16)
    assert max(result.slice_accuracies) < 0.65
    assert result.accuracy > 0.9
    assert result.gain == pytest.approx(result.accuracy - max(result.slice_accuracies))
    assert sum(result.weights) == pytest.approx(1)
    assert result.weights[2] < min(result.weights[:2])  # the slice of noise loses


def test_slices_that_know_equally_much_share_equally() -> None:
    labels = torch.randint(10, (600,))
    centres = torch.randn(10, 24) * 0.3
    slices = [centres[labels][:, None] + torch.randn(600, 1, 24) for _ in range(6)]
    train, test = [one[:400] for one in slices], [one[400:] for one in slices]
    result = train_hyperfeature_probe(train, labels[:400], test, labels[400:], width=16)
    assert 0.1 < min(result.weights) <= max(result.weights) < 0.25
    assert result.gain > 0.2


def test_the_decay_draws_a_mix_towards_uniform() -> None:
    mix = HyperfeatureMix(2, (3, 3), 3).double()
    with torch.no_grad():
        mix.mixing_logits.copy_(torch.tensor([2.0, -1.0]))
    fit_full_batch([mix], lambda: mix.mixing_logits.sum() * 0, 50)
    torch.testing.assert_close(mix.mixing_weights.detach(), torch.full((2,), 0.5).double(), atol=1e-3, rtol=0)


def test_slices_alone_are_the_linear_probes_of_their_mean_tokens() -> None:
    slices, labels = halves_of_the_label(300)
    train, test = [one[:200] for one in slices], [one[200:] for one in slices]
    result = train_hyperfeature_probe(train, labels[:200], test, labels[200:])
    expected = [
        linear_probe(known.mean(1), labels[:200], unseen.mean(1), labels[200:], epochs=20).accuracy
        for known, unseen in zip(train, test, strict=True)
    ]
    assert result.slice_accuracies == tuple(expected)


def test_a_mix_of_one_slice_is_worth_its_linear_probe() -> None:
    slices, labels = halves_of_the_label(600, dims=(16, 24))
    both = torch.cat(slices, dim=2)
    result = train_hyperfeature_probe([both[:400]], labels[:400], [both[400:]], labels[400:], width=40)
    assert result.weights == (1,)
    assert result.accuracy == pytest.approx(result.slice_accuracies[0], abs=0.03)
    assert result.accuracy > 0.9


def test_the_probe_is_a_function_of_its_seed() -> None:
    slices, labels = halves_of_the_label(120)
    train, test = [one[:80] for one in slices], [one[80:] for one in slices]
    first = train_hyperfeature_probe(train, labels[:80], test, labels[80:], epochs=10)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert train_hyperfeature_probe(train, labels[:80], test, labels[80:], epochs=10) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert train_hyperfeature_probe(train, labels[:80], test, labels[80:], epochs=10, seed=1) != first


def test_the_best_slice_and_the_gain_are_told_honestly() -> None:
    result = HyperfeatureResult(accuracy=0.5, weights=(0.2, 0.8), slice_accuracies=(0.4, 0.75))
    assert (result.best_slice, result.gain) == (1, -0.25)


def test_the_contrastive_loss_is_clips_where_all_cells_correspond() -> None:
    source, target = torch.randn(9, 5), torch.randn(9, 5)
    logits = torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in target]) for a in source]) / 0.07
    diagonal = logits.diagonal()
    expected = (logits.logsumexp(1) - diagonal).mean() / 2 + (logits.logsumexp(0) - diagonal).mean() / 2
    torch.testing.assert_close(contrastive_loss(source, target, torch.arange(9), torch.arange(9)), expected)


def test_all_cells_of_the_other_image_compete() -> None:
    source, target = torch.randn(9, 5), torch.randn(9, 5)
    cells = torch.tensor([2, 4]), torch.tensor([7, 1])
    expected = []
    for a, b in zip(*(one.tolist() for one in cells), strict=True):
        there = F.cosine_similarity(source[a][None], target) / 0.07
        back = F.cosine_similarity(target[b][None], source) / 0.07
        expected += [there.logsumexp(0) - there[b], back.logsumexp(0) - back[a]]
    torch.testing.assert_close(contrastive_loss(source, target, *cells), torch.stack(expected).mean())


def test_a_mix_averages_the_noise_of_its_slices_away() -> None:
    train, test = shifted_pairs(12, (1.0, 1.0, 1.0, 4.0)), shifted_pairs(8, (1.0, 1.0, 1.0, 4.0))
    result = train_hyperfeature_correspondence(train, test, grid=GRID, image_size=SIZE, width=12, epochs=10)
    assert result.gain > 0.05
    assert result.weights[3] < min(result.weights[:3])
    assert result.slice_accuracies[3] < min(result.slice_accuracies[:3])


def test_correspondence_without_noise_is_found() -> None:
    train, test = shifted_pairs(4, (0.0, 0.0)), shifted_pairs(2, (0.0, 0.0))
    result = train_hyperfeature_correspondence(train, test, grid=GRID, image_size=SIZE, width=12, epochs=2)
    assert result.accuracy > 0.95
    again = train_hyperfeature_correspondence(train, test, grid=GRID, image_size=SIZE, width=12, epochs=2)
    assert again == result


def test_user_mistakes_are_refused() -> None:
    slices, labels = halves_of_the_label(20)
    with pytest.raises(UserError, match="same slices, at least one: got 3 and 2"):
        train_hyperfeature_probe(slices, labels, slices[:2], labels)
    with pytest.raises(UserError, match="one positive number of features for each slice"):
        HyperfeatureMix(2, (4,), 8)
    with pytest.raises(UserError, match="width 0"):
        train_hyperfeature_probe(slices, labels, slices, labels, width=0)
    pairs = shifted_pairs(2, (0.0, 0.0))
    options = {"grid": GRID, "image_size": SIZE}
    with pytest.raises(UserError, match="pairs to train and to test on, got 2 and 0"):
        train_hyperfeature_correspondence(pairs, [], **options)
    with pytest.raises(UserError, match="all images of all pairs need the same slices"):
        train_hyperfeature_correspondence(pairs, shifted_pairs(1, (0.0,)), **options)
    with pytest.raises(UserError, match="8 x 9 cells do not hold 64 tokens"):
        train_hyperfeature_correspondence(pairs, pairs, grid=(8, 9), image_size=SIZE)
    pairs[1].target[0][3, 2] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        train_hyperfeature_correspondence(pairs, pairs, **options)
