"""Frechet distance between two sets of features seen as Gaussians (Dowson & Landau 1982; FID, 1706.08500, Eq. 6)."""

from __future__ import annotations

import torch

from repagen.errors import UserError
from repagen.evaluation.moments import Features, Statistics, as_matrix


def frechet_distance(a: Features | Statistics, b: Features | Statistics) -> float:
    """Return |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), computed in float64 on the CPU.

    With factors S = R^T R the last trace is the nuclear norm of R_a R_b^T. No root of a product is taken, so that the
    result stays exact where a covariance is singular: for N <= D features the factor is the centred data itself.

    Args:
        a: features (N, D), N >= 2, tensor or array of any float dtype; or their `Statistics`.
        b: the same for the other set, of the same D.

    Raises:
        UserError: on fewer than 2 samples, a feature that is not finite (its row is named), different numbers of
            features, or a matrix that is no covariance.
    """
    mean_a, root_a = _mean_and_root(a)
    mean_b, root_b = _mean_and_root(b)
    if len(mean_a) != len(mean_b):
        raise UserError(
            f"cannot compare {len(mean_a)} features with {len(mean_b)}; both sides must come from the same extractor"
        )
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(distance.item(), 0.0)  # below zero by rounding only: the exact value is a squared distance


def _mean_and_root(side: Features | Statistics) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean (D,) and a factor R (rank, D) of the covariance R^T R."""
    if isinstance(side, Statistics):
        return as_matrix(side.mean[None])[0], _covariance_root(side.covariance)
    features = as_matrix(side)
    count, dimension = features.shape
    if count < 2:
        raise UserError(f"a Frechet distance needs at least 2 samples on each side, got {count}; give more images")
    mean = features.mean(dim=0)
    centred = features - mean
    if count <= dimension:
        return mean, centred / (count - 1) ** 0.5
    return mean, _covariance_root(centred.T @ centred / (count - 1))


def _covariance_root(covariance: torch.Tensor) -> torch.Tensor:
    """Return R (rank, D) with R^T R = covariance (D, D)."""
    matrix = as_matrix(covariance)
    if matrix.shape[0] != matrix.shape[1]:
        raise UserError(f"a covariance is a square matrix, got shape {tuple(matrix.shape)}; check the statistics file")
    eigenvalues, eigenvectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    largest = eigenvalues[-1].clamp_min(0)
    if eigenvalues[0] < -1e-3 * largest:  # float32 covariances of other tools reach about -1e-6
        raise UserError(
            f"not a covariance: eigenvalues from {eigenvalues[0]:.3g} to {largest:.3g}; check the statistics file"
        )
    # Rounding noise around zero would enter by its square root, 1e-8 of the scale for each missing dimension.
    kept = eigenvalues > largest * len(eigenvalues) * torch.finfo(torch.float64).eps
    return eigenvalues[kept].sqrt()[:, None] * eigenvectors[:, kept].T
