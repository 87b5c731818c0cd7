"""The qcow2 writer, crashed everywhere; and faults put into it, all of which must be found."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import pytest

from nbdimg.formats.qcow2 import repair
from nbdimg.formats.qcow2.bitmap_store import BitmapStore
from nbdimg.formats.qcow2.bitmap_write import Change
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.l1 import L1Table
from nbdimg.formats.qcow2.mapping import Mapping, Store
from nbdimg.formats.qcow2.refcount import Refcounts
from nbdimg.histogram import Histogram
from nbdimg.image.driver import Extent, ExtentKind, Miss
from nbdimg.image.tables import Slice
from nbdimg.storage import ordering
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import Plan, Stage
from tests.crash.qcow2 import SCENARIOS
from tests.crash.qcow2check import Checker, Findings, Remembered, peer_check
from tests.support.crash import (
    ALIEN,
    CORRUPT,
    LOST,
    CrashState,
    RecordingFile,
    Report,
    Scenario,
    Trace,
    crash_states,
    record,
    run_now,
)

SEED = 20240811
STATES = 450
"""For each scenario: with 62 of them 27,900."""

BY_NAME = {each.name.removeprefix("qcow2, "): each for each in SCENARIOS}


def checker(scenario: Scenario) -> Checker:
    assert isinstance(scenario.check, Checker)
    return scenario.check


@pytest.mark.parametrize("name", BY_NAME)
def test_qcow2_survives_every_crash(name: str) -> None:
    scenario = BY_NAME[name]
    check = checker(scenario)
    checked, peer_checked = check.checked, check.peer_checked
    report = run_now(scenario, seed=SEED, states=STATES)
    assert not report.violation_count, f"{report}"
    assert report.states == STATES
    assert check.checked - checked > STATES // 4
    assert check.peer_checked > peer_checked


def test_campaign_has_fifteen_thousand_states() -> None:
    assert len(SCENARIOS) * STATES >= 15000


# What the scenarios are named for


def traced(name: str) -> tuple[Header, Header]:
    """The header at the start and at the end of a run."""
    trace = asyncio.run(record(BY_NAME[name], SEED))
    file = trace.files[0]
    return Header.from_bytes("start", file.initial[:512]), Header.from_bytes("end", bytes(file.content[:512]))


def test_small_clusters_make_the_refcount_table_grow() -> None:
    before, after = traced("refcount table grows")
    assert after.refcount_table_clusters > before.refcount_table_clusters == 1


def test_small_clusters_make_the_l1_table_grow() -> None:
    before, after = traced("resize, L1 grows")
    assert after.l1_size > before.l1_size
    assert after.l1_offset != before.l1_offset


def test_lazy_refcounts_are_repaired_and_the_repair_is_crashed() -> None:
    report = run_now(BY_NAME["lazy refcounts"], seed=SEED, states=200)
    assert report.recoveries > 20
    assert report.nested > 100


def test_snapshots_made_applied_and_deleted_leave_one() -> None:
    _, after = traced("snapshots made, applied, deleted")
    assert after.snapshot_count == 1


@pytest.mark.parametrize("name", ["damaged", "damaged, refcount table lost", "damaged, external data file"])
def test_damaged_images_are_corrupt_until_they_are_opened(name: str) -> None:
    start = checker(BY_NAME[name]).start()
    assert peer_check(start, start.files)[0] == 2
    trace = asyncio.run(record(BY_NAME[name], SEED))
    assert peer_check(start, [bytes(file.content) for file in trace.files])[0] == 0


# Faults of the storage


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("name", ["internal snapshot", "discard and reuse"])
def test_qcow2_after_a_failed_barrier_keeps_what_earlier_flushes_covered(name: str, number: int) -> None:
    faulty = dataclasses.replace(BY_NAME[name], failing_syncs=frozenset((number,)))
    report = run_now(faulty, seed=SEED, states=150)
    assert not report.violation_count, f"{report}"


@pytest.mark.parametrize("numbers", [(0, 1, 2), (5, 9), (12, 13, 20, 31), tuple(range(21, 200, 5))])
@pytest.mark.parametrize(
    "name",
    [
        "4 KiB clusters",
        "discard and reuse",
        "refcount table grows",
        "lazy refcounts",
        "bitmaps of a disk that shrinks and grows",
    ],
)
def test_qcow2_out_of_space_keeps_what_was_flushed(name: str, numbers: tuple[int, ...]) -> None:
    faulty = dataclasses.replace(BY_NAME[name], failing_writes=frozenset(numbers))
    report = run_now(faulty, seed=SEED, states=150)
    assert not report.violation_count, f"{report}"


# Controls


def faulty(name: str, **options: bool) -> Report:
    return run_now(BY_NAME[name], seed=SEED, states=300, **options)


def test_qcow2_without_barriers_fails_by_hundreds() -> None:
    names = ("discard and reuse", "compressed", "512-byte clusters", "kept snapshot goes", "bitmaps")
    reports = {name: faulty(name, without_barriers=True) for name in names}
    counts = {name: report.violation_count for name, report in reports.items()}
    assert min(counts.values()) > 10, counts
    assert sum(counts.values()) > 300, counts


def test_stages_run_as_one_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ordering.run

    async def at_once(plan: Plan, times: Histogram | None = None) -> None:
        writes = tuple(write for stage in plan.stages for write in stage.writes)
        files = tuple(dict.fromkeys(file for stage in plan.stages for file in stage.files))
        is_disjoint = len({(id(write.file), write.offset) for write in writes}) == len(writes)
        await real(Plan((Stage(writes, files),)) if is_disjoint else plan)

    monkeypatch.setattr(ordering, "run", at_once)
    report = faulty("512-byte clusters")
    assert report.violations[CORRUPT] > 10, f"{report}"


def test_freed_clusters_reused_before_that_is_durable_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    in_order = Refcounts.free

    def free(self: Refcounts, cluster: int, count: int = 1, *, punch: bool = False) -> None:
        for each in range(cluster, cluster + count):
            found = self._slice(each)
            if not isinstance(found, Slice):
                in_order(self, each, punch=punch)
                continue
            index = each % self._slice_entries
            found.entries[index] -= 1
            self.cache.changed(found)
            if not found.entries[index]:
                self._now_free(each)

    monkeypatch.setattr(Refcounts, "free", free)
    report = faulty("discard and reuse")
    assert report.violations[ALIEN] + report.violations[LOST] > 10, f"{report}"
    assert report.violations[CORRUPT] > 10, f"{report}"


def test_writes_in_place_where_copied_is_clear_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(self: Mapping, offset: int, stop: int) -> Extent | Miss:
        extent = self.map(offset, stop)
        if isinstance(extent, Extent) and extent.kind is ExtentKind.DATA:
            return dataclasses.replace(extent, writable=True)
        return extent

    monkeypatch.setattr(Mapping, "place", place)
    report = faulty("internal snapshot")
    assert report.violations[CORRUPT] > 100, f"{report}"
    assert "does not read as it did" in f"{report}"


def test_new_space_of_an_encrypted_image_taken_for_zeroes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Mapping.__init__

    def init(
        self: Mapping,
        file: BlockFile,
        header: Header,
        l1: L1Table,
        store: Store,
        refcounts: Refcounts | None,
        size: int,
    ) -> None:
        real(self, file, header, l1, dataclasses.replace(store, is_plain=True), refcounts, size)

    monkeypatch.setattr(Mapping, "__init__", init)
    report = faulty("LUKS")
    assert report.violations[ALIEN] > 10, f"{report}"


def test_repair_that_says_done_before_it_is_fails_in_a_crash_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    real = repair._Repair.all

    async def everything(self: repair._Repair) -> None:
        await repair._clear_bits(self._file, self._header)
        await real(self)

    monkeypatch.setattr(repair._Repair, "all", everything)
    report = faulty("lazy refcounts")
    assert report.violations[CORRUPT] > 10, f"{report}"
    assert all("recovery crash" in text for text in report.examples[CORRUPT]), f"{report}"


def test_bitmaps_not_marked_before_the_first_change_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def mark(self: BitmapStore) -> None:
        self.is_marked = True

    monkeypatch.setattr(BitmapStore, "mark", mark)
    report = faulty("bitmaps")
    assert "clean, and they have changed" in f"{report}"


def test_bitmaps_in_use_that_a_live_change_forgets_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    replace = BitmapStore.replace

    async def forgetful(self: BitmapStore, counts: Refcounts, changes: Sequence[Change]) -> None:
        self._marked = set()
        await replace(self, counts, changes)

    monkeypatch.setattr(BitmapStore, "replace", forgetful)
    assert faulty("first and last bitmap, backing file").violations[CORRUPT] > 3


class Blind:
    """Finds nothing, and has never seen the state before."""

    async def __call__(self, content: bytes) -> tuple[Findings, bool]:
        return Findings((), 0), True


def as_it_lies(content: bytes, guest: bytes) -> CrashState:
    """A state of which nothing is pending."""
    trace = Trace(guest)
    RecordingFile(trace, content)
    return next(crash_states(trace, seed=SEED))


def test_what_our_check_overlooks_is_found_by_qemu_img(monkeypatch: pytest.MonkeyPatch) -> None:
    start = checker(BY_NAME["4 KiB clusters"]).start
    content = start().files[0]
    table = int.from_bytes(content[48:56], "big")
    block = int.from_bytes(content[table : table + 8], "big")
    count = block + 2 * (len(content) // 4096 - 1)
    damaged = content[:count] + bytes(2) + content[count + 2 :]

    def problems(damaged: bytes, guest: bytes) -> list[str]:
        check = Checker(start)
        monkeypatch.setattr(check, "_findings", Blind())
        return asyncio.run(check(as_it_lies(damaged, guest)))

    assert problems(content, start().guest) == []
    assert "qemu-img check ends with 2" in problems(damaged, start().guest)[0]
    assert "qemu-img reads" in problems(content, bytes(len(start().guest)))[0]


def test_findings_remembered_are_those_of_a_check_that_looks() -> None:
    """Without barriers, so that there is something to find."""
    trace = asyncio.run(record(BY_NAME["512-byte clusters"], SEED))

    async def both() -> list[bool]:
        remembered, corrupt = Remembered(), []
        for state in crash_states(trace, seed=SEED, cap=4, without_barriers=True):
            found, _ = await remembered(state.files[0])
            looked, is_new = await Remembered()(state.files[0])
            assert is_new
            assert found == looked
            corrupt.append(bool(found.problems))
        return corrupt

    corrupt = asyncio.run(both())
    assert sum(corrupt) > 20
    assert corrupt.count(False) > 100
