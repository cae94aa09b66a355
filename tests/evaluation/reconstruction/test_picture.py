"""The picture of cases: which it shows, what it shows of them, and what its file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repagen.errors import UserError
from repagen.evaluation import FolderImages
from repagen.evaluation.reconstruction.evaluate import evaluate_reconstruction, reconstruct
from repagen.evaluation.reconstruction.picture import Case, Section, draw_cases, save_case_picture, worst_and_median


@pytest.fixture
def result(rae: Any, digits: Any) -> Any:
    return evaluate_reconstruction(rae, digits, metrics=["psnr", "ssim"], num_images=41)


def test_the_worst_and_the_median_are_those_of_the_ranking(result: Any) -> None:
    metric, worst, median = worst_and_median(result, 3)
    values = np.array([image.values["psnr"] for image in result.per_image])
    assert metric == "psnr"
    assert [image.values["psnr"] for image in worst] == sorted(values)[:3]
    assert median[1].values["psnr"] == np.median(values)
    assert all(abs(image.values["psnr"] - np.median(values)) <= np.ptp(values) / 5 for image in median)


def test_a_large_lpips_is_bad(result: Any) -> None:
    for image in result.per_image:
        image.values["lpips"] = float(image.index)
    result.spread["lpips"] = result.spread["psnr"]
    metric, worst, _ = worst_and_median(result, 2)
    assert metric == "lpips"
    assert [image.index for image in worst] == sorted((image.index for image in result.per_image), reverse=True)[:2]


def test_the_file_says_what_it_shows(result: Any, rae: Any, digits: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "cases.png"
    save_case_picture(path, result, digits, rae, count=2)
    with Image.open(path) as picture:
        facts = json.loads(picture.info["repagen"])
    _, worst, median = worst_and_median(result, 2)
    assert facts["worst"] == [image.index for image in worst]
    assert facts["median"] == [image.index for image in median]
    assert (facts["by"], facts["difference_factor"]) == ("psnr", 4)
    assert facts["metrics"] == result.metrics and facts["samples"] == result.samples


@pytest.mark.parametrize(("side", "factor"), [(32, 8), (256, 1)])
def test_original_reconstruction_and_four_times_the_difference_stand_side_by_side(side: int, factor: int) -> None:
    original = torch.randint(0, 200, (3, side, side), dtype=torch.uint8)
    reconstruction = original + torch.arange(side, dtype=torch.uint8)[None, None] % 50
    section = Section("Worst", [Case(original, reconstruction, "name", "figures")])
    pixels = torch.from_numpy(np.array(draw_cases("title", "facts", [section]))).permute(2, 0, 1)
    tile = side * factor
    expected = [original, reconstruction, (reconstruction - original) * 4]
    top = next(
        row
        for row in range(pixels.shape[1] - tile)
        if torch.equal(pixels[:, row : row + tile : factor, 32 : 32 + tile : factor], original)
    )
    for column, image in enumerate(expected):
        left = 32 + column * (tile + 8)
        assert torch.equal(pixels[:, top : top + tile : factor, left : left + tile : factor], image)


def test_a_long_name_stays_within_its_column() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    short, long = (
        np.array(draw_cases("t", "f", [Section("Worst", [Case(image, image, name, "figures")])]))
        for name in ("a.png", "folder/" * 60 + "a.png")
    )
    assert short.shape == long.shape
    assert (long[:, -32:] == 255).all()


def test_images_of_the_picture_are_those_of_the_pass(result: Any, rae: Any, digits: Any) -> None:
    _, worst, _ = worst_and_median(result, 1)
    original = digits.load([worst[0].index])[0][None]
    again = reconstruct(rae, original, ["it"])
    error = (original.float() - again.float()).square().mean() / 255**2
    assert -10 * error.log10().item() == pytest.approx(worst[0].values["psnr"], abs=0.01)


def test_without_figures_of_single_images_there_is_no_picture(
    identity: Any, extractor: Any, tmp_path: Path, random_pictures: Any, write_pictures: Any
) -> None:
    source = FolderImages(write_pictures(tmp_path / "images", random_pictures(3, seed=0, size=32)))
    result = evaluate_reconstruction(identity, source, metrics=["rfid"], extractor=extractor)
    with pytest.raises(UserError, match="add psnr to the metrics"):
        save_case_picture(tmp_path / "cases.png", result, source, identity)
