"""Distances between an image and its reconstruction, one figure for each image."""

from __future__ import annotations

import torch

from repagen.errors import UserError

_LEAST_SQUARED_ERROR = 1e-10  # RAE's floor: equal images have 100 dB


def peak_signal_to_noise_ratio(originals: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Return 10 log10(1 / mse) of each image in dB, at most 100, as RAE does (arXiv 2510.11690, its evaluation code).

    A mean of these is not the PSNR of the pooled error, which torchmetrics returns by default.

    Args:
        originals: (B, 3, H, W) float in [0, 1].
        reconstructions: of the same shape and range.

    Returns:
        (B,) of the same dtype.
    """
    errors = (originals - reconstructions).square().mean((1, 2, 3))
    return -10.0 * errors.clamp_min(_LEAST_SQUARED_ERROR).log10()


def structural_similarity(originals: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Return the SSIM of each image (Wang et al. 2004, Eq. 13) by torchmetrics, as RAE does.

    A Gaussian window of 11 px and sigma 1.5 around every pixel, the image mirrored at its borders; range 1.

    Args:
        originals: (B, 3, H, W) float in [0, 1].
        reconstructions: of the same shape and range.

    Returns:
        (B,) of the same dtype, at most 1.

    Raises:
        UserError: when torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise UserError("ssim needs torchmetrics; run `pip install 'repagen[metrics]'`, or leave ssim out") from error
    # A fixed range: torchmetrics would take it from the data, and an image's figure would depend on its neighbours.
    similarity = structural_similarity_index_measure(reconstructions, originals, data_range=1.0, reduction="none")
    assert isinstance(similarity, torch.Tensor), "a tuple only where the full image is asked for"
    return similarity
