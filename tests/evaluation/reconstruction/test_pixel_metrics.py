"""PSNR and SSIM of single images: closed forms, and the definitions written out."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from repagen.errors import UserError
from repagen.evaluation.reconstruction.pixel_metrics import peak_signal_to_noise_ratio, structural_similarity


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Images and noisy copies; the noise grows from image to image."""
    originals = torch.rand(4, 3, 24, 24)
    noise = torch.randn(4, 3, 24, 24) * torch.tensor([0.01, 0.05, 0.1, 0.4]).view(4, 1, 1, 1)
    return originals, (originals + noise).clamp(0, 1)


def test_psnr_of_a_constant_offset_is_its_closed_form() -> None:
    originals = torch.full((3, 3, 8, 8), 0.25)
    reconstructions = originals + torch.tensor([0.1, 0.5, 0.001]).view(3, 1, 1, 1)
    expected = torch.tensor([20.0, 20 * math.log10(2), 60.0])
    torch.testing.assert_close(peak_signal_to_noise_ratio(originals, reconstructions), expected, atol=1e-3, rtol=0)


def test_psnr_of_equal_images_is_the_floor() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert peak_signal_to_noise_ratio(images, images).tolist() == [100.0, 100.0]


def test_psnr_is_per_image_and_not_pooled(pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    ours = peak_signal_to_noise_ratio(*pairs)
    mean = peak_signal_noise_ratio(pairs[1], pairs[0], data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
    pooled = peak_signal_noise_ratio(pairs[1], pairs[0], data_range=1.0)
    assert ours.mean().item() == pytest.approx(mean.item(), abs=1e-4)
    assert abs(ours.mean().item() - pooled.item()) > 1


def test_ssim_is_torchmetrics_of_single_images(pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    ours = structural_similarity(*pairs)
    alone = [
        structural_similarity_index_measure(b[None], a[None], data_range=1.0) for a, b in zip(*pairs, strict=True)
    ]
    torch.testing.assert_close(ours, torch.stack([torch.as_tensor(value) for value in alone]), atol=1e-6, rtol=0)
    assert ours.tolist() == sorted(ours.tolist(), reverse=True)


def test_ssim_by_its_definition(pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Wang et al. 2004, Eq. 13, window by window in float64, borders mirrored."""
    a, b = (F.pad(side[2].double(), (5, 5, 5, 5), mode="reflect") for side in pairs)
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    values = []
    for channel in range(3):
        for row in range(24):
            for column in range(24):
                x, y = (side[channel, row : row + 11, column : column + 11] for side in (a, b))
                mean_x, mean_y = (window * x).sum(), (window * y).sum()
                var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
                covariance = (window * (x - mean_x) * (y - mean_y)).sum()
                likeness = (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
                values.append(likeness / ((mean_x**2 + mean_y**2 + 0.01**2) * (var_x + var_y + 0.03**2)))
    expected = torch.stack(values).mean().item()
    assert structural_similarity(*pairs)[2].item() == pytest.approx(expected, abs=1e-5)


def test_ssim_of_an_image_does_not_depend_on_the_range_of_its_neighbours() -> None:
    dark = torch.rand(1, 3, 16, 16) * 0.1
    pair = dark, dark + 0.02 * torch.rand(1, 3, 16, 16)
    beside = [torch.cat([side, torch.rand(1, 3, 16, 16)]) for side in pair]
    assert structural_similarity(*beside)[0].item() == pytest.approx(structural_similarity(*pair).item(), abs=1e-6)


def test_ssim_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(UserError, match=r"pip install 'repagen\[metrics\]'"):
        structural_similarity(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16))
