"""How a mutated image may be taken: opened or refused, within bounds of time and memory."""

from __future__ import annotations

import asyncio
import signal
import time
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from nbdimg.errors import NbdimgError
from nbdimg.image.driver import Extent, ExtentKind, FormatDriver

CPU_MAX_S = 1.0
WALL_MAX_S = 20
MEMORY_MAX = 64 << 20

Mutant = TypeVar("Mutant")


def check_located(driver: FormatDriver, offset: int) -> None:
    """Whether `locate` gives what `map` gives, if anything, and nothing that `map` refuses."""
    at = driver.locate(offset, offset + 1)
    if at >= 0:
        try:
            extent = driver.map(offset, offset + 1)
        except NbdimgError as error:
            raise AssertionError(f"located, but {error}") from None
        assert isinstance(extent, Extent), "located and not in memory"
        assert (extent.kind, extent.file) == (ExtentKind.DATA, driver.guest_file), "located and not stored as it is"
        assert at == extent.file_offset + offset - extent.offset, "located elsewhere"


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def complaint(
    each: Mutant,
    visit: Callable[[Mutant], Coroutine[Any, Any, None]],
    *,
    is_traced: bool,
    own_bytes: int = 0,
) -> str | None:
    """What is wrong with how a mutant was taken; None: nothing. Args: own_bytes: memory that is the test's."""
    if is_traced:
        tracemalloc.start()
    started = time.process_time()
    found = None
    try:
        with alarm(WALL_MAX_S):
            asyncio.run(visit(each))
    except TimeoutError as error:
        found = str(error)
    except (NbdimgError, OSError) as error:
        text = str(error)
        found = "a refusal of several lines" if "\n" in text or not text else None
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"
    took = time.process_time() - started
    if is_traced:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if peak > MEMORY_MAX + own_bytes:
            found = f"{found or ''} took {peak >> 20} MiB"
    elif took > CPU_MAX_S:
        found = f"{found or ''} took {took:.1f} s"
    return found and f"{each}, {visit.__name__}: {found}"
