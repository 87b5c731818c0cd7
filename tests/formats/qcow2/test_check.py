"""check says what `qemu-img check` says: of sound images of every kind, and of images with one thing damaged."""

from __future__ import annotations

import asyncio
import shutil
import struct
import subprocess
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from nbdimg.errors import ImageError
from nbdimg.formats import findings
from nbdimg.formats.findings import CheckReport
from nbdimg.formats.qcow2 import references
from nbdimg.formats.qcow2.check import Survey, check
from nbdimg.formats.qcow2.counts import PIECE, last_used
from nbdimg.formats.qcow2.open import read_header
from nbdimg.formats.zeroed import zeroed
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.posix import PosixFile
from tests.support.qcow2edit import COPIED, Edit, QemuReport, qemu_check
from tests.support.qcow2images import KINDS, MUTATIONS, Mutation, damaged_image, image_of
from tests.support.turns import Turns


def checked(path: Path) -> CheckReport | None:
    """Our report; None: the header is refused, which is exit status 1 of qemu-img."""

    async def main() -> CheckReport | None:
        file = PosixFile(path, writable=False)
        try:
            return await check(file, await read_header(file))
        except ImageError:
            return None
        finally:
            await file.close()

    return asyncio.run(main())


def as_qemu(report: CheckReport) -> QemuReport:
    return QemuReport(
        report.exit_status,
        report.leaks,
        report.corruptions,
        report.allocated_clusters,
        report.total_clusters,
        report.compressed_clusters,
        report.fragmented_clusters,
        report.image_end_offset,
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where images of each kind are made once."""
    return tmp_path_factory.mktemp("sound")


@pytest.mark.parametrize("kind", KINDS)
def test_check_sound_image_counts_as_qemu_does(kind: str, sound: Path) -> None:
    path = image_of(kind, sound)
    report = checked(path)
    assert report is not None
    assert report.findings == []
    assert as_qemu(report) == qemu_check(path)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.name)
def test_check_damaged_image_has_the_exit_status_of_qemu(mutation: Mutation, sound: Path, tmp_path: Path) -> None:
    path = damaged_image(mutation, sound, tmp_path)
    content = path.read_bytes()
    report = checked(path)
    theirs = qemu_check(path).exit_status
    found = 1 if report is None else report.exit_status
    assert found == (theirs if mutation.ours is None else mutation.ours), f"{report}, qemu-img: {theirs}"
    assert found or mutation.name in ("dirty", "corrupt"), "no damage done"
    assert (found != theirs) == (mutation.ours is not None), "a difference that is none any more"
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", KINDS)
def test_check_fast_paths_count_as_the_general_one(kind: str, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image_of(kind, sound)
    report = checked(path)
    monkeypatch.setattr(references.References, "_count_run", lambda *_: False)
    assert checked(path) == report
    monkeypatch.setattr(references.References, "_count_plain", lambda *_: None)
    assert checked(path) == report


EXACT = (
    "data refcount 0",
    "data refcount 2",
    "all refcounts 0",
    "all refcounts 0xffff",
    "leaked cluster",
    "COPIED clear in L1",
    "L2 entry twice",
    "L2 entry misaligned",
    "L2 entry to its L2 table",
    "L1 entries to one L2",
    "refcount table entry 0",
    "refcount table entries to one block",
    "compressed entry COPIED",
    "compressed entry longer",
    "snapshot L1 entry behind the end",
    "snapshot data refcount 1",
    "bitmaps disowned",
    "subclusters allocated and zero",
    "misaligned without subclusters",
    "two references with 1-bit refcounts",
)


@pytest.mark.parametrize("name", EXACT)
def test_check_damaged_image_counts_leaks_and_corruptions_as_qemu_does(name: str, sound: Path, tmp_path: Path) -> None:
    mutation = next(each for each in MUTATIONS if each.name == name)
    path = damaged_image(mutation, sound, tmp_path)
    report, theirs = checked(path), qemu_check(path)
    assert report is not None
    assert (report.leaks, report.corruptions) == (theirs.leaks, theirs.corruptions), report.findings


def test_comparison_with_qemu_of_a_wrong_expectation_fails(sound: Path) -> None:
    """The control of the tests above: each number alone tells two reports apart."""
    path = image_of("snapshots", sound)
    report = checked(path)
    assert report is not None
    theirs = qemu_check(path)
    for name in ("exit_status", "leaks", "corruptions", "allocated_clusters", "total_clusters", "image_end_offset"):
        assert as_qemu(report) != replace(theirs, **{name: getattr(theirs, name) + 1})


def test_check_finding_names_place_found_and_expected(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    shutil.copy(image_of("version 3", sound), path)
    edit = Edit(path)
    place = edit.entry(1)
    entry = edit.get(place)
    edit.put(place, entry & ~COPIED)
    report = checked(path)
    assert report is not None
    [finding] = report.findings
    assert (finding.kind, finding.structure, finding.offset) == ("corruption", "L2 table", place)
    assert finding.message == f"entry 1 is {entry & ~COPIED:#018x}, expected COPIED to be set with refcount 1"


def test_check_many_findings_are_capped_and_counted(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.qcow2"
    shutil.copy(image_of("version 3", sound), path)
    edit = Edit(path)
    edit.write(edit.block(), b"\xff" * 4096)
    monkeypatch.setattr(findings, "FINDINGS_MAX", 7)
    report = checked(path)
    assert report is not None
    assert len(report.findings) == 7
    assert report.findings_omitted == report.leaks + report.corruptions - 7 > 0


# Work limits


def test_check_more_clusters_than_memory_allows_is_an_error_before_any_is_held(sound: Path) -> None:
    file = MemoryFile(image_of("version 3", sound).read_bytes())
    header = asyncio.run(read_header(file))
    clusters = -(-file.size // 4096) + 1

    def status(memory_max: int) -> int:
        survey = Survey(file, header, memory_max=memory_max)
        asyncio.run(survey.run())
        return survey.report.exit_status

    assert status(2 * 2 * clusters) == 0
    assert status(2 * 2 * clusters - 1) == 1


@pytest.mark.parametrize("name", ["METADATA_MAX", "L2_TABLES_MAX"])
def test_check_more_metadata_than_allowed_is_an_error(name: str, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, name, 1)
    report = checked(image_of("version 3", sound))
    assert report is not None
    assert report.exit_status == 1
    assert "1" in report.findings[-1].message


def test_check_sparse_tables_without_end_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """64 KiB of L1 entries name 8192 tables of 2 MiB each in a file that is all hole: 16 GiB to read."""
    cluster_bits, tables = 21, 1 << 13
    path = tmp_path / "image.qcow2"
    size = (tables + 32) << cluster_bits
    fields = (0x514649FB, 3, 0, 0, cluster_bits, 0, 0, tables, 1 << cluster_bits, 16 << cluster_bits, 1, 0, 0)
    with path.open("wb") as file:
        file.write(struct.pack(">IIQIIQIIQQIIQ", *fields) + struct.pack(">QQQII", 0, 0, 0, 4, 104) + bytes(8))
        file.seek(1 << cluster_bits)
        file.write(struct.pack(f">{tables}Q", *((index + 32) << cluster_bits for index in range(tables))))
        file.truncate(size)
    report = checked(path)
    assert report is not None
    assert report.exit_status == 1
    assert f"at most {references.METADATA_MAX}" in report.findings[-1].message


def test_check_progress_goes_from_the_first_table_to_the_last(sound: Path) -> None:
    file = MemoryFile(image_of("version 3", sound).read_bytes())
    calls: list[tuple[int, int]] = []
    header = asyncio.run(read_header(file))
    asyncio.run(check(file, header, progress=lambda done, total: calls.append((done, total))))
    assert calls == [(1, 2), (2, 2)]


def test_last_used_cluster_of_a_long_and_empty_file_is_found_fast() -> None:
    counts, stored = (zeroed("H", 1 << 24) for _ in range(2))
    stored[1] = counts[0] = 1
    started = time.process_time()
    found = [asyncio.run(last_used(counts, stored, stop)) for stop in (len(counts), 2, 1, 0)]
    assert found == [1, 1, 0, 0]
    assert time.process_time() - started < 0.5


def sparse_image(path: Path, size: int, shared_blocks: int = 0) -> Path:
    """A new image whose file has this size; from the second one on, `shared_blocks` entries of the refcount table name
    the same block, which says 1 for each of its 32768 clusters.
    """
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1G"], check=True)
    block = 1 << 20
    with path.open("r+b") as file:
        file.seek(48)
        (table,) = struct.unpack(">Q", file.read(8))
        file.seek(table + 8)
        file.write(struct.pack(">Q", block) * shared_blocks)
        file.seek(block)
        file.write(b"\0\1" * 32768 if shared_blocks else b"")
        file.truncate(size)
    return path


def resident_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10


def test_check_of_a_sparse_file_takes_memory_only_for_what_is_in_use(tmp_path: Path) -> None:
    path = sparse_image(tmp_path / "far.qcow2", 4 << 40)

    async def main() -> int:
        file = PosixFile(path, writable=False)
        survey = Survey(file, await read_header(file))
        before = resident_bytes()
        await survey.run()
        taken = resident_bytes() - before
        assert survey.report.is_clean
        await file.close()
        return taken

    assert asyncio.run(main()) < 32 << 20


def test_check_of_millions_of_differences_lets_others_have_their_turn_and_remembers_none(tmp_path: Path) -> None:
    path = sparse_image(tmp_path / "shared.qcow2", 16 << 30, 7)
    turns = Turns()

    async def main() -> CheckReport:
        file = PosixFile(path, writable=False)
        header = await read_header(file)
        tracemalloc.start()
        try:
            async with turns:
                report = await check(file, header)
            assert tracemalloc.get_traced_memory()[1] < 6 << 20
        finally:
            tracemalloc.stop()
            await file.close()
        return report

    report = asyncio.run(main())
    assert (report.leaks, report.corruptions) == (7 * 32768, 7)
    assert report.findings_omitted + len(report.findings) == report.leaks + report.corruptions
    assert turns.count > 7 * 32768 // PIECE
