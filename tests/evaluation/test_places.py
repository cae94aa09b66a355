"""Places of results; the commands' own tests see what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from repagen.errors import UserError
from repagen.evaluation.places import require_result_file, require_result_folder, write_result


def test_what_was_written_may_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/result.json"
    for value in (1.5, 2.5):
        require_result_file(path)
        require_result_folder(path.parent, result="result.json")
        write_result(path, {"schema": 1, "metrics": {"fid": value}})
        assert json.loads(path.read_text())["metrics"] == {"fid": value}


def test_looking_leaves_nothing_behind(tmp_path: Path) -> None:
    require_result_file(tmp_path / "a/b.json")
    require_result_folder(tmp_path / "a/b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    write_result(tmp_path / "result.json", {"schema": 1})
    with pytest.raises(UserError, match=r"result\.json: a figure of the result is not finite"):
        write_result(tmp_path / "result.json", {"schema": 1, "metrics": {"fid": value}})
    assert json.loads((tmp_path / "result.json").read_text()) == {"schema": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
