"""Inception Score (1606.03498): how sure a classifier is of each image, and how varied its classes are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from repagen.errors import UserError
from repagen.evaluation.moments import Features, as_matrix

Order = Literal["file", "torch-fidelity", "seeded"]
_TORCH_FIDELITY_SEED = 2020
_RAEV2_SEED = 0


@dataclass(frozen=True)
class InceptionScore:
    """Mean and (population) standard deviation over the splits of exp(mean KL), in [1, number of classes]."""

    mean: float
    std: float


class InceptionScoreSums:
    """Sums from which the score follows, for images in any order and on any number of processes, float64.

    The mean KL of a split is mean_i sum_c p log p - sum_c q log q with q = mean_i p, so that nothing of size N x C is
    kept.

    Args:
        splits: number of parts the images are divided into (customarily 10); see `split_of_position`.

    Attributes:
        counts: images of each split (splits,).
        negative_entropies: sum over images of sum_c p log p (splits,).
        probabilities: sum over images of p (splits, C); None before the first image.

    Raises:
        UserError: for fewer than one split.
    """

    def __init__(self, splits: int) -> None:
        _require_splits(splits)
        self.splits = splits
        self.counts = torch.zeros(splits, dtype=torch.int64)
        self.negative_entropies = torch.zeros(splits, dtype=torch.float64)
        self.probabilities: torch.Tensor | None = None

    def update(self, split_of_image: torch.Tensor, logits: Features) -> None:
        """Add images.

        Args:
            split_of_image: split of each image (B,) int64, in [0, splits).
            logits: of the classifier (B, C), any float dtype; the literature leaves out the bias of Inception's head.

        Raises:
            UserError: on logits that are not finite, of another number of classes than before, or splits that do not
                fit them.
        """
        matrix = as_matrix(logits)
        split = split_of_image.to("cpu", torch.int64)
        if split.shape != matrix.shape[:1] or bool(((split < 0) | (split >= self.splits)).any()):
            raise UserError(
                f"each of the {len(matrix)} images needs one split in [0, {self.splits}), got a tensor of shape "
                f"{tuple(split.shape)}; see split_of_position"
            )
        log_p = matrix.log_softmax(dim=1)
        p = log_p.exp()
        self._add(
            torch.bincount(split, minlength=self.splits),
            torch.zeros_like(self.negative_entropies).index_add_(0, split, (p * log_p).sum(dim=1)),
            torch.zeros(self.splits, p.shape[1], dtype=torch.float64).index_add_(0, split, p),
        )

    def merge(self, other: InceptionScoreSums) -> None:
        """Add everything that another accumulator has seen, for example that of another process.

        Raises:
            UserError: when it has another number of splits or classes.
        """
        if other.splits != self.splits:
            raise UserError(f"cannot merge {other.splits} splits with {self.splits}; use the same number everywhere")
        if other.probabilities is not None:
            self._add(other.counts, other.negative_entropies, other.probabilities)

    def _add(self, counts: torch.Tensor, negative_entropies: torch.Tensor, probabilities: torch.Tensor) -> None:
        if self.probabilities is None:
            self.probabilities = torch.zeros_like(probabilities)
        if self.probabilities.shape != probabilities.shape:
            raise UserError(
                f"cannot join logits of {probabilities.shape[1]} classes with {self.probabilities.shape[1]}; use one "
                "classifier"
            )
        self.counts += counts
        self.negative_entropies += negative_entropies
        self.probabilities += probabilities

    def result(self) -> InceptionScore:
        """Return the score of all images seen.

        Raises:
            UserError: when a split has no image.
        """
        if self.probabilities is None or not self.counts.all():
            raise UserError(
                f"the Inception Score needs images in each of its {self.splits} splits, got {int(self.counts.sum())} "
                f"images in {int(self.counts.count_nonzero())}; give more images or fewer splits"
            )
        q = self.probabilities / self.counts[:, None]
        scores = (self.negative_entropies / self.counts + torch.special.entr(q).sum(dim=1)).exp()
        return InceptionScore(scores.mean().item(), scores.std(correction=0).item())


def shuffled_positions(count: int, order: Order) -> torch.Tensor:
    """Return the position (count,) int64 of each image in the order in which the images are divided into splits.

    The score depends on it: where files are ordered by class, their own order makes splits of few classes and a score
    that is far too low.

    Args:
        count: number of images that could be read; images are numbered without gaps in file order.
        order: `file` as ADM's evaluator (consecutive chunks), `torch-fidelity` as its default (seed 2020), `seeded` as
            RAEv2 (seed 0).

    Raises:
        UserError: for another order.
    """
    if order not in get_args(Order):
        raise UserError(f"order of the Inception Score: {order!r} is none of {', '.join(get_args(Order))}")
    if order == "file":
        return torch.arange(count)
    # The streams of the published figures, so these draws are numpy's and not repagen.randomness's.
    seed = _TORCH_FIDELITY_SEED if order == "torch-fidelity" else _RAEV2_SEED
    image_at_position = torch.from_numpy(np.random.RandomState(seed).permutation(count))
    return image_at_position.argsort()


def split_of_position(positions: torch.Tensor, count: int, splits: int) -> torch.Tensor:
    """Return the split (...) int64 of positions (...) in [0, count): split s begins at s * count // splits.

    Raises:
        UserError: for fewer images than splits, or a position outside.
    """
    _require_splits(splits)
    if count < splits:
        raise UserError(f"an Inception Score of {splits} splits needs as many images, got {count}; use fewer splits")
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < count:
        raise UserError(
            f"positions of {count} images lie in [0, {count}), got {int(positions.min())} to {int(positions.max())}"
        )
    ends = torch.arange(1, splits + 1, device=positions.device) * count // splits
    return torch.bucketize(positions, ends, right=True)


def _require_splits(splits: int) -> None:
    if splits < 1:
        raise UserError(f"an Inception Score needs at least 1 split, got {splits}; customary are 10")
