"""Lines of the log: as text or JSON, and not more of them than a client may cause.

A JSON line is one object: `ts` (RFC 3339, UTC), `level`, `message`, what the line was given in `fields`, and
`traceback` where there is one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import select
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from io import FileIO
from time import monotonic

from nbdimg.errors import printable
from nbdimg.units import counted

LINES_MAX = 20
"""Connection lines in one period; further ones are counted and reported when the period ends."""

PERIOD_S = 1.0

PATIENCE_MS = 20
"""How long a line waits for room where the log goes, and all clients with it, before it is left out."""

STDERR = 2

logger = logging.getLogger("nbdimg")


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """A line for people; what would break it or steer their terminal, as a file's name may, is escaped."""

    def __init__(self) -> None:
        super().__init__("nbdimg: %(levelname)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


class _Handler(logging.Handler):
    """To standard error where there is room: a pipe that nobody empties, or a terminal that is held, would stop the
    server with all its clients. Of a line that finds room for a part the rest is written first behind it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stream = FileIO(STDERR, "w", closefd=False)
        self._poll = select.poll()
        self._poll.register(STDERR, select.POLLOUT)
        self._rest = b""
        self._left_out_count = 0

    def emit(self, record: logging.LogRecord) -> None:
        if not self._has_room():
            self._left_out_count += 1
            return
        try:
            text = self.format(record) + "\n"
            if self._left_out_count:
                lines = counted(self._left_out_count, "line was", "lines were")
                said = f"{lines} left out, nobody took what was written"
                text = (
                    self.format(logging.LogRecord(logger.name, logging.WARNING, "", 0, said, None, None)) + "\n" + text
                )
                self._left_out_count = 0
            self._write(text.encode(errors="backslashreplace"))
        except Exception:
            self.handleError(record)

    def _has_room(self) -> bool:
        if not self._poll.poll(0 if self._left_out_count else PATIENCE_MS):
            return False
        if self._rest:
            self._write(self._rest)
        return not self._rest

    def _write(self, text: bytes) -> None:
        """What cannot be told to anybody is dropped."""
        try:
            count = self._stream.write(text) or 0
        except OSError:
            count = len(text)
        self._rest = text[count:]


def start_logging(format: str, *, is_verbose: bool) -> None:
    """Log to standard error from now on, also what Python would write there itself.

    Args: format: one of LOG_FORMATS; "auto" is text at a terminal, else JSON.
    """
    if format == "auto":
        format = "text" if sys.stderr.isatty() else "json"
    handler = _Handler()
    handler.setFormatter(TextFormatter() if format == "text" else JsonFormatter())
    logging.basicConfig(level=logging.DEBUG if is_verbose else logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    threading.excepthook = _on_thread_failure
    sys.unraisablehook = _on_unraisable


def _on_thread_failure(found: threading.ExceptHookArgs) -> None:
    if found.exc_type is not SystemExit:
        tell_internal("in a thread", found.exc_value)


def _on_unraisable(found: sys.UnraisableHookArgs) -> None:
    tell_internal(found.err_msg or "in a destructor", found.exc_value)


def tell_internal(where: str, error: BaseException | None) -> None:
    """An error that nobody foresaw, in one line; whoever wants the traceback asks for more."""
    logger.error("internal error: %s: %r", where, error)
    logger.debug("the failure's traceback", exc_info=error)


class LimitedLog:
    """What connections cause: at most `lines_max` lines in `period_s`; the rest is counted, and told of when the period
    ends. On a running loop.
    """

    def __init__(self, to: logging.Logger = logger, lines_max: int = LINES_MAX, period_s: float = PERIOD_S) -> None:
        self._logger = to
        self._lines_max = lines_max
        self._period_s = period_s
        self._period_start_s = monotonic()
        self._line_count = 0
        self._left_out_count = 0
        self._timer: asyncio.TimerHandle | None = None
        """Of who tells what was left out, if something was."""

    def say(self, level: int, message: str, fields: Mapping[str, object] | None = None) -> None:
        """`fields` are for JSON lines."""
        now = monotonic()
        if now - self._period_start_s >= self._period_s:
            self.tell_rest()
            self._period_start_s = now
            self._line_count = 0
        self._line_count += 1
        if self._line_count <= self._lines_max:
            self._logger.log(level, "%s", message, extra={"fields": fields or {}})
            return
        self._left_out_count += 1
        if self._timer is None:
            left_s = self._period_start_s + self._period_s - now
            self._timer = asyncio.get_running_loop().call_later(left_s, self.tell_rest)

    def tell_rest(self) -> None:
        """Tell how many lines were left out and have not been told of, if any."""
        if self._timer is None:
            return
        self._timer.cancel()
        self._timer = None
        more = counted(self._left_out_count, "more line from connections was", "more lines from connections were")
        self._logger.warning("%s not logged", more)
        self._left_out_count = 0
