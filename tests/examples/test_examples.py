from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repagen.data.shapes import read_picture

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


@pytest.mark.slow
def test_text_to_image(tmp_path: Path) -> None:
    *rows, sheet = run_example("text_to_image", "--output", str(tmp_path)).splitlines()
    assert [row.partition(":")[0] for row in rows] == [f"row {number}" for number in range(1, 6)]
    picture = np.asarray(Image.open(sheet))
    step, side = 4 * 32 + 4, 4 * 32

    def seen(row: int, column: int) -> set[tuple[str | None, str | None]]:
        tile = picture[row * step : row * step + side : 4, column * step : column * step + side : 4]
        return {(found.colour, found.shape) for found in read_picture(tile).objects}

    red_circle, blue_square = ("red", "circle"), ("blue", "square")
    assert seen(0, 0) == {red_circle} and seen(0, 1) == {("yellow", "cross")} and seen(0, 4) == {("red", "triangle")}
    assert all(red_circle not in seen(1, column) for column in range(5)), "the negative prompt"
    assert seen(2, 0) == {red_circle} and seen(2, 4) == {blue_square}
    added = [blue_square, ("green", "triangle"), ("yellow", "cross"), ("purple", "square"), ("cyan", "circle")]
    assert [seen(3, column) for column in range(5)] == [{red_circle, thing} for thing in added]
    assert seen(4, 0) == {red_circle} and seen(4, 4) == {blue_square}


@pytest.mark.slow
def test_sample(tmp_path: Path) -> None:
    assert "zero" not in run_example("sample", "--output", str(tmp_path), "--steps", "5")
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.slow
def test_train_on_your_folder(tmp_path: Path) -> None:
    printed = run_example("train_on_your_folder", "--output", str(tmp_path), "--steps", "5")
    assert "eight, five, four" in printed


@pytest.mark.slow
def test_align() -> None:
    lines = run_example("align", "--steps", "101").splitlines()
    cosines = [float(line.split()[-1]) for line in lines]
    assert cosines[-1] > cosines[0] + 0.3


@pytest.mark.slow
def test_swap_encoder() -> None:
    lines = run_example("swap_encoder", "--steps", "40").splitlines()
    errors = [float(line.split()[-1]) for line in lines]
    assert len(errors) == 2
    assert all(0 < error < 0.12 for error in errors), "a decoder that ignores its tokens stays above 0.2"
