"""Raw: guest offset and file offset are the same.

Holes are found with SEEK_DATA and SEEK_HOLE. Runs of data are remembered, so that a read of a written image costs no
look-up; holes are not, for another write may fill them at any time. A remembered run can only be stale by having been
punched since, and then it reads as zeroes all the same; `unmapped` forgets it, so that BLOCK_STATUS tells the truth.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from nbdimg.errors import ConfigError
from nbdimg.formats.newfile import naming, new_file
from nbdimg.formats.options import OpenOptions
from nbdimg.image.driver import Allocation, Extent, ExtentKind, Miss, Unmap
from nbdimg.image.image import Image
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import Plan, Stage

RUNS_MAX = 4096
"""Remembered runs of data, about 0.5 MiB; beyond it all are forgotten, and found again as they are needed."""


class RawDriver:
    name = "raw"
    cluster_size = unmap_size = sector_size = 1
    is_strained = False
    failure: str | None = None

    def __init__(self, file: BlockFile) -> None:
        self.file = self.guest_file = file
        self.size = file.size
        self._starts: list[int] = []
        self._runs: list[Extent] = []
        self._whole = self._extent(ExtentKind.DATA, 0, self.size)
        self._recent = self._extent(ExtentKind.ZERO, 0, 0)
        self._loaded: tuple[int, tuple[bool, int]] | None = None
        """What `load` has found at an offset. It is true for who waits for it and asks again at once: nothing of the
        range has changed meanwhile, while behind it a hole may have been written to."""

    def _extent(self, kind: ExtentKind, start: int, stop: int) -> Extent:
        return Extent(kind, start, stop - start, self.file, start, self.file.is_writable)

    def map(self, offset: int, stop: int) -> Extent | Miss:
        recent = self._recent
        if recent.offset <= offset < recent.offset + recent.length:
            return recent
        index = bisect_right(self._starts, offset) - 1
        if index >= 0 and offset < self._runs[index].stop:
            self._recent = self._runs[index]
            return self._recent
        found = self._found(offset)
        if found is None:
            return Miss(self, offset)
        is_data, end = found
        end = min(end, self.size) if end > offset else self.size
        if not is_data:
            return self._extent(ExtentKind.ZERO, offset, end)
        self._recent = self._remember(offset, end)
        return self._recent

    def locate(self, offset: int, stop: int) -> int:
        """Extents of raw images are long: one is asked for, and serves many."""
        return -1

    def _found(self, offset: int) -> tuple[bool, int] | None:
        if self._loaded is not None and self._loaded[0] == offset:
            loaded, self._loaded = self._loaded, None
            return loaded[1]
        return self.file.try_data_extent(offset)

    async def load(self, key: int) -> None:
        self._loaded = key, await self.file.data_extent(key)

    def _remember(self, start: int, stop: int) -> Extent:
        """Add a run, merged with those that it touches."""
        first = bisect_right(self._starts, start)
        if first and self._runs[first - 1].stop >= start:
            first -= 1
            start = self._runs[first].offset
        last = bisect_right(self._starts, stop)
        if last > first:
            stop = max(stop, self._runs[last - 1].stop)
        if len(self._runs) >= RUNS_MAX:
            self._forget_all()
            first = last = 0
        run = self._extent(ExtentKind.DATA, start, stop)
        self._starts[first:last] = [start]
        self._runs[first:last] = [run]
        return run

    def _forget_all(self) -> None:
        self._starts.clear()
        self._runs.clear()
        self._recent = self._extent(ExtentKind.ZERO, 0, 0)

    def resized(self) -> None:
        """The file has another size."""
        self.size = self.file.size
        self._whole = self._extent(ExtentKind.DATA, 0, self.size)
        self._forget_all()

    def place(self, offset: int, stop: int) -> Extent | Miss:
        return self._whole

    def reserve(self, offset: int, stop: int) -> Allocation | Miss:
        raise AssertionError("every write to a raw image goes in place")

    def commit(self, allocation: Allocation) -> None:
        raise AssertionError("a raw image allocates nothing")

    def release(self, allocation: Allocation) -> None:
        raise AssertionError("a raw image allocates nothing")

    def unmap(self, offset: int, stop: int, to: Unmap) -> int | Miss:
        return offset

    def unmapped(self, offset: int, length: int) -> None:
        stop = offset + length
        self._recent = self._extent(ExtentKind.ZERO, 0, 0)
        first = bisect_right(self._starts, offset)
        if first and self._runs[first - 1].stop > offset:
            first -= 1
        last = bisect_right(self._starts, stop - 1)
        kept = []
        if first < last:
            if self._runs[first].offset < offset:
                kept.append(self._extent(ExtentKind.DATA, self._runs[first].offset, offset))
            if self._runs[last - 1].stop > stop:
                kept.append(self._extent(ExtentKind.DATA, stop, self._runs[last - 1].stop))
        self._runs[first:last] = kept
        self._starts[first:last] = [run.offset for run in kept]
        if len(self._runs) > RUNS_MAX:
            self._forget_all()

    def flush_plan(self) -> Plan:
        return Plan((Stage((), (self.file,)),))

    async def flushed(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def abandon(self) -> None:
        await self.file.close()
        self._forget_all()


async def resize(image: Image, size: int, *, progress: object = None) -> None:
    """Give the file `size` bytes, durable on return; new ones are a hole. No request may be in flight.

    Raises: ConfigError: nothing of this size can be in the file system, or it is a block device. OSError.
    """
    driver = image.driver
    assert isinstance(driver, RawDriver)
    with _fitting(driver.file.path, size):
        await driver.file.truncate(size)
    driver.resized()
    image.resized()
    image.gate.changed()
    await image.flush()


async def open_driver(file: BlockFile, options: OpenOptions) -> RawDriver:
    await options.open_backing(None)
    return RawDriver(file)


def create(path: str, size: int) -> None:
    """Make a sparse raw image of `size` bytes. Raises: ConfigError: as `resize`. OSError: as `new_file`."""
    with ExitStack() as undo, ExitStack() as files:
        file = new_file(path, files, undo)
        with naming(path), _fitting(path, size):
            file.truncate(size)
        undo.pop_all()


@contextmanager
def _fitting(path: str, size: int) -> Iterator[None]:
    """Raises: ConfigError: a file cannot be given so many bytes."""
    try:
        yield
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EFBIG):
            raise
        raise ConfigError(
            f"{path}: it cannot have {size} bytes: the file system has no such files, or it is a device"
        ) from None
