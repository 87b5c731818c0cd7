"""repair: what it mends qemu-img finds in order, the guest's bytes stay, and a crash at any write loses nothing."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdimg.errors import ImageError
from nbdimg.formats import open_image
from nbdimg.formats.findings import CheckReport
from nbdimg.formats.qcow2 import structs
from nbdimg.formats.qcow2.check import check
from nbdimg.formats.qcow2.open import read_header
from nbdimg.formats.qcow2.repair import repair
from nbdimg.storage.file import Buffer
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.posix import PosixFile
from tests.support.qcow2edit import Edit, qemu_check, qemu_img, qemu_io
from tests.support.qcow2images import KINDS, MUTATIONS, Mutation, bitmap_data, damaged_image, image_of

REPAIRED = [each for each in MUTATIONS if each.is_repaired]
UNREPAIRED = [each for each in MUTATIONS if not each.is_repaired]
TWO_IN_ONE = (
    "further L1 entry to a guest's cluster",
    "L1 entry of the disk to the L1 table",
    "L1 entry to the refcount table",
    "L1 table at a snapshot's",
    "snapshot L1 at the header",
)


def mutation(name: str) -> Mutation:
    return next(each for each in MUTATIONS if each.name == name)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where images of each kind are made once."""
    return tmp_path_factory.mktemp("sound")


def repaired(path: Path, *, leaks_only: bool = False) -> CheckReport | None:
    """What remains; None: the header is refused. The header in memory is the one on disk afterwards."""

    async def main() -> CheckReport | None:
        file = PosixFile(path, writable=True)
        try:
            header = await read_header(file)
            report = await repair(file, header, leaks_only=leaks_only)
            assert header == await read_header(file)
            return report
        except ImageError:
            return None
        finally:
            await file.close()

    return asyncio.run(main())


def guest(path: Path, snapshot: str | None = None) -> bytes | None:
    """All bytes that a guest sees; None: qemu-img cannot read them, or needs a key."""
    if path.read_bytes()[32:36] == b"\0\0\0\2":
        return None
    raw = path.with_suffix(".raw")
    options = ("-l", f"snapshot.name={snapshot}") if snapshot else ()
    done = qemu_img("convert", "-f", "qcow2", "-O", "raw", *options, path, raw, ok=(0, 1))
    return raw.read_bytes() if done.returncode == 0 else None


def without(content: bytes | None, damaged: range) -> bytes:
    assert content is not None
    return content[: damaged.start] + content[damaged.stop :]


@pytest.mark.parametrize("each", REPAIRED, ids=lambda each: each.name)
def test_repair_mendable_damage_leaves_what_qemu_finds_in_order(each: Mutation, sound: Path, tmp_path: Path) -> None:
    path = damaged_image(each, sound, tmp_path)
    before = guest(path)
    report = repaired(path)
    assert report is not None
    assert report.is_clean, report
    theirs = qemu_check(path)
    assert (theirs.exit_status, theirs.leaks, theirs.corruptions) == (0, 0, 0)
    assert Edit(path).get(4, 4) == 2 or not Edit(path).get(72) & 3, "dirty and corrupt are clear"
    if each.damaged:
        assert without(guest(path), each.damaged) == without(guest(image_of(each.kind, sound)), each.damaged)
    elif each.kind != "luks":
        assert before is not None
        assert guest(path) == before


@pytest.mark.parametrize("name", ["data refcount 2", "snapshot data refcount 1", "COPIED set in a shared entry"])
def test_repair_image_with_snapshots_leaves_their_bytes(name: str, sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.qcow2"
    shutil.copy(image_of("snapshots", sound), path)
    mutation(name).apply(Edit(path))
    before = [guest(path, snapshot) for snapshot in ("one", "three")]
    assert None not in before
    report = repaired(path)
    assert report is not None
    assert report.is_clean, report
    assert [guest(path, snapshot) for snapshot in ("one", "three")] == before


@pytest.mark.parametrize("each", UNREPAIRED, ids=lambda each: each.name)
def test_repair_damage_beyond_it_makes_nothing_worse(each: Mutation, sound: Path, tmp_path: Path) -> None:
    path = damaged_image(each, sound, tmp_path)
    before, found = guest(path), qemu_check(path)
    allowed = undercounted(path.read_bytes())
    repaired(path)
    assert qemu_check(path).exit_status == found.exit_status
    assert undercounted(path.read_bytes()) <= allowed
    if before is not None:
        assert guest(path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_repair_lost_refcount_table_is_built_anew_for_every_kind(kind: str, sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.qcow2"
    shutil.copy(image_of(kind, sound), path)
    edit = Edit(path)
    before = guest(path) if kind not in ("large", "luks") else b""
    edit.write(edit.refcount_table, bytes(edit.cluster_size * edit.get(56, 4)))
    report = repaired(path)
    assert report is not None
    assert report.is_clean, report
    assert qemu_check(path).exit_status == 0
    if before:
        assert guest(path) == before


@pytest.mark.parametrize("name", [each.name for each in REPAIRED if each.name.startswith("L2 entry to ")])
def test_repaired_image_in_which_data_was_metadata_can_be_written(name: str, sound: Path, tmp_path: Path) -> None:
    path = damaged_image(mutation(name), sound, tmp_path)
    report = repaired(path)
    assert report is not None
    assert report.is_clean
    before = guest(path)
    assert before is not None

    async def main() -> None:
        image = await open_image(path)
        await image.write(100, b"x" * 100)
        await image.flush()
        await image.trim(0, 4096)
        await image.write(0, b"y" * 4096)
        await image.close()

    asyncio.run(main())
    assert qemu_check(path).corruptions == 0
    assert guest(path) == b"y" * 4096 + before[4096:]


def test_repair_reports_what_it_fixed(sound: Path, tmp_path: Path) -> None:
    path = damaged_image(mutation("L2 entry twice"), sound, tmp_path)
    found = qemu_check(path)
    report = repaired(path)
    assert report is not None
    assert (report.leaks_fixed, report.corruptions_fixed) == (found.leaks, found.corruptions) == (1, 1)


def test_repair_of_counts_in_several_blocks_puts_each_back_and_nothing_else(tmp_path: Path) -> None:
    """Clusters of 512 bytes: a block counts 256."""
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    qemu_io(path, "write -q -P 1 0 400k")
    content = path.read_bytes()
    (table,) = struct.unpack_from(">Q", content, 48)
    blocks = struct.unpack_from(">3Q", content, table)
    damaged = bytearray(content)
    for block, count in zip(blocks, (2, 0, 2), strict=True):
        struct.pack_into(">H", damaged, block + 2 * 100, count)
    path.write_bytes(damaged)
    report = repaired(path)
    assert report is not None
    assert report.is_clean
    assert path.read_bytes() == content


# Leaks only


@pytest.mark.parametrize("name", ["leaked cluster", "L1 refcount 9", "bitmaps disowned"])
def test_repair_leaks_only_lowers_refcounts(name: str, sound: Path, tmp_path: Path) -> None:
    path = damaged_image(mutation(name), sound, tmp_path)
    before = guest(path)
    leaks = qemu_check(path).leaks
    report = repaired(path, leaks_only=True)
    assert report is not None
    assert (report.leaks, report.leaks_fixed) == (0, leaks)
    assert qemu_check(path).exit_status == 0
    assert guest(path) == before


def _snapshots_gone(edit: Edit) -> None:
    """As a crash in the deletion of the last snapshots leaves it: what they shared still has its counts."""
    edit.put(60, 0, 4)


@pytest.mark.parametrize("leaks_only", [False, True])
def test_repair_of_leaked_shares_sets_the_flags_that_go_with_the_counts(
    leaks_only: bool, sound: Path, tmp_path: Path
) -> None:
    path = tmp_path / "damaged.qcow2"
    shutil.copy(image_of("snapshots", sound), path)
    _snapshots_gone(Edit(path))
    before, content = guest(path), path.read_bytes()
    assert qemu_check(path).exit_status == 3
    report = repaired(path, leaks_only=leaks_only)
    assert report is not None
    assert report.is_clean, report
    assert qemu_check(path).exit_status == 0
    assert guest(path) == before
    if leaks_only:
        for number, state in enumerate(crashes(content, in_memory(content, leaks_only=True)[0].epochs)):
            assert undercounted(state) == 0, f"state {number}"
            for again in (True, False):
                assert in_memory(state, leaks_only=again)[1].is_clean, f"state {number}"


def test_repair_leaks_only_sets_no_flag_beside_a_count_that_is_too_low(sound: Path, tmp_path: Path) -> None:
    path = damaged_image(mutation("snapshot data refcount 1"), sound, tmp_path)
    edit = Edit(path)
    _leak_too(edit)
    before = edit.get(edit.entry(8))
    report = repaired(path, leaks_only=True)
    assert report is not None
    assert (report.leaks, report.exit_status) == (0, 2)
    assert edit.get(edit.entry(8)) == before
    assert before < structs.COPIED


def test_repair_leaks_only_leaves_no_flag_unset_beside_another_corruption(sound: Path, tmp_path: Path) -> None:
    path = damaged_image(mutation("L2 entry twice"), sound, tmp_path)
    edit = Edit(path)
    entry = edit.get(edit.entry(1))
    edit.put(edit.refcount(entry & structs.OFFSET_MASK), 2, 2)
    edit.put(edit.entry(1), entry & ~structs.COPIED)
    report = repaired(path, leaks_only=True)
    assert report is not None
    assert (report.leaks, report.leaks_fixed, report.corruptions) == (0, 2, 1)
    assert edit.get(edit.entry(1)) == entry


def test_repair_leaks_only_leaves_corruptions(sound: Path, tmp_path: Path) -> None:
    path = damaged_image(mutation("L2 entry twice"), sound, tmp_path)
    report = repaired(path, leaks_only=True)
    assert report is not None
    assert (report.leaks, report.leaks_fixed, report.corruptions) == (0, 1, 1)
    assert qemu_check(path).exit_status == 2


@pytest.mark.parametrize("leaks_only", [False, True])
def test_repair_beside_a_broken_reference_frees_nothing(leaks_only: bool, sound: Path, tmp_path: Path) -> None:
    """The clusters of a lost L2 table look like leaks: they are kept for whoever mends the entry."""
    path = damaged_image(mutation("L1 entry behind the end"), sound, tmp_path)
    assert qemu_check(path).leaks > 0
    content = path.read_bytes()
    repaired(path, leaks_only=leaks_only)
    assert path.read_bytes() == content


@pytest.mark.parametrize("leaks_only", [False, True])
@pytest.mark.parametrize(
    "each",
    [
        Mutation("L1 table at a bitmap's bits", "bitmaps", lambda edit: edit.put(40, bitmap_data(edit))),
        *(each for each in UNREPAIRED if each.name in TWO_IN_ONE),
    ],
    ids=lambda each: each.name,
)
def test_repair_where_one_cluster_is_two_things_keeps_both(
    each: Mutation, leaks_only: bool, sound: Path, tmp_path: Path
) -> None:
    """With the damaged field put right nothing is missing. The guest has a qcow2 image's L2 table in a cluster."""
    intact, path = tmp_path / "intact", tmp_path / "damaged"
    shutil.copy(image_of(each.kind, sound), intact)
    edit = Edit(intact)
    clusters = [edit.get(edit.entry(index)) & structs.OFFSET_MASK for index in range(2)]
    edit.write(clusters[1], struct.pack(">Q", structs.COPIED | clusters[0]).ljust(4096, b"\0"))
    shutil.copy(intact, path)
    each.apply(Edit(path))
    pairs = enumerate(zip(intact.read_bytes(), path.read_bytes(), strict=True))
    damaged = {offset: byte for offset, (byte, found) in pairs if byte != found}
    report = repaired(path, leaks_only=leaks_only)
    assert report is not None
    assert report.exit_status == 2
    with path.open("r+b") as file:
        for offset, byte in damaged.items():
            file.seek(offset)
            file.write(bytes([byte]))
    assert undercounted(path.read_bytes()) == 0
    before = guest(intact)
    assert guest(path) == before
    report = repaired(path)
    assert report is not None
    assert report.is_clean
    assert guest(path) == before


@pytest.mark.parametrize("name", ["bitmap type 2", "snapshot extra too large"])
def test_repair_image_that_cannot_be_checked_writes_nothing(name: str, sound: Path, tmp_path: Path) -> None:
    path = damaged_image(mutation(name), sound, tmp_path)
    _leak_too(Edit(path))
    content = path.read_bytes()
    report = repaired(path)
    assert report is not None
    assert report.exit_status == 1
    assert path.read_bytes() == content


def _leak_too(edit: Edit) -> None:
    mutation("leaked cluster").apply(edit)


def test_repair_rebuild_that_would_grow_over_a_dangling_entry_is_not_done(sound: Path, tmp_path: Path) -> None:
    """An entry two clusters behind the end would come to point at the new blocks."""
    path = damaged_image(mutation("refcount table entry 0"), sound, tmp_path)
    edit = Edit(path)
    end = -(-edit.size // edit.cluster_size) * edit.cluster_size
    edit.put(edit.entry(0), 1 << 63 | end + edit.cluster_size)
    content = path.read_bytes()
    report = repaired(path)
    assert report is not None
    assert report.exit_status == 2
    assert path.read_bytes() == content


@pytest.mark.parametrize("pattern", [0xB7, 0xD9])
def test_repair_leaves_a_guests_data_that_an_l1_entry_takes_for_a_table(pattern: int, tmp_path: Path) -> None:
    """As entries they are misaligned, or COPIED though compressed."""
    path = tmp_path / "damaged.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=1k", path, "1M")
    qemu_io(path, f"write -q -P {pattern} 0 64k", "write -q -P 3 512k 64k")
    edit = Edit(path)
    data = edit.get(edit.get(edit.l1) & structs.OFFSET_MASK) & structs.OFFSET_MASK
    edit.put(edit.l1 + 8, structs.COPIED | data)
    edit.put(edit.l1 + 4 * 8, edit.get(edit.l1 + 4 * 8) & ~structs.COPIED)
    report = repaired(path)
    assert report is not None
    assert report.exit_status == 2
    assert edit.read(data, 1024) == bytes([pattern]) * 1024
    assert edit.get(edit.l1 + 4 * 8) & structs.COPIED, "what is no guest's data is repaired"


@pytest.mark.parametrize("features", [0, 1])
@pytest.mark.parametrize("leaks_only", [False, True])
def test_repair_clears_counts_behind_the_end_of_the_file(leaks_only: bool, features: int, tmp_path: Path) -> None:
    """No check counts them as leaks, before the file has grown. Clusters of 512 bytes: a block counts 256."""
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    qemu_io(path, "write -q -P 1 0 16k")
    edit = Edit(path)
    end = -(-edit.size // 512)
    edit.write((end + 1) * 512 - 1, b"\0")
    edit.put(edit.refcount_table + 8, end * 512)
    edit.put(edit.refcount(end * 512), 1, 2)
    edit.put(72, features)
    content = path.read_bytes()
    edit.put(edit.refcount((end + 1) * 512), 1, 2)
    edit.put(edit.refcount((end + 3) * 512), 9, 2)
    edit.put(end * 512 + 2 * 44, 0xFFFF, 2)
    assert qemu_check(path).exit_status == 0
    report = repaired(path, leaks_only=leaks_only)
    assert report is not None
    assert report.is_clean
    assert report.leaks_fixed == 3
    expected = bytearray(content)
    expected[79] = 0
    assert path.read_bytes() == expected


def test_repair_keeps_counts_behind_the_end_while_something_may_lie_there(sound: Path, tmp_path: Path) -> None:
    path = damaged_image(mutation("L2 entry behind the end"), sound, tmp_path)
    edit = Edit(path)
    edit.put(edit.refcount((edit.size // 4096 + 3) * 4096), 1, 2)
    content = path.read_bytes()
    repaired(path)
    assert path.read_bytes() == content


# Order on disk


class LogFile(MemoryFile):
    """Remembers writes by epoch: a barrier ends one."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.epochs: list[list[tuple[int, bytes]]] = [[]]

    async def pwrite(self, offset: int, data: Buffer) -> None:
        self.epochs[-1].append((offset, bytes(data)))
        await super().pwrite(offset, data)

    async def fdatasync(self) -> None:
        if self.epochs[-1]:
            self.epochs.append([])


def crashes(content: bytes, epochs: list[list[tuple[int, bytes]]]) -> Iterator[bytes]:
    """Each file that a crash may leave: all epochs before one, and some writes of that one; all subsets if few."""
    done = MemoryFile(content)
    for epoch in epochs:
        few = len(epoch) <= 4
        numbers = range(len(epoch))
        subsets: Iterator[tuple[int, ...]] = (
            itertools.chain.from_iterable(itertools.combinations(numbers, count) for count in range(len(epoch) + 1))
            if few
            else (tuple(range(count)) for count in range(len(epoch) + 1))
        )
        for subset in subsets:
            state = MemoryFile(done.content)
            for number in subset:
                state.try_pwrite(*epoch[number])
            yield bytes(state.content)
        for write in epoch:
            done.try_pwrite(*write)
    yield bytes(done.content)


def in_memory(content: bytes, *, leaks_only: bool = False) -> tuple[LogFile, CheckReport]:
    file = LogFile(content)
    header = asyncio.run(read_header(file))
    report = asyncio.run(repair(file, header, leaks_only=leaks_only))
    return file, report


def undercounted(content: bytes) -> int:
    """Clusters with fewer counts than references (Q1). 0 if the header is refused."""
    file = MemoryFile(content)
    try:
        header = asyncio.run(read_header(file))
    except ImageError:
        return 0
    report = asyncio.run(check(file, header))
    return sum(1 for each in report.findings if each.kind == "corruption" and each.structure == "refcount")


def flawed_states(content: bytes, epochs: list[list[tuple[int, bytes]]], size: int | None) -> list[str]:
    """What is wrong with any crash of a repair: worse than before, not mended by another repair, or other in size."""
    flaws: list[str] = []
    allowed = undercounted(content)
    for number, state in enumerate(crashes(content, epochs)):
        if undercounted(state) > allowed:
            flaws.append(f"state {number}: more clusters with too low a refcount than before")
        file, report = in_memory(state)
        if not report.is_clean:
            flaws.append(f"state {number}: {report}")
        if size is not None and file.size != size:
            flaws.append(f"state {number}: {file.size} bytes, uninterrupted {size}")
    return flaws


@pytest.mark.parametrize("each", [one for one in REPAIRED if one.kind != "luks"], ids=lambda each: each.name)
def test_repair_crash_at_any_write_is_mended_by_another(each: Mutation, sound: Path, tmp_path: Path) -> None:
    """Q1, Q4, Q6."""
    content = damaged_image(each, sound, tmp_path).read_bytes()
    file, report = in_memory(content)
    assert report.is_clean
    assert sum(map(len, file.epochs)) > 0
    has_hidden_references = each.name.startswith("1-bit")  # then only what lies behind the file's end is surely free
    assert flawed_states(content, file.epochs, None if has_hidden_references else file.size) == []


@pytest.mark.parametrize("name", ["refcount table entry 0", "L2 entry to a refcount block", "dirty with refcounts 0"])
def test_repair_crash_at_any_write_is_mended_for_qemu(name: str, sound: Path, tmp_path: Path) -> None:
    path = damaged_image(mutation(name), sound, tmp_path)
    content, before = path.read_bytes(), guest(path)
    for number, state in enumerate(crashes(content, in_memory(content)[0].epochs)):
        path.write_bytes(bytes(in_memory(state)[0].content))
        assert qemu_check(path).exit_status == 0, f"state {number}"
        assert guest(path) == before, f"state {number}"


def test_crash_states_of_a_repair_in_the_wrong_order_are_flawed(sound: Path, tmp_path: Path) -> None:
    """The control: the header names the new refcount table before the table is there."""
    each = mutation("refcount table spare entry behind the end")
    content = damaged_image(each, sound, tmp_path).read_bytes()
    file, _ = in_memory(content)
    assert flawed_states(content, file.epochs, file.size) == []
    assert flawed_states(content, file.epochs[::-1], file.size) != []


def test_crash_states_without_barriers_are_flawed(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: all writes in one epoch, so that the header's may come without the others."""
    content = damaged_image(mutation("refcount table spare entry behind the end"), sound, tmp_path).read_bytes()
    file, _ = in_memory(content)
    together = [list(itertools.chain.from_iterable(file.epochs))]
    assert len(together[0]) <= 4
    assert flawed_states(content, together, file.size) != []


def test_repair_dirty_bit_alone_costs_one_write(sound: Path, tmp_path: Path) -> None:
    content = damaged_image(mutation("dirty"), sound, tmp_path).read_bytes()
    file, report = in_memory(content)
    assert report.is_clean
    assert [write for epoch in file.epochs for write in epoch] == [(72, bytes(8))]


def test_repair_sound_image_writes_nothing(sound: Path) -> None:
    file, report = in_memory(image_of("version 3", sound).read_bytes())
    assert report.is_clean
    assert file.epochs == [[]]


def test_repair_clears_unknown_autoclear_bits_before_all_else(sound: Path, tmp_path: Path) -> None:
    path = damaged_image(mutation("leaked cluster"), sound, tmp_path)
    Edit(path).put(88, 1 << 40)
    file, _ = in_memory(path.read_bytes())
    assert file.epochs[0] == [(88, bytes(8))]


def test_repair_keeps_the_dirty_bit_while_something_remains(sound: Path, tmp_path: Path) -> None:
    path = damaged_image(mutation("L2 entry behind the end"), sound, tmp_path)
    Edit(path).put(72, 3)
    report = repaired(path)
    assert report is not None
    assert report.exit_status == 2
    assert Edit(path).get(72) == 3


def test_repair_refcount_table_beyond_its_limit_is_refused(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = damaged_image(mutation("refcount table entry 0"), sound, tmp_path).read_bytes()
    monkeypatch.setattr(structs, "REFCOUNT_TABLE_BYTES_MAX", 4096)
    assert in_memory(content)[1].is_clean
    file = LogFile(content)
    header = asyncio.run(read_header(file))
    monkeypatch.setattr(structs, "REFCOUNT_TABLE_BYTES_MAX", 4095)
    with pytest.raises(ImageError, match="4096 bytes, allowed are 4095"):
        asyncio.run(repair(file, header, leaks_only=False))
    assert file.epochs == [[]]
