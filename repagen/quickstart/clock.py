"""The wall clock of a quickstart's parts."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

logger = logging.getLogger(__name__)


class Clock:
    """Announces the parts and takes their wall clock.

    Attributes:
        seconds: of the parts that have ended.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._part, self._start = "", 0.0

    def begin(self, part: str, what: str = "") -> None:
        """End the running part and begin another; without a name none."""
        now = time.perf_counter()
        if self._part:
            self.seconds[self._part] = round(now - self._start, 1)
        self._part, self._start = part, now
        if what:
            logger.info("== %s", what)


def readable_seconds(seconds: Mapping[str, float]) -> str:
    """Return the wall clock of parts as words."""
    return ", ".join(f"{name} {part:.0f} s" for name, part in seconds.items())
