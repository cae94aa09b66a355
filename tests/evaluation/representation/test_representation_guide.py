"""docs/representation.md says what the command understands, and its Python runs."""

from __future__ import annotations

import argparse
import re
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest

from repagen.evaluation.representation.command import add_arguments
from repagen.evaluation.representation.readouts import ReadOut

GUIDE = (Path(__file__).parents[3] / "docs/representation.md").read_text(encoding="utf-8")


def test_every_command_is_understood() -> None:
    commands = re.findall(r"^repagen evaluate representation (.*)$", GUIDE, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        parser = argparse.ArgumentParser(exit_on_error=False)
        add_arguments(parser)
        assert parser.parse_args(shlex.split(command)).data


def test_every_read_out_is_described() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", GUIDE, re.MULTILINE)
    assert [name.strip("`") for row in rows for name in row.split(", ")] == list(typing.get_args(ReadOut))


def test_the_python_example_runs(
    pipeline_folder: Path, encoder_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert code is not None
    small = code[1].replace("image_size=32", "image_size=16").replace('"train"', '"validation"')
    for name, folder in (("runs/digits/pipeline", pipeline_folder), ("ENCODER_FOLDER", encoder_folder)):
        assert name in small
        small = small.replace(name, str(folder))
    names: dict[str, Any] = {}
    exec(compile(small, "docs/representation.md", "exec"), names)
    assert "last block or layer" in capsys.readouterr().out
