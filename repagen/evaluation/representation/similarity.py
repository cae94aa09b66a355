"""How alike two representations of the same images are: CKNNA and unbiased CKA."""

from __future__ import annotations

import torch

from repagen.errors import UserError
from repagen.evaluation.moments import as_matrix

_SMALLEST = 1e-12  # of the mean square of a kernel: below, its own HSIC is rounding


def unbiased_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Compare features by linear CKA with the unbiased HSIC (Kornblith et al. 1905.00414; Song et al., JMLR 2012).

    About 0 for unrelated features at every N and D, where the biased form tends to 1 with D / N; 1 for features equal
    up to rotation, scale and shift. Rows are not normalised. float64; memory: a few N x N matrices (10,000 samples:
    0.8 GB each).

    Args:
        x: features (N, Dx), N >= 4, of any float dtype.
        y: features (N, Dy) of the same images in the same order.

    Raises:
        UserError: on fewer than 4 samples, different N, features that are not finite (row named) or do not vary.
    """
    x, y = _paired(x, y)
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)  # changes nothing but the rounding
    kernel_x, kernel_y = x @ x.T, y @ y.T
    return _normalised(_unbiased_hsic(kernel_x, kernel_y), kernel_x, kernel_y)


def cknna(x: torch.Tensor, y: torch.Tensor, neighbours: int = 10) -> float:
    """Compare features by centred kernel nearest-neighbour alignment (Huh et al. 2405.07987).

    CKA over the pairs that are neighbours in both representations: with cosines K, L and A(K)_ij = 1 where j is among
    the k nearest others of i, M = A(K) A(L):
    CKNNA = HSIC(M K, M L) / sqrt(HSIC(A(K) K, A(K) K) HSIC(A(L) L, A(L) L)), HSIC unbiased. With k = N - 1 it is
    `unbiased_cka` of the normalised rows. The authors' code adds 1e-6 to the denominator, which takes .0006 (N = 400)
    to .004 (N = 5000) off the 1 of equal features; this function does not. It also clips nothing: the authors' driver
    clips features at the 0.95 quantile of |x| first. float64; memory as in `unbiased_cka`.

    Args:
        x: features (N, Dx), N >= 4, of any float dtype; rows are L2-normalised here.
        y: features (N, Dy) of the same images in the same order.
        neighbours: k in [1, N - 1]. The value depends on it and on N: report both.

    Raises:
        UserError: as `unbiased_cka`; on k outside its range; on a row of zeros (it is named).
    """
    x, y = _paired(x, y)
    if not 1 <= neighbours < len(x):
        raise UserError(f"neighbours: must be from 1 to {len(x) - 1} with {len(x)} samples, got {neighbours}")
    x, y = _unit_rows(x), _unit_rows(y)
    kernel_x, kernel_y = x @ x.T, y @ y.T
    near_x, near_y = _nearest(kernel_x, neighbours), _nearest(kernel_y, neighbours)
    near_both = near_x & near_y
    shared = _unbiased_hsic(kernel_x * near_both, kernel_y * near_both)
    return _normalised(shared, kernel_x * near_x, kernel_y * near_y)


def _paired(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = as_matrix(x), as_matrix(y)
    if len(x) != len(y):
        raise UserError(f"cannot compare features of {len(x)} samples with those of {len(y)}; give the same images")
    if len(x) < 4:
        raise UserError(f"an unbiased similarity needs at least 4 samples, got {len(x)}; give more images")
    for features in (x, y):
        if torch.equal(features, features[:1].expand_as(features)):
            raise UserError(f"all {len(features)} samples have the same features: nothing to compare; check the layer")
    return x, y


def _unit_rows(features: torch.Tensor) -> torch.Tensor:
    norms = features.norm(dim=1, keepdim=True)
    zero_rows = (norms.flatten() == 0).nonzero().flatten().tolist()
    if zero_rows:
        raise UserError(f"features of sample {zero_rows[0]} are all zero and have no direction; drop or redo it")
    return features / norms


def _nearest(kernel: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Return the mask (N, N) of the nearest others of each row; it need not be symmetric."""
    nearest = kernel.clone().fill_diagonal_(-torch.inf).topk(neighbours, dim=1).indices
    return torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, nearest, True)


def _normalised(hsic: float, kernel_x: torch.Tensor, kernel_y: torch.Tensor) -> float:
    """An HSIC over the geometric mean of those of two kernels with themselves."""
    return hsic / (_self_hsic(kernel_x) * _self_hsic(kernel_y)) ** 0.5


def _self_hsic(kernel: torch.Tensor) -> float:
    value = _unbiased_hsic(kernel, kernel)
    if value <= _SMALLEST * kernel.square().mean().item():
        raise UserError("features vary too little for a similarity (their HSIC with themselves is not positive)")
    return value


def _unbiased_hsic(kernel_x: torch.Tensor, kernel_y: torch.Tensor) -> float:
    """Song et al. 2012, for kernels (N, N) that need not be symmetric; their diagonals are left out."""
    count = len(kernel_x)
    kernel_x, kernel_y = kernel_x.clone().fill_diagonal_(0), kernel_y.clone().fill_diagonal_(0)
    pairs = (kernel_x * kernel_y.T).sum()
    totals = kernel_x.sum() * kernel_y.sum() / ((count - 1) * (count - 2))
    chains = kernel_x.sum(dim=0) @ kernel_y.sum(dim=1)  # the sum over all entries of the product of the two
    return ((pairs + totals - 2 * chains / (count - 2)) / (count * (count - 3))).item()
