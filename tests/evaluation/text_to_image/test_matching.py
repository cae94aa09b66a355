from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repagen.errors import UserError
from repagen.evaluation.text_to_image.matching import PromptImages
from repagen.evaluation.text_to_image.prompts import PromptSet, read_prompts


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


TWELVE = [f"p{number}" for number in range(1, 13)]


@pytest.fixture(params=["folder", "jsonl"])
def twelve(request: pytest.FixtureRequest, tmp_path: Path) -> PromptSet:
    """p1 ... p12; sorted as text, p10 would follow p1."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name in TWELVE:
        (folder / f"{name}.txt").write_text(f"text of {name}")
    if request.param == "folder":
        return read_prompts(folder)
    lines = [json.dumps({"id": name, "prompt": f"text of {name}"}) for name in TWELVE]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return read_prompts(tmp_path / "prompts.jsonl")


@pytest.mark.parametrize(
    ("layout", "count"),
    [
        ("{0}", 1),
        *itertools.product(("{0}/{1}", "{0}_{1}", "{0}-{1}", "{0}/{0}_{1}", "run/{0}-{1:03}"), (1, 2)),
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_every_image_goes_to_the_prompt_of_its_id(
    folder_of: Any, twelve: PromptSet, layout: str, count: int, first: int
) -> None:
    assert [prompt.id for prompt in twelve.prompts] == TWELVE
    names = [layout.format(name, first + number) + ".png" for name in TWELVE for number in range(count)]
    images = PromptImages(folder_of(*names), twelve, count)
    assert (order(images), images.matching) == (names, "id")


def test_numbers_as_ids_are_no_numbers_of_images(folder_of: Any, tmp_path: Path) -> None:
    ids = [str(number) for number in range(11, -1, -1)]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"id": name, "prompt": "a"}) for name in ids))
    prompts = read_prompts(tmp_path / "p.jsonl")
    names = [f"{name}/0.png" for name in ids]
    assert order(PromptImages(folder_of(*names), prompts)) == names
    for name in names:
        (tmp_path / "images" / name).unlink()
    names = [f"{name}.png" for name in ids]
    assert order(PromptImages(folder_of(*names), prompts)) == names


@pytest.mark.parametrize("layout", ["{}.png", "{:05d}.png", "run/sample{}.png"])
def test_images_without_ids_take_the_prompts_in_their_order_only_when_asked(
    folder_of: Any, twelve: PromptSet, layout: str
) -> None:
    names = [layout.format(number) for number in range(24)]
    folder = folder_of(*names)
    with pytest.raises(
        UserError, match=r"24 images for 12 prompts x 2 = 24, and none is named .* prompt p1\); .*--by-order"
    ):
        PromptImages(folder, twelve, 2)
    images = PromptImages(folder, twelve, 2, by_order=True)
    assert order(images) == names
    assert images.matching == ("order" if "/" in layout else "number")


@pytest.mark.parametrize("layout", ["{}/0.png", "{}_final.png", "run-{}/samples/0.png", "{}/text.png"])
def test_images_with_ids_are_never_matched_by_order(folder_of: Any, twelve: PromptSet, layout: str) -> None:
    folder = folder_of(*(layout.format(name) for name in TWELVE))
    with pytest.raises(UserError, match=r"has the id of prompt p\d+, so that --by-order may"):
        PromptImages(folder, twelve, by_order=True)


def test_prompts_without_ids_are_matched_by_order_unasked(folder_of: Any, prompts_of: Any) -> None:
    with pytest.raises(UserError, match=r"have no ids.*drop by_order"):
        PromptImages(folder_of("0.png"), prompts_of("a"), by_order=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            [f"{name}/0.png" for name in TWELVE[1:]],
            "11 images, but .* missing is image 1 of prompt p1, looked for p1/0",
        ),
        ([*(f"{name}/0.png" for name in TWELVE), "p1/1.png"], "13 images, but 12 .*; p1/1.png belongs to no prompt"),
        ([*(f"{name}_0.png" for name in TWELVE[1:]), "p1.png"], "image 1 of prompt p1, looked for p1_0.png"),
        ([*(f"{name}_0.png" for name in TWELVE), "p1_00.png"], "both p1_0.png and p1_00.png are image p1_0"),
        ([*(f"{name}/{name}.png" for name in TWELVE[1:]), "p1/p2.png"], "image 1 of prompt p1, looked for p1.png"),
        ([*(f"{name}/a.png" for name in TWELVE)], "and none is named after a prompt"),
    ],
)
def test_names_that_do_not_fit_are_refused(folder_of: Any, twelve: PromptSet, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PromptImages(folder_of(*names), twelve)


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
