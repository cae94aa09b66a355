"""What a run leaves to read: one JSON line per optimiser step, and any tracker that accelerate knows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from repagen.errors import UserError

MetricValue = float | int


class MetricsLog:
    """`metrics.jsonl`: one row per optimiser step, in order, each written out at once.

    A row holds `step` (optimiser steps done), `images` (training samples seen), what the program reports, and `time_s`
    and `images_per_s`, the only columns that are not a function of the configuration.
    """

    TIME_COLUMNS = ("time_s", "images_per_s")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def open_at(self, step: int) -> None:
        """Continue after row `step`: later rows, and a torn last one, are cut off.

        Raises:
            UserError: if a row up to `step` is damaged.
        """
        self.path.touch()
        keep_bytes = 0
        with self.path.open("rb") as file:
            for line in file:
                if _step_of(line, step, self.path) > step:
                    break
                keep_bytes += len(line)
        os.truncate(self.path, keep_bytes)
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, MetricValue]) -> None:
        """Write one row; it survives the death of the process."""
        assert self._file is not None, "open_at comes first"
        self._file.write(json.dumps({name: _plain(value) for name, value in row.items()}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush the rows to disk, so that they survive a power loss as the checkpoint that follows does."""
        assert self._file is not None, "open_at comes first"
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; `open_at` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _step_of(line: bytes, last_step: int, path: Path) -> int:
    """The step of a row; a torn last line, which a killed run may leave, counts as later than every step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        if line.endswith(b"\n"):
            raise UserError(f"{path}: damaged row {line[:60]!r}; remove it, then run the same command again") from None
        return last_step + 1


def _plain(value: MetricValue) -> MetricValue | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
