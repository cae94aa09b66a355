"""Probes: how well the class of an image can be read from frozen features.

All standardise features per channel with the training set's statistics, as MAE's BatchNorm1d(affine=False, eps=1e-6)
does, so that no channel counts for its scale alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from repagen.errors import UserError
from repagen.evaluation.representation.fitting import (
    check_positive,
    fit_batches,
    fit_full_batch,
    seeded,
    seeded_batches,
)
from repagen.evaluation.representation.inputs import LabelledSplit, check_axes, labelled_split

_ROWS = 2048  # test samples whose similarities to the training set are in memory at once
_BATCH = 64


@dataclass(frozen=True)
class ProbeResult:
    """Top-1 accuracy in [0, 1] on `num_test` samples after training on `num_train`.

    `converged` is False where the solution of a convex problem was not reached within the iterations allowed.
    """

    accuracy: float
    num_train: int
    num_test: int
    converged: bool = True


def _result(split: LabelledSplit, logits: torch.Tensor, converged: bool = True) -> ProbeResult:
    return ProbeResult(split.accuracy(logits), len(split.train), len(split.test), converged)


def linear_probe(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    epochs: int = 1000,
    seed: int = 0,
) -> ProbeResult:
    """Fit a linear classifier on frozen features, as MAE and REPA do: standardisation without affine, then Linear.

    The published recipes run LARS or SGD for 90 epochs on ImageNet. Here L-BFGS minimises the cross-entropy plus a
    fixed weight decay (1e-3) over the whole training set: the problem is convex, so that its only solution depends on
    no learning rate, batch or order of samples, and a difference between two layers is one of the layers. It is the
    problem of sklearn's LogisticRegression with C = 1 / (1e-3 N). Iterations end where no component of the gradient
    is above 1e-7; `converged` of the result says whether they got there.

    Args:
        train: features (N, D) of any float dtype, for example the mean over an image's tokens.
        train_labels: integers (N,), of at least 2 classes.
        test: features (M, D).
        test_labels: integers (M,), each of which occurs in training.
        epochs: at most so many iterations of L-BFGS, each about one pass over the training set; a few hundred are
            enough for 768 features.
        seed: of the starting weights; the solution does not depend on it.

    Raises:
        UserError: see `labelled_split`; on features that are no matrix.
    """
    check_axes(train, test, 2)
    check_positive(epochs=epochs)
    split = labelled_split(train, train_labels, test, test_labels)
    with seeded(seed, "linear probe"):
        head = nn.Linear(split.train.shape[1], split.num_classes, dtype=torch.float64)
    converged = fit_full_batch([head], lambda: F.cross_entropy(head(split.train), split.train_classes), epochs)
    with torch.no_grad():
        return _result(split, head(split.test), converged)


def knn_probe(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> ProbeResult:
    """Classify by the weighted vote of the nearest training samples (DINO, 2104.14294; Wu et al. 1805.01978).

    Each of the k training samples of largest cosine c votes for its class with weight exp(c / temperature). DINO takes
    the cosine of its normalised features; here they are standardised first, like for the other probes, since a
    few channels of a generator's hidden states are so large that they would decide every cosine.

    Args:
        train: features (N, D) of any float dtype.
        train_labels: integers (N,), of at least 2 classes.
        test: features (M, D).
        test_labels: integers (M,), each of which occurs in training.
        neighbours: k in [1, N].
        temperature: positive; small values leave the decision to the nearest sample.

    Raises:
        UserError: see `labelled_split`; on k or a temperature outside its range.
    """
    check_axes(train, test, 2)
    split = labelled_split(train, train_labels, test, test_labels)
    if not 1 <= neighbours <= len(split.train):
        raise UserError(f"neighbours: must be from 1 to the {len(split.train)} training samples, got {neighbours}")
    check_positive(temperature=temperature)
    known = F.normalize(split.train, dim=1)
    votes = []
    for rows in F.normalize(split.test, dim=1).split(_ROWS):
        cosines, nearest = (rows @ known.T).topk(neighbours, dim=1)
        weights = ((cosines - cosines[:, :1]) / temperature).exp()  # relative to the nearest: cannot overflow
        empty = torch.zeros(len(rows), split.num_classes, dtype=weights.dtype)
        votes.append(empty.scatter_add_(1, split.train_classes[nearest], weights))
    return _result(split, torch.cat(votes))


class AttentivePooling(nn.Module):
    """Multi-head cross-attention of one learned query over tokens: (B, T, D) => (B, D).

    A single query needs no keys: the score q_h . (W_h x) of head h is (W_h^T q_h) . x, so that each head learns that
    vector of D directly, and values are projected after the weighted sum. The result is that of
    `nn.MultiheadAttention`, at 2 T D multiplications for each head instead of 2 T D^2.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise UserError(f"num_heads: must divide the {dim} features, got {num_heads}")
        self.queries = nn.Parameter(0.02 * torch.randn(num_heads, dim))
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pool tokens (B, T, D) to (B, D)."""
        attention = (tokens @ self.queries.T).softmax(dim=1)
        pooled = attention.transpose(1, 2) @ tokens  # (B, heads, D)
        weight = self.value.weight.unflatten(0, (len(self.queries), -1))
        return self.out(torch.einsum("bhd,hed->bhe", pooled, weight).flatten(1) + self.value.bias)


def attentive_probe(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    num_heads: int = 4,
    epochs: int = 30,
    seed: int = 0,
) -> ProbeResult:
    """Fit cross-attention of one learned query over the tokens, LayerNorm and Linear (CAE, 2202.03026).

    It finds what the mean over tokens hides. Trained in float32 by AdamW (rate 5e-3 falling to 0 as a cosine, weight
    decay 0.05, batches of 64); starting weights and the order of samples are functions of the seed.

    Args:
        train: tokens (N, T, D) of any float dtype; a channel is standardised over all tokens of all images.
        train_labels: integers (N,), of at least 2 classes.
        test: tokens (M, T, D).
        test_labels: integers (M,), each of which occurs in training.
        num_heads: of the attention; divides D.
        epochs: passes over the training set.
        seed: of the starting weights and of the order of samples.

    Raises:
        UserError: see `labelled_split`; on features that are no tokens; on heads that do not divide D.
    """
    check_axes(train, test, 3)
    check_positive(epochs=epochs)
    split = labelled_split(train, train_labels, test, test_labels)
    dim = split.train.shape[-1]
    with seeded(seed, "attentive probe"):
        head = nn.Sequential(AttentivePooling(dim, num_heads), nn.LayerNorm(dim), nn.Linear(dim, split.num_classes))
    tokens = split.train.float()
    batches = seeded_batches(len(tokens), _BATCH, epochs=epochs, seed=seed, purpose="attentive probe order")
    fit_batches(head, lambda chosen: F.cross_entropy(head(tokens[chosen]), split.train_classes[chosen]), batches)
    with torch.no_grad():
        logits = torch.cat([head(rows.float()) for rows in split.test.split(_BATCH)])
    return _result(split, logits)
