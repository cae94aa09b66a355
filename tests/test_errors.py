from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from repagen.errors import OneLineParser, UserError, naming, refusing, run_as_program


def stop(main, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as stopped:
        run_as_program(main, words)
    return stopped.value.code, capsys.readouterr().err


def test_a_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main(words: Sequence[str]) -> None:
        raise UserError("data.path: no such\nfolder")

    assert stop(main, capsys) == (2, "repagen: error: data.path: no such folder\n")


def test_a_path_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()

    def main(words: Sequence[str]) -> None:
        (tmp_path / "file" / "below").mkdir()

    code, printed = stop(main, capsys)
    assert code == 2
    assert printed.startswith("repagen: error: ") and str(tmp_path / "file") in printed and printed.count("\n") == 1


def test_an_interrupt_is_one_line_and_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    def main(words: Sequence[str]) -> None:
        raise KeyboardInterrupt

    assert stop(main, capsys) == (130, "repagen: interrupted\n")


def test_debug_shows_the_traceback() -> None:
    def main(words: Sequence[str]) -> None:
        assert list(words) == ["a"]
        raise UserError("wrong")

    with pytest.raises(UserError, match="wrong"):
        run_as_program(main, ["a", "--debug"])


def test_errors_of_the_command_line_come_without_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    def main(words: Sequence[str]) -> None:
        parser = OneLineParser(prog="repagen thing")
        parser.add_argument("--number", type=int)
        parser.parse_args(words)

    code, printed = stop(main, capsys, "--number", "x")
    assert code == 2
    assert printed == (
        "repagen: error: repagen thing: argument --number: invalid int value: 'x'; see `repagen thing --help`\n"
    )


def test_an_open_progress_bar_ends_before_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    bars = []

    def main(words: Sequence[str]) -> None:
        bars.append(tqdm(total=3))
        raise UserError("wrong")

    _, printed = stop(main, capsys)
    assert printed.endswith("\nrepagen: error: wrong\n")


def test_a_librarys_error_over_a_file_keeps_its_reason() -> None:
    with (
        pytest.raises(UserError, match=r"x cannot be loaded \(bad header\)"),
        refusing("x cannot be loaded"),
    ):
        raise RuntimeError("bad\nheader")
    with pytest.raises(UserError, match=r"^mine$"), refusing("x cannot be loaded"):
        raise UserError("mine")


def test_an_argument_is_named_as_the_user_wrote_it() -> None:
    keys = {"layers:": "autoencoder.layers:", "": "never"}
    with pytest.raises(UserError, match=r"^autoencoder\.layers: 7 is none$"), naming(keys):
        raise UserError("layers: 7 is none")
    with pytest.raises(UserError, match=r"^data: gone$"), naming({"layers:": "autoencoder.layers:"}):
        raise UserError("data: gone")


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "repagen", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage: repagen" in done.stdout


@pytest.mark.slow
def test_libraries_that_are_installed_but_not_used_say_nothing() -> None:
    words = [sys.executable, "-m", "repagen.cli", "sample", "--model", "/absent", "--out", "/absent/images"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.startswith("repagen: error: --model: ") and done.stderr.count("\n") == 1
