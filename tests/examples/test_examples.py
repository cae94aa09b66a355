from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


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
