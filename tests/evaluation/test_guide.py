"""docs/evaluation.md says what the command understands."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from repagen.evaluation.generation_command import add_arguments

GUIDE = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"^(?:repagen evaluate generation|accelerate launch .*?eval/generation\.py) (.*)$", GUIDE, re.MULTILINE
)


def test_the_guide_has_commands() -> None:
    assert len(COMMANDS) == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    assert parser.parse_args(shlex.split(command)).reference


def test_the_python_example_runs(
    pipeline_folder: Path, encoder_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert code is not None
    small = code[1].replace("num_images=1000", "num_images=20").replace("data.image_size=32", "data.image_size=16")
    for name, folder in (("runs/digits/pipeline", pipeline_folder), ("ENCODER_FOLDER", encoder_folder)):
        assert name in small
        small = small.replace(name, str(folder))
    names: dict[str, Any] = {}
    exec(compile(small, "docs/evaluation.md", "exec"), names)
    assert names["result"].num_samples == 20
    assert "Frechet distance" in capsys.readouterr().out
