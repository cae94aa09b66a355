from __future__ import annotations

from pathlib import Path

import pytest

from repagen.errors import UserError
from repagen.training.log import MetricsLog, read_metrics


def write(path: Path, steps: range) -> None:
    log = MetricsLog(path)
    log.open_at(steps.start - 1)
    for step in steps:
        log.append({"step": step, "loss": 1 / step})
    log.close()


def test_rows_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    write(path, range(4, 5))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_a_torn_last_row_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    path.write_bytes(path.read_bytes()[:-7])
    write(path, range(3, 4))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_damaged_row_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="damaged row"):
        MetricsLog(path).open_at(3)


def test_floats_are_written_exactly_and_non_finite_ones_as_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.open_at(0)
    log.append({"step": 1, "loss": 0.1 + 0.2, "other": float("nan")})
    log.close()
    assert read_metrics(log.path) == [{"step": 1, "loss": 0.1 + 0.2, "other": None}]
