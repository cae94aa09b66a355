"""Features and labels as the read-outs take them: checked, in float64 on the CPU, standardised by the training set."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from repagen.errors import UserError, naming
from repagen.evaluation.moments import as_matrix

EPSILON = 1e-6  # added to the variance, as in MAE's linear probe (2111.06377, appendix A.1)


def as_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Return tokens (B, T, D) as float64 on the CPU.

    Raises:
        UserError: when they have another number of axes, an empty axis, or a sample that is not finite (it is named).
    """
    if tokens.ndim != 3 or not tokens.numel():
        raise UserError(f"features must be tokens (B, T, D) with no empty axis, got shape {tuple(tokens.shape)}")
    return as_matrix(tokens.flatten(1)).view(tokens.shape)


def check_axes(train: torch.Tensor, test: torch.Tensor, axes: int) -> None:
    """Check that training and test features are both (N, D), axes = 2, or both tokens (N, T, D), axes = 3.

    Raises:
        UserError: when one is not.
    """
    for purpose, features in (("training", train), ("test", test)):
        if features.ndim != axes:
            allowed = "a matrix (N, D)" if axes == 2 else "tokens (N, T, D)"
            raise UserError(f"{purpose} features must be {allowed}, got shape {tuple(features.shape)}")


def check_grid(num_tokens: int, grid: tuple[int, int]) -> None:
    """Check that a grid (h, w) has as many cells as there are tokens.

    Raises:
        UserError: when it has not.
    """
    height, width = grid
    if min(height, width) < 1 or height * width != num_tokens:
        raise UserError(
            f"grid: {height} x {width} cells do not hold {num_tokens} tokens; "
            "drop prefix tokens, or give the grid of the features"
        )


def standardised(train: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Standardise features (..., D) per channel by mean and biased variance of the first argument.

    This is BatchNorm1d(D, affine=False, eps=1e-6) over the whole training set at once; all axes but the last are
    samples. A channel without variation in training stays at zero.
    """
    channels = train.flatten(0, -2)
    mean, scale = channels.mean(dim=0), (channels.var(dim=0, correction=0) + EPSILON).sqrt()
    return tuple((features - mean) / scale for features in (train, *others))


@dataclass(frozen=True)
class LabelledSplit:
    """Standardised features, (N, D) or (N, T, D) for training and M for testing, float64; classes int64 in [0, C)."""

    train: torch.Tensor
    train_classes: torch.Tensor
    test: torch.Tensor
    test_classes: torch.Tensor
    num_classes: int

    def accuracy(self, logits: torch.Tensor) -> float:
        """Fraction of the test samples whose largest logit (M, C) is that of their class."""
        return (logits.argmax(dim=1) == self.test_classes).double().mean().item()


def labelled_split(
    train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor
) -> LabelledSplit:
    """Check and standardise a training and a test set; the labels that occur in training become classes 0, 1, ...

    Args:
        train: features (N, D) or tokens (N, T, D) of any float dtype.
        train_labels: integers (N,).
        test: features (M, D) or tokens (M, T, D).
        test_labels: integers (M,), each of which occurs in training.

    Raises:
        UserError: on features that are not finite (the row is named), sets of different D, labels that are not one
            integer for each sample, an empty test set, a single class, or a test label that training lacks.
    """
    known, known_labels = _checked(train, train_labels, "training")
    unseen, unseen_labels = _checked(test, test_labels, "test")
    if known.shape[1:] != unseen.shape[1:]:
        raise UserError(
            f"cannot test on features {tuple(unseen.shape[1:])} after training on {tuple(known.shape[1:])}; "
            "take both from the same layer"
        )
    labels, train_classes = known_labels.unique(return_inverse=True)
    if len(labels) < 2:
        raise UserError(f"a probe needs at least 2 classes in training, got only label {labels.tolist()}; add another")
    absent = unseen_labels[~torch.isin(unseen_labels, labels)].unique().tolist()
    if absent:
        raise UserError(f"test labels {absent[:5]} do not occur in training; draw both sets from the same classes")
    train_features, test_features = standardised(known, unseen)
    test_classes = torch.searchsorted(labels, unseen_labels)
    return LabelledSplit(train_features, train_classes, test_features, test_classes, len(labels))


def _checked(features: torch.Tensor, labels: torch.Tensor, purpose: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features in float64 and labels int64, both on the CPU."""
    if not len(features):
        raise UserError(f"the {purpose} set of a probe holds no samples; give more images")
    with naming({"features": f"{purpose} features"}):
        checked = as_tokens(features) if features.ndim == 3 else as_matrix(features)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != (len(checked),):
        raise UserError(
            f"{purpose} labels must be one integer for each of the {len(checked)} samples, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return checked, labels.detach().to("cpu", torch.int64)
