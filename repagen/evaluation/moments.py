"""Mean and covariance of features that arrive in batches, in any order and on any number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from repagen.errors import UserError

Features = torch.Tensor | np.ndarray
ROWS = 1024  # of features in hand at once, where they are computed with in another precision than they are kept in


def as_rows(features: Features) -> torch.Tensor:
    """Return features (N, D) as a tensor on the CPU, of their own dtype and without a copy where they are one.

    Raises:
        UserError: when they are not a matrix, or when a row holds a NaN or an infinity (the row is named).
    """
    matrix = torch.as_tensor(features).detach().cpu()
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise UserError(f"features must be a matrix (N, D), got shape {tuple(matrix.shape)}; give each sample a row")
    finite = torch.cat([torch.isfinite(rows).all(dim=1) for rows in matrix.split(ROWS)])
    bad_rows = (~finite).nonzero().flatten().tolist()
    if bad_rows:
        raise UserError(
            f"features of sample {bad_rows[0]} are not finite ({len(bad_rows)} such samples); drop or redo it"
        )
    return matrix


def as_matrix(features: Features) -> torch.Tensor:
    """Return features (N, D) as a float64 tensor on the CPU; see `as_rows`, which takes no memory.

    Raises:
        UserError: as `as_rows`.
    """
    return as_rows(features).to(torch.float64)


def as_covariance(covariance: Features) -> torch.Tensor:
    """Return a covariance (D, D) as a symmetric float64 tensor on the CPU.

    Raises:
        UserError: when it is not square, or a row is not finite.
    """
    matrix = as_matrix(covariance)
    if matrix.shape[0] != matrix.shape[1]:
        raise UserError(f"a covariance is a square matrix, got shape {tuple(matrix.shape)}; check the statistics file")
    return (matrix + matrix.T) / 2


def require_covariance(eigenvalues: torch.Tensor) -> None:
    """Check eigenvalues (D,) in ascending order.

    Raises:
        UserError: when some are below zero by more than the rounding of a float32 covariance.
    """
    smallest, largest = eigenvalues[0].item(), max(eigenvalues[-1].item(), 0.0)
    if smallest < -1e-3 * largest:  # float32 covariances of other tools reach about -1e-6
        raise UserError(
            f"not a covariance: eigenvalues from {smallest:.3g} to {eigenvalues[-1].item():.3g}; check the statistics "
            "file"
        )


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and unbiased covariance (D, D) of features, float64; `count` is None where a file does not say it."""

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int | None = None

    @property
    def dimension(self) -> int:
        """Number of features D."""
        return self.mean.shape[0]

    @cached_property
    def root(self) -> torch.Tensor:
        """R (rank, D) with R^T R = covariance; computed once, so that a reference may serve many comparisons.

        Raises:
            UserError: when the matrix is no covariance.
        """
        eigenvalues, eigenvectors = torch.linalg.eigh(as_covariance(self.covariance))
        require_covariance(eigenvalues)
        # Rounding noise around zero would enter by its square root, 1e-8 of the scale for each missing dimension.
        kept = eigenvalues > eigenvalues[-1].abs() * len(eigenvalues) * torch.finfo(torch.float64).eps
        return eigenvalues[kept].sqrt()[:, None] * eigenvectors[:, kept].T


class FeatureMoments:
    """Running mean and scatter of features, float64.

    Batches and partial results are joined by the pairwise update of Chan, Golub & LeVeque (1979), which subtracts no
    large numbers: the result depends neither on order nor on batch size nor on the number of processes beyond
    rounding (1e-12), also where the mean is large against the spread.
    """

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self._count = 0
        self._mean = torch.zeros(dimension, dtype=torch.float64)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T
        # Joining costs a pass over the scatter, so small batches wait until they are many rows together.
        self._waiting: list[torch.Tensor] = []

    @property
    def count(self) -> int:
        """Samples seen."""
        return self._count + sum(map(len, self._waiting))

    @classmethod
    def of(cls, statistics: Statistics) -> FeatureMoments:
        """What must have been seen for these statistics to come out.

        Raises:
            UserError: when their number of samples is not known.
        """
        if statistics.count is None:
            raise UserError("statistics of an unknown number of samples cannot be taken further")
        moments = cls(statistics.dimension)
        moments._join(statistics.count, statistics.mean, statistics.covariance * (statistics.count - 1))
        return moments

    def update(self, features: Features) -> None:
        """Add features (B, D) of any float dtype.

        Raises:
            UserError: on features that are not finite, or of another number.
        """
        matrix = as_matrix(features)
        if matrix.shape[1] != self.dimension:
            raise UserError(f"cannot join {matrix.shape[1]} features with {self.dimension}; use one extractor")
        if len(matrix):
            self._waiting.append(matrix)
        if sum(map(len, self._waiting)) >= self.dimension:
            self._settle()

    def _settle(self) -> None:
        """Take in the batches that wait."""
        if not self._waiting:
            return
        matrix = torch.cat(self._waiting)
        self._waiting = []
        mean = matrix.mean(dim=0)
        centred = matrix - mean
        self._join(len(matrix), mean, centred.T @ centred)

    def merge(self, other: FeatureMoments) -> None:
        """Add everything that another accumulator has seen, for example that of another process."""
        self._settle()
        other._settle()
        if other._count:
            self._join(other._count, other._mean, other._scatter)

    def _join(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        total = self._count + count
        difference = mean - self._mean
        self._scatter.add_(scatter).addr_(difference, difference, alpha=self._count * count / total)
        self._mean += difference * (count / total)
        self._count = total

    def statistics(self) -> Statistics:
        """Return mean and unbiased covariance (division by N - 1).

        Raises:
            UserError: for fewer than two samples, which have no covariance.
        """
        self._settle()
        if self._count < 2:
            raise UserError(f"a covariance needs at least 2 samples, got {self._count}; give more images")
        return Statistics(self._mean.clone(), self._scatter / (self._count - 1), self._count)
