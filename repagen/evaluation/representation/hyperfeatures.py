"""Diffusion Hyperfeatures (Luo et al. 2305.14334): a learned mix of features of several blocks and times.

A slice is the tokens of one block at one time. Both trainers also read every slice on its own, with the same
standardisation, head and budget, so that "the mix is at least as good as its best slice" can be seen or refuted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from repagen.errors import UserError
from repagen.evaluation.representation.correspondence import Size, match_points, pck
from repagen.evaluation.representation.fitting import (
    check_positive,
    fit_batches,
    fit_full_batch,
    seeded,
    seeded_batches,
)
from repagen.evaluation.representation.inputs import as_tokens, check_grid, labelled_split, standardised
from repagen.evaluation.representation.probes import linear_probe

_LOGIT_SCALE = 1 / 0.07  # fixed, as in the authors' code: CLIP's starting value


class HyperfeatureMix(nn.Module):
    """Project each slice linearly to a common width and take the mean weighted by a softmax over slices.

    The paper projects by a residual bottleneck, shared between the times of a block; here it is one linear map
    (1 x 1 convolution) for each slice. It starts as a uniform mix of orthogonal projections.

    Args:
        num_slices: S, blocks times times.
        dims: features D_s of each slice.
        width: features of the mix.

    Raises:
        UserError: when there is not one positive number of features for each slice.
    """

    def __init__(self, num_slices: int, dims: Sequence[int], width: int) -> None:
        super().__init__()
        if num_slices < 1 or len(dims) != num_slices or min(dims) < 1 or width < 1:
            raise UserError(
                f"a mix needs one positive number of features for each slice, and a width: got {num_slices} slices, "
                f"features {list(dims)} and width {width}"
            )
        self.projections = nn.ModuleList(nn.Linear(dim, width, bias=False) for dim in dims)
        for weight in self.projections.parameters():
            nn.init.orthogonal_(weight)
        self.mixing_logits = nn.Parameter(torch.zeros(num_slices))

    @property
    def mixing_weights(self) -> torch.Tensor:
        """Share of each slice, (S,), positive with sum 1."""
        return self.mixing_logits.softmax(dim=0)

    def forward(self, slices: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mix slices of (..., D_s) to (..., width), for example tokens (B, T, D_s) to (B, T, width)."""
        weighted = zip(self.mixing_weights, self.projections, slices, strict=True)
        return torch.stack([weight * projection(features) for weight, projection, features in weighted]).sum(dim=0)


@dataclass(frozen=True)
class HyperfeatureResult:
    """What a mix of slices can do beside its slices.

    Attributes:
        accuracy: of the mix: top-1 accuracy, or PCK, in [0, 1].
        weights: share of each slice in the mix.
        slice_accuracies: the same measure for each slice alone, with the same budget.
    """

    accuracy: float
    weights: tuple[float, ...]
    slice_accuracies: tuple[float, ...]

    @property
    def best_slice(self) -> int:
        """Number of the first slice of the highest accuracy; it is chosen on the test set, which favours it."""
        return self.slice_accuracies.index(max(self.slice_accuracies))

    @property
    def gain(self) -> float:
        """Accuracy of the mix less that of its best slice; below 0 the mix does not pay."""
        return self.accuracy - max(self.slice_accuracies)


def train_hyperfeature_probe(
    train: Sequence[torch.Tensor],
    train_labels: torch.Tensor,
    test: Sequence[torch.Tensor],
    test_labels: torch.Tensor,
    *,
    width: int = 64,
    epochs: int = 20,
    seed: int = 0,
) -> HyperfeatureResult:
    """Classify by a linear head on the mean token of a mix; compare with `linear_probe` on that of each slice.

    The mean over tokens and the mix are both linear, so the mix is trained on mean tokens: the same result at 1/T of
    the cost. All slices are standardised as `linear_probe` does, and mix and head are fitted together by its L-BFGS,
    weight decay and number of iterations. The decay also draws the mix towards uniform weights, as the authors' AdamW
    does. For width >= D_s the mix can come as near as it likes to any single slice; it has more weights than each of
    them, though, and its problem is not convex: on few samples it may do worse, and `gain` says so.

    Args:
        train: S slices of tokens (N, T, D_s), all of the same images.
        train_labels: integers (N,), of at least 2 classes.
        test: S slices of tokens (M, T, D_s).
        test_labels: integers (M,), each of which occurs in training.
        width: features of the mix.
        epochs: at most so many iterations of L-BFGS, for the mix and for each slice. A linear probe has all but
            converged after 20; the mix goes on to fit the training set, so that to stop there protects it.
        seed: of the starting weights.

    Raises:
        UserError: on different numbers of slices; for each slice as `linear_probe`.
    """
    check_positive(epochs=epochs)
    if len(train) != len(test) or not train:
        raise UserError(f"training and test need the same slices, at least one: got {len(train)} and {len(test)}")
    known, unseen = ([as_tokens(tokens).mean(dim=1) for tokens in slices] for slices in (train, test))
    alone = [
        linear_probe(features, train_labels, others, test_labels, epochs=epochs, seed=seed).accuracy
        for features, others in zip(known, unseen, strict=True)
    ]
    splits = [
        labelled_split(features, train_labels, others, test_labels)
        for features, others in zip(known, unseen, strict=True)
    ]
    first, inputs = splits[0], [split.train for split in splits]
    with seeded(seed, "hyperfeature probe"):
        mix = HyperfeatureMix(len(inputs), [features.shape[1] for features in inputs], width).double()
        head = nn.Linear(width, first.num_classes, dtype=torch.float64)
    fit_full_batch([mix, head], lambda: F.cross_entropy(head(mix(inputs)), first.train_classes), epochs)
    with torch.no_grad():
        accuracy = first.accuracy(head(mix([split.test for split in splits])))
    return HyperfeatureResult(accuracy, tuple(mix.mixing_weights.tolist()), tuple(alone))


@dataclass(frozen=True)
class TokenPair:
    """Two images with corresponding points: S slices of tokens (T, D_s) of each, points (P, 2) x, y in pixels."""

    source: Sequence[torch.Tensor]
    target: Sequence[torch.Tensor]
    source_points: torch.Tensor
    target_points: torch.Tensor


def train_hyperfeature_correspondence(
    train: Sequence[TokenPair],
    test: Sequence[TokenPair],
    *,
    grid: Size,
    image_size: Size,
    width: int = 64,
    epochs: int = 10,
    seed: int = 0,
    alpha: float = 0.1,
) -> HyperfeatureResult:
    """Train a mix to match points, and read it and each slice alone by `match_points` and `pck`.

    The loss is the paper's: for each point the cosines of its cell with all cells of the other image,
    divided by 0.07, make a softmax whose target is the corresponding cell; cross-entropy, the mean of both directions.
    One pair a step, AdamW as in `attentive_probe`. Channels of a slice are standardised over all tokens of the
    training pairs. A slice alone is a mix of that slice, trained in the same way.

    Args:
        train: pairs with points inside both images.
        test: pairs of other images; points are pooled over pairs.
        grid: (h, w) of all slices.
        image_size: (H, W) of all images in pixels.
        width: features of the mix.
        epochs: passes over the training pairs, for the mix and for each slice.
        seed: of the starting weights and of the order of pairs.
        alpha: of `pck`.

    Raises:
        UserError: on no pairs, on slices that differ between pairs or are not finite, on a grid that does not fit, and
            as `match_points` and `pck`.
    """
    check_positive(epochs=epochs)
    if not train or not test:
        raise UserError(f"correspondence needs pairs to train and to test on, got {len(train)} and {len(test)}")
    num_slices = len(train[0].source)
    known, unseen = _standardised_pairs(train, test, grid)

    def fit_and_read(slices: Sequence[int]) -> tuple[HyperfeatureMix, float]:
        mix = _fit_correspondence(known, slices, grid, image_size, width=width, epochs=epochs, seed=seed)
        return mix, _read_correspondence(mix, unseen, slices, grid, image_size, alpha)

    mix, accuracy = fit_and_read(range(num_slices))
    alone = [fit_and_read([number])[1] for number in range(num_slices)]
    return HyperfeatureResult(accuracy, tuple(mix.mixing_weights.tolist()), tuple(alone))


def contrastive_loss(
    source: torch.Tensor, target: torch.Tensor, source_cells: torch.Tensor, target_cells: torch.Tensor
) -> torch.Tensor:
    """Symmetric cross-entropy of corresponding cells (P,) among all cells of tokens (T, D); see the trainer."""
    logits = _LOGIT_SCALE * F.normalize(source, dim=1) @ F.normalize(target, dim=1).T
    forward = F.cross_entropy(logits[source_cells], target_cells)
    backward = F.cross_entropy(logits.T[target_cells], source_cells)
    return (forward + backward) / 2


def _cells(points: torch.Tensor, grid: Size, image_size: Size) -> torch.Tensor:
    """Return the number (P,) of the cell in which each point (P, 2) lies, row-major."""
    column, row = (
        ((points[:, axis] + 0.5) * cells / size).floor().long().clamp(0, cells - 1)
        for axis, cells, size in ((0, grid[1], image_size[1]), (1, grid[0], image_size[0]))
    )
    return row * grid[1] + column


def _standardised_pairs(
    train: Sequence[TokenPair], test: Sequence[TokenPair], grid: Size
) -> tuple[list[TokenPair], list[TokenPair]]:
    """Return the pairs with float32 slices, standardised per channel over all tokens of the training pairs."""
    pairs = [*train, *test]
    sides = [side for pair in pairs for side in (pair.source, pair.target)]
    if len({tuple(tuple(tokens.shape) for tokens in side) for side in sides}) > 1 or not sides[0]:
        raise UserError("all images of all pairs need the same slices, at least one; take the same blocks and times")
    columns: list[torch.Tensor] = []  # of each slice: (images, T, D_s)
    for number in range(len(sides[0])):
        tokens = as_tokens(torch.stack([side[number] for side in sides]))
        check_grid(tokens.shape[1], grid)
        columns.append(torch.cat(standardised(tokens[: 2 * len(train)], tokens[2 * len(train) :])).float())
    ready = [
        TokenPair(
            [column[2 * index] for column in columns],
            [column[2 * index + 1] for column in columns],
            pair.source_points,
            pair.target_points,
        )
        for index, pair in enumerate(pairs)
    ]
    return ready[: len(train)], ready[len(train) :]


def _fit_correspondence(
    pairs: Sequence[TokenPair],
    slices: Sequence[int],
    grid: Size,
    image_size: Size,
    *,
    width: int,
    epochs: int,
    seed: int,
) -> HyperfeatureMix:
    with seeded(seed, "hyperfeature correspondence"):
        mix = HyperfeatureMix(len(slices), [pairs[0].source[number].shape[1] for number in slices], width)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        pair = pairs[int(batch)]
        source, target = (mix([side[number] for number in slices]) for side in (pair.source, pair.target))
        cells = (_cells(points, grid, image_size) for points in (pair.source_points, pair.target_points))
        return contrastive_loss(source, target, *cells)

    purpose = "hyperfeature correspondence order"
    fit_batches(mix, loss, seeded_batches(len(pairs), 1, epochs=epochs, seed=seed, purpose=purpose))
    return mix


@torch.no_grad()
def _read_correspondence(
    mix: HyperfeatureMix, pairs: Sequence[TokenPair], slices: Sequence[int], grid: Size, image_size: Size, alpha: float
) -> float:
    matched = []
    for pair in pairs:
        source, target = (mix([side[number] for number in slices]) for side in (pair.source, pair.target))
        matched.append(match_points(source, target, grid, pair.source_points, image_size))
    truth = torch.cat([pair.target_points for pair in pairs])
    return pck(torch.cat(matched), truth, image_size=image_size, alpha=alpha)
