"""Whether a qcow2 image that a crash left is whole: by our check, by qemu-img's, and by what must not have changed."""

from __future__ import annotations

import functools
import hashlib
import subprocess
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from nbdimg.errors import ConfigError, ImageError
from nbdimg.formats import open_file
from nbdimg.formats.keys import Keys
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.qcow2 import luks
from nbdimg.formats.qcow2.check import check
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.open import read_header
from nbdimg.formats.qcow2.repair import repair
from nbdimg.image.gate import Reference
from nbdimg.image.image import Image
from nbdimg.storage.file import BlockFile
from nbdimg.storage.memory import MemoryFile
from tests.crash.images import BITMAP, DATA, IDLE_BITMAP, IMAGE, KEY, SNAPSHOT, KiB, Start
from tests.support.crash import CrashState
from tests.support.crash.expectations import fingerprints
from tests.support.crash.explore import shown
from tests.support.qcow2edit import with_secret
from tests.support.reading import read_all

CLUSTER_SIZE_MAX = 64 * KiB
"""Of the images here: a header lies within it."""

PEER_EVERY = 8
"""Of the states that differ in metadata, one in so many is checked and read by qemu-img as well."""

LEAKS = 3
"""Exit status of `qemu-img check` when space is lost and nothing else is wrong."""

READ_SETS_MAX = 4
ANSWERS_MAX = 4096
FINDINGS_SHOWN = 3
OUTPUT_SHOWN = 300


class FilesGate:
    """Opens these files, and nothing else."""

    def __init__(self, files: dict[str, BlockFile]) -> None:
        self._files = files

    async def open(self, reference: Reference) -> BlockFile:
        return self._files[reference.name]


class _Watched(MemoryFile):
    """Notes what is read of it."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content, writable=False)
        self.ranges: dict[tuple[int, int], None] = {}

    def try_pread(self, offset: int, view: memoryview) -> bool:
        self.ranges[offset, offset + len(view)] = None
        return super().try_pread(offset, view)


@dataclass(frozen=True)
class Findings:
    """`problems` are corruptions; a leak is none."""

    problems: tuple[str, ...]
    leaks: int


async def _findings(file: BlockFile) -> Findings:
    report = await check(file, await read_header(file))
    problems = [f"{each.kind} in {each.structure}: {each.message}" for each in report.findings if each.kind != "leak"]
    return Findings(tuple(problems[:FINDINGS_SHOWN]), report.leaks)


class Remembered:
    """`_findings`, and what it found before: that follows from a file's size and from what was read of the file."""

    def __init__(self) -> None:
        self._read_sets: OrderedDict[tuple[tuple[int, int], ...], None] = OrderedDict()
        self._answers: OrderedDict[tuple[object, ...], Findings] = OrderedDict()

    async def __call__(self, content: bytes) -> tuple[Findings, bool]:
        """What is found, and whether it was looked for."""
        for ranges in reversed(self._read_sets):
            known = self._answers.get(self._key(content, ranges))
            if known is not None:
                return known, False
        file = _Watched(content)
        answer = await _findings(file)
        ranges = tuple(sorted(file.ranges))
        self._read_sets[ranges] = None
        self._read_sets.move_to_end(ranges)
        if len(self._read_sets) > READ_SETS_MAX:
            self._read_sets.popitem(last=False)
        self._answers[self._key(content, ranges)] = answer
        if len(self._answers) > ANSWERS_MAX:
            self._answers.popitem(last=False)
        return answer, True

    def _key(self, content: bytes, ranges: tuple[tuple[int, int], ...]) -> tuple[object, ...]:
        return (ranges, len(content), hash(b"".join([content[start:stop] for start, stop in ranges])))


_unlock = functools.lru_cache(4)(luks.unlock)
"""It takes 40 ms, and nobody changes what it depends on."""


async def opened(start: Start, files: Sequence[BlockFile], *, writable: bool, snapshot: str | None = None) -> Image:
    """The image in `files`, with the files that are not written around it."""
    others: dict[str, BlockFile] = {
        name: MemoryFile(content, name, writable=False) for name, content in start.others.items()
    }
    if len(files) > 1:
        others[DATA] = files[1]
    keys = Keys(KEY if start.is_encrypted else None)
    options = OpenOptions(FilesGate(others), writable, keys, snapshot=snapshot)
    with mock.patch.object(luks, "unlock", _unlock):
        return await open_file(files[0], "qcow2", options)


def digest(guest: bytes) -> str:
    return hashlib.blake2b(guest, digest_size=8).hexdigest()


_kept: dict[str, bytes] = {}


def kept(guest: bytes) -> str:
    """A digest by which the checker finds it again."""
    _kept[digest(guest)] = guest
    return digest(guest)


@dataclass(frozen=True)
class Tracked:
    """What a bitmap has to know: what differs between the two. `until` None: it records, up to what the disk is."""

    since: bytes
    until: bytes | None = None


def tracked(start: Start, steps: Sequence[str]) -> dict[str, Tracked]:
    """The bitmaps after these steps, but for IDLE_BITMAP."""
    found = {BITMAP: Tracked(start.guest)} if start.has_bitmaps else {}
    for step in steps:
        kind, *words = step.split()
        if kind != "bitmaps":
            continue
        guest = _kept[words[0]]
        for name, state in (word.split("=") for word in words[1:]):
            if state == "gone":
                del found[name]
            else:
                found[name] = Tracked(guest) if state == "new" else replace(found[name], until=guest)
    return found


class Checker:
    """The check of one scenario. A dirty image is looked at when it has been recovered, and is then without leaks.

    Steps it knows, in the order of `expected.steps_begun`: "create NAME DIGEST" of what the snapshot reads as,
    "delete NAME"; others change no snapshot. "bitmaps DIGEST NAME=STATE...": what `kept` has kept the disk under, and
    what becomes of bitmaps all at once: they record from here on ("new"), stay as they are ("still"), or are "gone".

    checked: states that our check saw, `distinct` of them different in metadata; `peer_checked`: those that qemu-img
    saw too.
    """

    def __init__(self, start: Callable[[], Start]) -> None:
        self.start = start
        self._findings = Remembered()
        self.checked = 0
        self.distinct = 0
        self.peer_checked = 0

    async def __call__(self, state: CrashState) -> list[str]:
        content = state.files[0]
        header = await read_header(MemoryFile(content[:CLUSTER_SIZE_MAX]))
        if header.is_dirty:
            return ["it is dirty still"] if state.is_recovered else []
        self.checked += 1
        findings, is_new = await self._findings(content)
        problems = list(findings.problems)
        is_repaired = state.is_recovered and not state.is_closed
        if is_repaired and findings.leaks:
            problems.append(f"{findings.leaks} leaks are left by a repair")
        if problems:
            return problems
        problems += await self._wrong_snapshots(state)
        problems += await (
            self._wrong_tracking(state)
            if any(each.startswith("bitmaps ") for each in state.expected.steps_begun)
            else self._wrong_bitmaps(state)
        )
        if header.is_data_file_raw and not header.has_subclusters:
            problems += await self._wrong_raw_file(state)
        if is_new:
            self.distinct += 1
            if self.distinct % PEER_EVERY == 1:
                self.peer_checked += 1
                problems += await self._ask_peer(state, allows_leaks=not is_repaired)
        return problems

    # What must not have changed

    async def _wrong_snapshots(self, state: CrashState) -> list[str]:
        start = self.start()
        wanted = {} if start.kept is None else {SNAPSHOT: digest(start.kept)}
        for step in state.expected.steps_done:
            if step.startswith("create "):
                _, name, wanted_digest = step.split()
                wanted[name] = wanted_digest
        for step in state.expected.steps_begun:
            if step.startswith("delete "):
                wanted.pop(step.split()[1], None)
        problems = []
        for name, wanted_digest in wanted.items():
            files = [MemoryFile(content) for content in state.files]
            try:
                image = await opened(start, files, writable=False, snapshot=name)
                is_same = digest(await read_all(image)) == wanted_digest
            except (ConfigError, ImageError) as error:
                problems.append(f"snapshot {name} cannot be read: {error}")
                continue
            if not is_same:
                problems.append(f"snapshot {name} does not read as it did")
        return problems

    async def _wrong_bitmaps(self, state: CrashState) -> list[str]:
        """A consistent bitmap that records has everything that changed; one that does not is as it was. A crash may
        cost a bitmap that records, and all of them after a resize: each of them has another size then.
        """
        start = self.start()
        if not start.has_bitmaps:
            return []
        image = await opened(start, [MemoryFile(content) for content in state.files], writable=False)
        driver = image.driver
        assert isinstance(driver, Qcow2Driver)
        if driver.bitmaps is None:
            return ["the bitmaps are gone"]
        problems = []
        is_resized = any(each.size and each.submitted <= state.point for each in state.expected.trace.changes)
        if IDLE_BITMAP in driver.bitmaps.names:
            shared = min(image.size, len(start.guest))
            if any(not is_dirty for _, is_dirty in (await driver.bitmaps.get(IDLE_BITMAP)).runs(0, shared)):
                problems.append("the bitmap that does not record has changed")
        elif not is_resized:
            problems.append("the bitmap that does not record is gone")
        if BITMAP in driver.bitmaps.names:
            guest = await read_all(image)
            offset = 0
            for length, is_dirty in (await driver.bitmaps.get(BITMAP)).runs(0, image.size):
                stop = offset + length
                if not is_dirty and guest[offset:stop] != start.guest[offset:stop].ljust(length, b"\0"):
                    problems.append(f"the bitmap calls bytes {offset} to {stop} clean, and they have changed")
                offset = stop
        return problems

    async def _wrong_tracking(self, state: CrashState) -> list[str]:
        """All bitmaps are as they were before the change that is under way, or all as after it."""
        start = self.start()
        before = tracked(start, state.expected.steps_done)
        problems = await self._not_tracked(state, before)
        if problems and len(state.expected.steps_begun) > len(state.expected.steps_done):
            later = await self._not_tracked(state, tracked(start, state.expected.steps_begun))
            return [*problems, *later] if later else []
        return problems

    async def _not_tracked(self, state: CrashState, wanted: dict[str, Tracked]) -> list[str]:
        """Of a bitmap that records a crash may leave nothing but its name."""
        image = await opened(self.start(), [MemoryFile(content) for content in state.files], writable=False)
        driver = image.driver
        assert isinstance(driver, Qcow2Driver)
        store = driver.made_bitmaps()
        listed = {each.name: each for each in store.entries}
        idle = {IDLE_BITMAP} if self.start().has_bitmaps else set()
        if listed.keys() != wanted.keys() | idle:
            return [f"there are the bitmaps {sorted(listed)}, expected {sorted(wanted.keys() | idle)}"]
        problems = []
        now = await read_all(image)
        for name in idle:
            if any(not is_dirty for _, is_dirty in (await store.get(name)).runs(0, image.size)):
                problems.append("the bitmap that does not record has changed")
        for name, each in wanted.items():
            if listed[name].is_enabled != (each.until is None):
                problems.append(f"bitmap {name} is enabled or not: {listed[name].is_enabled}")
            if not listed[name].is_consistent:
                problems += [f"bitmap {name} does not record and is lost"] if each.until is not None else []
                continue
            until, offset = each.until or now, 0
            for length, is_dirty in (await store.get(name)).runs(0, image.size):
                stop = offset + length
                if not is_dirty and each.since[offset:stop] != until[offset:stop]:
                    problems.append(f"bitmap {name} calls bytes {offset} to {stop} clean, and they have changed")
                offset = stop
        return problems

    async def _wrong_raw_file(self, state: CrashState) -> list[str]:
        """A data file that is marked raw is an image of its own: as long as the disk or longer, and the same bytes.

        Not so with subclusters: QEMU maps none that was never written, and until a flush the disk has zeroes there.
        """
        image = await opened(self.start(), [MemoryFile(content) for content in state.files], writable=False)
        guest = await read_all(image)
        return [] if state.files[1][: len(guest)] == guest else ["the raw data file does not read as the disk does"]

    # qemu-img

    async def _ask_peer(self, state: CrashState, *, allows_leaks: bool) -> list[str]:
        """What qemu-img says and reads, and says again when what it calls leaks has been repaired by us."""
        start, files = self.start(), state.files
        status, output = peer_check(start, files)
        if status not in ((0, LEAKS) if allows_leaks else (0,)):
            return [f"qemu-img check ends with {status}: {output}"]
        problems = []
        if not state.is_closed:
            guest = peer_read(start, files)
            wrong = state.expected.violated_by(fingerprints(guest))
            if wrong or len(guest) not in state.expected.sizes:
                problems.append(f"qemu-img reads {len(guest)} bytes, sectors {shown(wrong)} are not what they may be")
        if status == LEAKS:
            file = MemoryFile(files[0])
            await repair(file, await read_header(file), leaks_only=True)
            status, output = peer_check(start, [bytes(file.content), *files[1:]])
            if status:
                problems.append(f"with its leaks repaired, qemu-img check ends with {status}: {output}")
        return problems


@contextmanager
def _on_disk(start: Start, files: Sequence[bytes]) -> Iterator[Path]:
    """A directory with the files under the names that they know each other by."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        for name, content in (*zip((IMAGE, DATA), files, strict=False), *start.others.items()):
            (Path(directory) / name).write_bytes(content)
        yield Path(directory)


def _named(start: Start) -> Sequence[str]:
    """How qemu-img is told of the image."""
    return with_secret(IMAGE) if start.is_encrypted else ("-f", "qcow2", IMAGE)


def peer_check(start: Start, files: Sequence[bytes]) -> tuple[int, str]:
    """Exit status and output of `qemu-img check`."""
    with _on_disk(start, files) as directory:
        command = ["qemu-img", "check", *_named(start)]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr).replace("\n", " ")[:OUTPUT_SHOWN]


def peer_read(start: Start, files: Sequence[bytes]) -> bytes:
    """What qemu-img takes for the disk."""
    with _on_disk(start, files) as directory:
        command = ["qemu-img", "convert", "-O", "raw", *_named(start), "guest.raw"]
        subprocess.run(command, cwd=directory, capture_output=True, check=True)
        return (directory / "guest.raw").read_bytes()
