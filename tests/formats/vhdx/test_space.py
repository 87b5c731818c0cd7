"""Space in the file: what is taken, given back, kept until that is durable, and never handed out."""

from __future__ import annotations

import asyncio
import errno

import pytest

from nbdimg.formats.vhdx.space import GROWTH, Space
from nbdimg.image.driver import Miss
from nbdimg.storage.memory import MemoryFile
from tests.formats.vhdx.craft import M
from tests.support.faultfile import FaultFile

START = 3 * M
"""Where the structures end."""


class SparseFile(MemoryFile):
    """Notes sizes and punches, and holds nothing."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.length = size
        self.sizes: list[int] = []
        self.punched: list[tuple[int, int]] = []
        self.zeroed: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        return self.length

    async def truncate(self, size: int) -> None:
        await asyncio.sleep(0)
        self.sizes.append(size)
        self.length = size

    async def punch(self, offset: int, length: int) -> bool:
        self.punched.append((offset, length))
        return True

    async def zero(self, offset: int, length: int) -> bool:
        self.zeroed.append((offset, length))
        return True


async def take(space: Space, length: int) -> int:
    while isinstance(taken := space.take(length), Miss):
        await taken.load()
    return taken


def test_space_is_taken_from_the_end_which_grows_ahead() -> None:
    async def main() -> None:
        file = SparseFile(4 * M)
        space = Space(file, START)
        assert [await take(space, M) for _ in range(3)] == [4 * M, 5 * M, 6 * M]
        assert file.sizes == [GROWTH]
        assert (space.end, space.grown) == (7 * M, GROWTH)
        assert await take(space, GROWTH) == 7 * M
        assert file.sizes == [GROWTH, 2 * GROWTH]

    asyncio.run(main())


def test_space_begins_at_a_whole_mib_and_behind_structures_that_the_file_does_not_reach() -> None:
    async def main() -> None:
        assert await take(Space(SparseFile(4 * M + 1), START), M) == 5 * M
        assert await take(Space(SparseFile(2 * M), 11 * M), M) == 11 * M
        assert await take(Space(SparseFile(2 * M), 0), M) == 2 * M

    asyncio.run(main())


def test_freed_space_is_taken_again_only_when_its_plan_is_durable() -> None:
    """B2."""

    async def main() -> None:
        file = SparseFile(8 * M)
        space = Space(file, START)
        space.free(5 * M, M)
        assert await take(space, M) == 8 * M
        space.capture()
        assert await take(space, M) == 9 * M
        space.free(6 * M, M)
        await space.reclaim()
        assert file.punched == [(5 * M, M)]
        assert await take(space, M) == 5 * M
        assert await take(space, M) == 10 * M
        space.capture()
        await space.reclaim()
        assert await take(space, M) == 6 * M

    asyncio.run(main())


def test_larger_free_space_is_taken_in_parts_and_smaller_is_passed_over() -> None:
    async def main() -> None:
        space = Space(SparseFile(8 * M), START)
        space.free(5 * M, 3 * M)
        space.free(4 * M, M)
        space.capture()
        await space.reclaim()
        assert await take(space, 2 * M) == 5 * M
        assert sorted([await take(space, M), await take(space, M)]) == [4 * M, 7 * M]
        assert await take(space, M) == 8 * M

    asyncio.run(main())


def test_space_that_is_freed_in_a_row_is_given_back_in_one_call() -> None:
    async def main() -> None:
        file = SparseFile(8 * M)
        space = Space(file, START)
        for offset in (4 * M, 5 * M, 7 * M):
            space.free(offset, M)
        space.capture()
        await space.reclaim()
        assert file.punched == [(7 * M, M), (4 * M, 2 * M)]

    asyncio.run(main())


def test_space_that_cannot_be_made_to_read_as_zeroes_stays_unused() -> None:
    async def main() -> None:
        file = FaultFile(SparseFile(8 * M))
        file.unsupported |= {"punch", "zero"}
        space = Space(file, START)
        space.free(5 * M, M)
        space.capture()
        await space.reclaim()
        assert await take(space, M) == 8 * M

    asyncio.run(main())


def test_space_that_cannot_be_punched_is_zeroed_and_used_again() -> None:
    async def main() -> None:
        inner = SparseFile(8 * M)
        file = FaultFile(inner)
        file.unsupported.add("punch")
        space = Space(file, START)
        space.free(5 * M, M)
        space.capture()
        await space.reclaim()
        assert inner.zeroed == [(5 * M, M)]
        assert await take(space, M) == 5 * M

    asyncio.run(main())


def test_space_whose_punch_fails_stays_unused() -> None:
    async def main() -> None:
        file = FaultFile(SparseFile(8 * M))
        space = Space(file, START)
        space.free(5 * M, M)
        space.capture()
        file.fail("punch", errno.EIO)
        await space.reclaim()
        file.heal()
        space.capture()
        await space.reclaim()
        assert await take(space, M) == 8 * M

    asyncio.run(main())


def test_growing_twice_at_the_same_time_never_shrinks_the_file() -> None:
    """A bitmap of 1 MiB and a block of 256 MiB want room at once, whichever is heard first."""

    async def main() -> None:
        for order in (1, -1):
            file = SparseFile(4 * M)
            space = Space(file, START)
            misses = [space.take(M), space.take(256 * M)][::order]
            await asyncio.gather(*(miss.load() for miss in misses if isinstance(miss, Miss)))
            assert file.sizes == sorted(file.sizes)
            assert file.length == space.grown == 5 * GROWTH

    asyncio.run(main())


def test_growth_that_fails_changes_nothing() -> None:
    async def main() -> None:
        file = FaultFile(SparseFile(4 * M))
        space = Space(file, START)
        file.fail("truncate", errno.EFBIG)
        with pytest.raises(OSError, match="too large"):
            await take(space, M)
        assert space.grown == 4 * M
        file.heal()
        assert await take(space, M) == 4 * M

    asyncio.run(main())


def test_file_does_not_grow_past_what_an_entry_can_say() -> None:
    """256 TiB: a hostile image may point there."""

    async def main() -> None:
        file = SparseFile(4 * M)
        assert await take(Space(file, (256 << 40) - 2 * M), M) == (256 << 40) - 2 * M
        for start in ((256 << 40) - M, 256 << 40):
            with pytest.raises(OSError, match="too large"):
                await take(Space(SparseFile(4 * M), start), 2 * M)

    asyncio.run(main())
