from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repagen.errors import UserError
from repagen.evaluation.text_to_image.matching import PromptImages
from repagen.evaluation.text_to_image.prompts import PromptSet


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., Path]:
    """A folder with black images of the given names."""

    def write(*names: str) -> Path:
        for name in names:
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
        return tmp_path / "images"

    return write


def order(images: PromptImages) -> list[str]:
    return [images.describe(index) for index in range(len(images))]


def test_numbers_count_as_numbers(folder_of: Any, prompts_of: Any) -> None:
    names = [f"{number}.png" for number in range(12)]
    images = PromptImages(folder_of(*names), prompts_of("abcdef"), 2)
    assert order(images) == names
    assert images.protocol["matched_by"] == "number" and images.protocol["images_per_prompt"] == 2


def test_numbers_may_begin_at_one_and_have_zeros(folder_of: Any, prompts_of: Any) -> None:
    names = [f"{number:03d}.png" for number in range(1, 4)]
    assert order(PromptImages(folder_of(*names), prompts_of("abc"))) == names


def test_other_names_are_matched_in_the_order_of_their_numbers(folder_of: Any, prompts_of: Any) -> None:
    names = [f"{prompt}/sample_{number}.jpg" for prompt in ("p2", "p10") for number in (0, 9, 10)]
    images = PromptImages(folder_of(*reversed(names)), prompts_of("ab"), 3)
    assert (order(images), images.matching) == (names, "order")


def test_ids_are_matched_by_name(folder_of: Any, dpg_prompts: PromptSet) -> None:
    names = ["1.png", "COCOval42.png", "midjourney3.png"]
    images = PromptImages(folder_of(*names), dpg_prompts)
    assert (order(images), images.matching) == (names, "id")


def test_ids_with_several_images(folder_of: Any, dpg_prompts: PromptSet) -> None:
    names = [f"{name}_{number}.png" for name in ("1", "COCOval42", "midjourney3") for number in (0, 1)]
    images = PromptImages(folder_of(*names), dpg_prompts, 2)
    assert (order(images), images.matching) == (names, "id")


def test_prompts_with_ids_take_numbered_images_too(folder_of: Any, dpg_prompts: PromptSet) -> None:
    names = [f"{number:05d}.png" for number in range(6)]
    assert PromptImages(folder_of(*names), dpg_prompts, 2).matching == "number"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["0.png", "1.png", "3.png"],
            r"3 images, but 3 prompts x 1 = 3 are .*; the first missing is image 1 of prompt 00002, looked for 2.png;",
        ),
        (["a.png", "b.png"], r"2 images, but 3 prompts x 1 = 3 .* the first missing is image 1 of prompt 00002;"),
        (["a.png", "b.png", "c.png", "d.png"], r"4 images, but 3 prompts x 1 = 3 are needed; complete"),
        (["0.png", "1.png", "2.png", "3.png"], r"4 images, but 3 .* needed; 3.png belongs to no prompt"),
        (["1.png", "01.png", "2.png", "3.png"], r"both 01.png and 1.png are image 1"),
    ],
)
def test_a_mismatch_names_both_counts_and_the_first(
    folder_of: Any, prompts_of: Any, names: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        PromptImages(folder_of(*names), prompts_of("abc"))


def test_a_missing_id_is_named(folder_of: Any, dpg_prompts: PromptSet) -> None:
    with pytest.raises(
        UserError, match=r"2 images, but .* missing is image 1 of prompt COCOval42, looked for COCOval42"
    ):
        PromptImages(folder_of("1.png", "midjourney3.png"), dpg_prompts)
