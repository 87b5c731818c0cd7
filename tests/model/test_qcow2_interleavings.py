"""Concurrent requests on qcow2 images, in thousands of seeded orders of their file calls.

What a schedule leaves must read as the model says, through nbdimg and (for a part of the seeds) through qemu-img, and
must be free of leaks and corruptions. The caches hold hardly more than one table, so that slices come and go under way.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdimg.export.inflight import InFlight
from nbdimg.formats.qcow2 import inflate, structs
from nbdimg.formats.qcow2.check import check
from nbdimg.formats.qcow2.open import read_header
from nbdimg.formats.qcow2.refcount import Refcounts
from nbdimg.image.tables import TableCache
from nbdimg.storage.memory import MemoryFile
from tests.support.interleave import InlineWorkers, Mix, NeverConflicting, Schedule, Template, content_of, run_in_memory
from tests.support.qcow2edit import qemu_check, qemu_img, qemu_io

SEEDS_PER_KIND = 180
QEMU_EVERY = 40
"""One seed of so many is looked at by qemu's tools as well."""
SLICE_SIZE = 512
"""Bytes of a resident piece of a table here: a table of 1 KiB has two."""


def _create(path: Path, options: str, size: int, *writes: str) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    if writes:
        qemu_io(path, *writes)


def _writes(size: int) -> tuple[str, ...]:
    """Data, zeroes and holes over all of the disk, the same ones each time."""
    generator = random.Random(size)
    commands = []
    for number in range(10):
        offset = generator.randrange(size // 512) * 512
        length = min(size - offset, generator.choice((512, 1536, 4096, 8192)))
        kind = "-z" if number % 4 == 3 else f"-P {17 + number}"
        commands.append(f"write -q {kind} {offset} {length}")
    return tuple(commands)


def _plain(options: str, size: int) -> Callable[[Path], None]:
    return lambda path: _create(path, options, size, *_writes(size))


def _overlay(options: str, size: int, backing: str, backing_size: int) -> Callable[[Path], None]:
    """Over `base` beside it: raw, or qcow2 with the given options."""

    def make(path: Path) -> None:
        base = path.parent / "base"
        form = "raw" if backing == "raw" else "qcow2"
        extra = () if backing == "raw" else ("-o", backing)
        qemu_img("create", "-q", "-f", form, *extra, base, str(backing_size))
        qemu_io(base, *_writes(backing_size), options=("-f", form))
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", form, path, str(size))
        qemu_io(path, *_writes(size)[:4])

    return make


def _snapshots(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def with_snapshots(path: Path) -> None:
        make(path)
        qemu_img("snapshot", "-c", "one", path)
        qemu_io(path, "write -q -P 77 1024 6144", "discard -q 16k 4k")
        qemu_img("snapshot", "-c", "two", path)
        qemu_io(path, "write -q -P 78 4096 1024")

    return with_snapshots


def _compressed(options: str, size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        source = path.with_suffix(".source")
        source.write_bytes(b"".join(bytes([n % 250 + 1]) * 300 + bytes(range(212)) for n in range(size // 512)))
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source, path)
        source.unlink()
        qemu_io(path, *_writes(size)[:4])

    return make


def _zeroed_in_place(path: Path) -> None:
    """Every cluster reads as zeroes and keeps its space, as after `preallocation=metadata` and zeroing."""
    _create(path, "cluster_size=1k,preallocation=metadata", 96 << 10, "write -q -P 5 0 96k", "write -q -z 0 96k")


def _data_file(path: Path) -> None:
    _create(path, f"cluster_size=1k,data_file={path.parent / 'base'}", 128 << 10, *_writes(128 << 10))


KINDS: dict[str, tuple[Callable[[Path], None], int]] = {
    "small clusters": (_plain("cluster_size=512", 192 << 10), 512),
    "wide refcounts": (_plain("cluster_size=1k,refcount_bits=64", 256 << 10), 1024),
    "narrow refcounts": (_plain("cluster_size=512,refcount_bits=2", 128 << 10), 512),
    "backing raw": (_overlay("cluster_size=512", 160 << 10, "raw", 100 << 10), 512),
    "backing qcow2": (_overlay("cluster_size=2k", 160 << 10, "cluster_size=512", 99 << 9), 2048),
    "compressed": (_compressed("cluster_size=1k", 96 << 10), 1024),
    "snapshots": (_snapshots(_plain("cluster_size=512", 128 << 10)), 512),
    "snapshots compressed": (_snapshots(_compressed("cluster_size=2k,refcount_bits=32", 96 << 10)), 2048),
    "snapshots backing": (_snapshots(_overlay("cluster_size=1k", 128 << 10, "cluster_size=1k", 80 << 10)), 1024),
    "extended": (_overlay("cluster_size=16k,extended_l2=on", 320 << 10, "cluster_size=1k", 250 << 10), 512),
    "extended snapshots": (_snapshots(_plain("cluster_size=16k,extended_l2=on", 320 << 10)), 512),
    "extended compressed": (_compressed("cluster_size=16k,extended_l2=on", 128 << 10), 16384),
    "zeroes in place": (_zeroed_in_place, 1024),
    "lazy": (_snapshots(_plain("cluster_size=512,lazy_refcounts=on", 128 << 10)), 512),
    "version 2": (_snapshots(_plain("compat=0.10,cluster_size=1k", 128 << 10)), 1024),
    "version 2 backing": (_overlay("compat=0.10,cluster_size=1k", 128 << 10, "raw", 70 << 10), 0),
    "data file": (_data_file, 1024),
}
"""How it is made, and what trims are sure to zero. Trims of a version 2 overlay are advice only."""


def _guest(path: Path, *options: str) -> bytes:
    copy = path.with_suffix(".raw")
    qemu_img("convert", *options, "-f", "qcow2", "-O", "raw", path, copy)
    content = copy.read_bytes()
    copy.unlink()
    return content


class Templates:
    """Made when they are first asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._made: dict[str, Template] = {}

    def __getitem__(self, kind: str) -> Template:
        if kind not in self._made:
            directory = self.directory / kind.replace(" ", "-")
            directory.mkdir()
            path = directory / "disk"
            make, trim_unit = KINDS[kind]
            make(path)
            info = json.loads(qemu_img("info", "--output=json", path).stdout)
            names = [each["name"] for each in info.get("snapshots", ())]
            base = directory / "base"
            name = str(base) if kind == "data file" else "base"
            files = {name: base.read_bytes()} if base.exists() else {}
            snapshots = {name: _guest(path, "-l", f"snapshot.name={name}") for name in names}
            self._made[kind] = Template(kind, path.read_bytes(), files, _guest(path), snapshots, trim_unit)
        return self._made[kind]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return Templates(tmp_path_factory.mktemp("templates"))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structs, "SLICE_SIZE", SLICE_SIZE)
    monkeypatch.setattr(inflate, "computers", InlineWorkers)


async def _look_after(schedule: Schedule) -> list[str]:
    """What is wrong with the image that a schedule left."""
    content, model = bytes(schedule.file.content), schedule.model
    files = {name: bytes(file.content) for name, file in schedule.files.items()}
    found: list[str] = []
    header = await read_header(MemoryFile(content))
    report = await check(MemoryFile(content), header)
    if not report.is_clean or header.incompatible & 3:
        found.append(f"check: {report.findings[:4]}, incompatible features {header.incompatible}")
    if header.is_corrupt:
        return found
    difference = model.difference(await content_of(content, files), 0, model.now, model.now)
    if difference is not None:
        found.append(f"the end: {difference}")
    for name, expected in schedule.template.snapshots.items():
        if await content_of(content, files, snapshot=name) != expected:
            found.append(f"snapshot {name} has changed")
    return found


def _ask_qemu(schedule: Schedule, directory: Path) -> Iterator[str]:
    path = directory / "disk"
    path.write_bytes(schedule.file.content)
    for name, file in schedule.files.items():
        (directory / name).write_bytes(file.content)
    if not Path(next(iter(schedule.files), "x")).is_absolute():
        report = qemu_check(path)
        if report.exit_status:
            yield f"qemu-img check: {report}"
    difference = schedule.model.difference(_guest(path), 0, schedule.model.now, schedule.model.now)
    if difference is not None:
        yield f"qemu-img convert: {difference}"


def differences_of(
    template: Template, seeds: range, *, queue: type[InFlight] | None = None, qemu_directory: Path | None = None
) -> list[str]:
    found: list[str] = []

    async def main() -> None:
        for seed in seeds:
            mix = Mix(requests=18 + seed % 3 * 6, spots=2 + seed % 5, slices=1 + seed % 4)
            schedule = Schedule(seed, template, mix, queue() if queue else None)
            await schedule.run()
            differences = schedule.differences or await _look_after(schedule)
            if qemu_directory is not None and seed % QEMU_EVERY == 0:
                differences.extend(_ask_qemu(schedule, qemu_directory))
            found.extend(f"{template.name}, seed {seed}: {each}" for each in differences)

    run_in_memory(main())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_of_concurrent_requests_on_qcow2_agree_with_the_model(
    templates: Templates, kind: str, tmp_path: Path
) -> None:
    assert differences_of(templates[kind], range(SEEDS_PER_KIND), qemu_directory=tmp_path) == []


@pytest.mark.parametrize("kind", ["small clusters", "backing qcow2", "snapshots"])
def test_control_without_the_overlap_queue_schedules_differ(templates: Templates, kind: str) -> None:
    assert differences_of(templates[kind], range(60), queue=NeverConflicting) != []


def test_control_clusters_that_are_free_before_their_punch_are_caught(
    templates: Templates, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = Refcounts._lower

    async def lower_then_punch(self: Refcounts, start: int, stop: int, punch: bool) -> None:
        await lower(self, start, stop, False)
        if punch:
            size = self._header.cluster_size
            await self._file.punch(start * size, (stop - start) * size)

    monkeypatch.setattr(Refcounts, "_lower", lower_then_punch)
    assert differences_of(templates["small clusters"], range(120)) != []


def test_control_clusters_that_leak_are_caught(templates: Templates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Refcounts, "free", lambda *arguments, **options: None)
    found = differences_of(templates["snapshots"], range(5))
    assert any("leak" in each for each in found)


def test_control_evicting_what_was_not_written_is_caught(templates: Templates, monkeypatch: pytest.MonkeyPatch) -> None:
    def evict_anything(self: TableCache) -> None:
        del self.slices[next(iter(self.slices))]

    monkeypatch.setattr(TableCache, "_evict", evict_anything)
    assert differences_of(templates["small clusters"], range(60)) != []
