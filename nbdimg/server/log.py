"""Logging that a client cannot flood: at most so many lines a second from connections, the rest counted."""

from __future__ import annotations

import logging
from time import monotonic

LINES_MAX = 20
"""Connection lines in one period; further ones are counted and reported when the period ends."""

PERIOD_S = 1.0

logger = logging.getLogger("nbdimg")


class LimitedLog:
    """One for a server: what connections say."""

    def __init__(self) -> None:
        self._period_start_s = monotonic()
        self._line_count = 0

    def say(self, level: int, message: str) -> None:
        now = monotonic()
        if now - self._period_start_s >= PERIOD_S:
            if self._line_count > LINES_MAX:
                logger.warning("%d more lines from connections were not logged", self._line_count - LINES_MAX)
            self._period_start_s = now
            self._line_count = 0
        self._line_count += 1
        if self._line_count <= LINES_MAX:
            logger.log(level, message)
