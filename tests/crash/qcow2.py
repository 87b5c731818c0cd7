"""The qcow2 writer, crashed: one scenario for each way in which an image can lie, and for each change of its tables.

All begin with images of qemu-img's that are not all zeroes; disks are small, so that allocations, copies and what is
freed collide.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from nbdimg.formats.qcow2.bitmap_edit import BitmapAction, open_editor
from nbdimg.formats.qcow2.bitmap_live import change_bitmaps, prepare
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.snapshot_changes import apply_snapshot, create_snapshot, delete_snapshot
from nbdimg.storage.memory import MemoryFile
from tests.crash import images
from tests.crash.images import KiB, Make
from tests.crash.qcow2check import Checker, digest, kept, opened
from tests.crash.workloads import Workload, change_alone, clients, discard_and_reuse, give_size, image_of, sizes, some
from tests.support.crash import (
    Built,
    Client,
    ExportTarget,
    RecordingFile,
    Scenario,
    Target,
    crash_states,
    record,
)
from tests.support.crash.expectations import Expectations, fingerprints
from tests.support.reading import read_all


def scenario(name: str, make: Make, workload: Workload, *, slices_max: int | None = None) -> Scenario:
    """slices_max: of L2 tables, and of refcount blocks, that are in memory; so few that changes wait for flushes."""
    start = functools.partial(images.start, make)

    def build(rng: random.Random) -> Built:
        return Built(start().files, start().guest)

    async def open_it(files: Sequence[RecordingFile]) -> Target:
        image = await opened(start(), files, writable=True)
        if slices_max is not None:
            driver = image.driver
            assert isinstance(driver, Qcow2Driver)
            assert driver.refcounts is not None
            driver.mapping.cache._slices_max = driver.refcounts.cache._slices_max = slices_max
        return ExportTarget(image)

    return Scenario(f"qcow2, {name}", build, open_it, workload, Checker(start))


def again(name: str, before: Scenario, workload: Workload) -> Scenario:
    """Begins with an image as some crash of `before` left it: with leaks, half-done changes, or dirty."""
    check = before.check
    assert isinstance(check, Checker)
    start = check.start

    async def crashed(rng: random.Random) -> Built:
        seed = rng.randrange(1 << 16)
        files: Sequence[bytes] = ()
        for number, state in enumerate(crash_states(await record(before, seed), seed=seed, cap=2)):
            if rng.random() * (number + 1) < 1:
                files = state.files
        image = await opened(start(), [MemoryFile(content) for content in files], writable=True)
        return Built(files, await read_all(image))

    def build(rng: random.Random) -> Built:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, crashed(rng)).result()

    return Scenario(f"qcow2, {name}", build, before.open, workload, Checker(start))


# Changes of tables, between requests


def driver_of(client: Client) -> Qcow2Driver:
    driver = image_of(client).driver
    assert isinstance(driver, Qcow2Driver)
    return driver


async def flushed_guest(client: Client) -> bytes:
    """What the disk reads as, durable.

    Raises: AssertionError: that is not what the guest wrote.
    """
    await client.flush()
    guest = await client.target.read(0, client.target.size)
    expected = Expectations(client.trace)
    expected.advance(client.trace.now)
    assert not expected.violated_by(fingerprints(guest))
    return guest


async def make_snapshot(client: Client, name: str) -> bytes:
    """A step that the checker knows. Returns what the snapshot reads as."""
    guest = await flushed_guest(client)
    driver = driver_of(client)
    work = create_snapshot(driver, name, now_ns=0)
    await client.step(f"create {name} {digest(guest)}", lambda: change_alone(client, work))
    return guest


async def go_back(client: Client, name: str, guest: bytes) -> None:
    driver = driver_of(client)
    await client.change(
        0, guest, lambda: change_alone(client, apply_snapshot(driver, name)), is_durable=True, size=len(guest)
    )
    client.size = len(guest)


async def drop_snapshot(client: Client, name: str) -> None:
    driver = driver_of(client)
    await client.step(f"delete {name}", lambda: change_alone(client, delete_snapshot(driver, name)))


async def snapshots_come_and_go(client: Client, rng: random.Random) -> None:
    """Two are made, the disk goes back to the older one, and that is deleted."""
    await some(client, rng)
    guest = await make_snapshot(client, "one")
    await some(client, rng)
    await make_snapshot(client, "two")
    await some(client, rng)
    await go_back(client, "one", guest)
    await some(client, rng)
    await drop_snapshot(client, "one")
    await some(client, rng)


async def snapshots_beside_bitmaps(client: Client, rng: random.Random) -> None:
    """Two are made, and the older one is deleted; bitmaps do not let the disk go back."""
    await some(client, rng)
    await make_snapshot(client, "one")
    await some(client, rng)
    await make_snapshot(client, "two")
    await some(client, rng)
    await drop_snapshot(client, "one")
    await some(client, rng)


async def the_kept_snapshot_goes(client: Client, rng: random.Random) -> None:
    """The disk goes back to the snapshot that the image came with, diverges from it, and loses it."""
    await some(client, rng)
    await go_back(client, images.SNAPSHOT, images.pattern(client.size))
    await some(client, rng)
    await drop_snapshot(client, images.SNAPSHOT)
    await some(client, rng)


async def a_snapshot_of_another_size(client: Client, rng: random.Random) -> None:
    size = client.size
    guest = await make_snapshot(client, "small")
    await give_size(client, 2 * size)
    await some(client, rng)
    await go_back(client, "small", guest)
    await some(client, rng)
    await give_size(client, size + size // 2)
    await some(client, rng)


def bitmaps_edited(make: Make) -> Workload:
    """The image is closed, gets a third bitmap, and is used again; then loses it."""

    async def workload(client: Client, rng: random.Random) -> None:
        files = client.trace.files
        for is_new in (True, False):
            await some(client, rng)
            await client.flush()
            await client.target.close()
            editor = await open_editor(files[0])
            if is_new:
                editor.add("third", 512)
            else:
                editor.merge(images.IDLE_BITMAP, ["third"])
                editor.remove("third")
            await client.step("edit", editor.save)
            client.target = ExportTarget(await opened(images.start(make), files, writable=True))
        await some(client, rng)

    return workload


async def change_tracking(client: Client, states: str, *actions: BitmapAction) -> None:
    """A step that the checker knows."""
    guest = await flushed_guest(client)
    image = image_of(client)
    work = change_bitmaps(image, await prepare(image, actions))
    await client.step(f"bitmaps {kept(guest)} {states}", lambda: change_alone(client, work))


async def bitmaps_changed_live(client: Client, rng: random.Random) -> None:
    """One stops as another begins; that is cleared, then the first in its place; the other goes."""
    await some(client, rng)
    stop, more = BitmapAction("disable", images.BITMAP), BitmapAction("add", "third", 512)
    await change_tracking(client, f"third=new {images.BITMAP}=still", more, stop)
    await some(client, rng)
    await change_tracking(client, "third=new", BitmapAction("clear", "third"))
    await some(client, rng)
    merge = BitmapAction("merge", images.IDLE_BITMAP, sources=("third", images.BITMAP))
    again = BitmapAction("clear", images.BITMAP), BitmapAction("enable", images.BITMAP)
    await change_tracking(client, f"third=still {images.BITMAP}=new", BitmapAction("disable", "third"), merge, *again)
    await some(client, rng)
    await change_tracking(client, "third=gone", BitmapAction("remove", "third"))
    await some(client, rng)


async def first_and_last_bitmap(client: Client, rng: random.Random) -> None:
    """An image without bitmaps gets some, and loses them."""
    await some(client, rng)
    await change_tracking(client, "one=new", BitmapAction("add", "one", 512))
    await some(client, rng)
    await change_tracking(client, "two=new", BitmapAction("add", "two", 4 * KiB))
    await some(client, rng)
    await change_tracking(client, "one=gone two=gone", BitmapAction("remove", "one"), BitmapAction("remove", "two"))
    await some(client, rng)


_three = clients(3, 15, 8 * KiB)
_few = clients(2, 5, 8 * KiB)
_bitmaps = images.with_bitmaps("cluster_size=4k", 128 * KiB)
_small_bitmaps = images.with_bitmaps("cluster_size=512", 64 * KiB)
_lazy = "cluster_size=4k,lazy_refcounts=on"
_extended = "cluster_size=16k,extended_l2=on"
_lazy_bitmaps = images.with_bitmaps(_lazy, 128 * KiB)
_extended_bitmaps = images.with_bitmaps(_extended, 128 * KiB)
_over_raw = images.overlay("cluster_size=4k", 96 * KiB, 80 * KiB, "raw")
_tiny = "cluster_size=512,refcount_bits=64"
"""A refcount block counts 32 KiB of the file, a cluster of the table 2 MiB; an L2 table maps 32 KiB of the disk."""

FIRST = (
    scenario("512-byte clusters", images.plain(_tiny, 96 * KiB, filled=24 * KiB), clients(3, 15, 6 * KiB)),
    scenario("few slices in memory", images.plain(_tiny, 256 * KiB, filled=96 * KiB), _three, slices_max=4),
    scenario("refcount table grows", images.crowded(_tiny, 96 * KiB, 1950 * KiB), clients(3, 10, 6 * KiB)),
    scenario("4 KiB clusters", images.plain("cluster_size=4k", 192 * KiB, filled=96 * KiB), _three),
    scenario(
        "64 KiB clusters", images.plain("cluster_size=64k", 512 * KiB, filled=256 * KiB), clients(3, 15, 48 * KiB)
    ),
    scenario("raw backing file", images.overlay("cluster_size=4k", 192 * KiB, 160 * KiB, "raw"), _three),
    scenario("qcow2 backing file", images.overlay("cluster_size=16k", 256 * KiB, 200 * KiB, "qcow2"), _three),
    scenario("internal snapshot", images.with_snapshot("cluster_size=16k", 256 * KiB), _three),
    scenario("compressed", images.plain("cluster_size=4k", 192 * KiB, "-c"), _three),
    scenario("compressed with zstd", images.plain("cluster_size=4k,compression_type=zstd", 96 * KiB, "-c"), _three),
    scenario("extended L2", images.plain(_extended, 256 * KiB, filled=128 * KiB), _three),
    scenario("extended L2, backing file", images.overlay(_extended, 256 * KiB, 200 * KiB, "raw"), _three),
    scenario("zero clusters with space", images.zeroed("cluster_size=4k", 192 * KiB), _three),
    scenario(
        "discard and reuse", images.plain("cluster_size=4k,refcount_bits=1", 64 * KiB), discard_and_reuse(4 * KiB, 10)
    ),
    scenario("lazy refcounts", images.plain(_lazy, 128 * KiB, filled=64 * KiB), _three),
    scenario("external data file", images.data_file("cluster_size=4k", 192 * KiB), _three),
    scenario("raw external data file", images.data_file("cluster_size=4k,data_file_raw=on", 192 * KiB), _three),
    scenario("LUKS", images.encrypted("cluster_size=4k", 192 * KiB), _three),
    scenario("version 2", images.plain("cluster_size=4k,compat=0.10", 192 * KiB, filled=96 * KiB), _three),
    scenario("version 2, internal snapshot", images.with_snapshot("cluster_size=4k,compat=0.10", 96 * KiB), _three),
    scenario("lazy refcounts, snapshots", images.plain(_lazy, 64 * KiB), snapshots_come_and_go),
    scenario("snapshots made, applied, deleted", images.plain("cluster_size=4k", 96 * KiB), snapshots_come_and_go),
    scenario("kept snapshot goes", images.with_snapshot("cluster_size=4k", 96 * KiB), the_kept_snapshot_goes),
    scenario("snapshot of another size", images.plain(_tiny, 48 * KiB), a_snapshot_of_another_size),
    scenario("resize, L1 grows", images.plain(_tiny, 64 * KiB), sizes(1.6, 0.55, 2.1)),
    scenario("resize over a backing file", _over_raw, sizes(0.4, 1.3)),
    scenario("resize, external data file", images.data_file("cluster_size=4k", 96 * KiB), sizes(1.3, 0.4, 0.9)),
    scenario(
        "resize, raw external data file",
        images.data_file("cluster_size=4k,data_file_raw=on", 96 * KiB),
        sizes(1.3, 0.4, 0.9),
    ),
    scenario("resize, external data file, extended L2", images.data_file(_extended, 128 * KiB), sizes(1.3, 0.4, 0.9)),
    scenario("resize, LUKS", images.encrypted(_tiny, 64 * KiB), sizes(1.6, 0.55, 2.1)),
    scenario("resize, version 2", images.plain("cluster_size=512,compat=0.10", 64 * KiB), sizes(1.6, 0.55, 2.1)),
    scenario("resize, compressed", images.plain("cluster_size=4k", 96 * KiB, "-c"), sizes(0.4, 1.3, 0.7)),
    scenario("resize, internal snapshot", images.with_snapshot(_tiny, 64 * KiB), sizes(0.45, 1.6, 0.8)),
    scenario("resize, extended L2", images.plain(_extended, 128 * KiB), sizes(0.3, 1.3, 0.55)),
    scenario(
        "resize over a backing file, extended L2",
        images.overlay(_extended, 128 * KiB, 96 * KiB, "raw"),
        sizes(0.3, 1.3),
    ),
    scenario("resize, zero clusters with space", images.zeroed("cluster_size=4k", 96 * KiB), sizes(0.7, 1.3, 0.3)),
    scenario("resize, lazy refcounts", images.plain(_lazy, 64 * KiB), sizes(0.45, 1.6, 0.8)),
    scenario("snapshots over a backing file", _over_raw, snapshots_come_and_go),
    scenario("compressed, snapshots", images.plain("cluster_size=4k", 96 * KiB, "-c"), snapshots_come_and_go),
    scenario("LUKS, snapshots", images.encrypted("cluster_size=4k", 96 * KiB), snapshots_come_and_go),
    scenario("extended L2, snapshots", images.plain(_extended, 128 * KiB), snapshots_come_and_go),
    scenario("damaged", images.damaged(images.plain("cluster_size=4k", 192 * KiB, filled=96 * KiB)), _few),
    scenario(
        "damaged, refcount table lost",
        images.damaged(images.plain("cluster_size=4k", 192 * KiB, filled=96 * KiB), is_table_lost=True),
        _few,
    ),
    scenario("damaged, external data file", images.damaged(images.data_file("cluster_size=4k", 192 * KiB)), _few),
    scenario("bitmaps", _bitmaps, clients(3, 6, 8 * KiB)),
    scenario("bitmaps of a disk that shrinks and grows", _bitmaps, sizes(0.5, 1.2)),
    scenario("bitmaps of a disk that shrinks and grows, 512-byte clusters", _small_bitmaps, sizes(0.5, 1.2)),
    scenario("bitmaps and snapshots", _bitmaps, snapshots_beside_bitmaps),
    scenario("bitmaps, lazy refcounts", _lazy_bitmaps, clients(3, 6, 8 * KiB)),
    scenario("bitmaps edited", _bitmaps, bitmaps_edited(_bitmaps)),
    scenario("bitmaps edited, 512-byte clusters", _small_bitmaps, bitmaps_edited(_small_bitmaps)),
    scenario("bitmaps changed live", _bitmaps, bitmaps_changed_live),
    scenario("bitmaps changed live, 512-byte clusters", _small_bitmaps, bitmaps_changed_live),
    scenario("bitmaps changed live, lazy refcounts", _lazy_bitmaps, bitmaps_changed_live),
    scenario("bitmaps changed live, extended L2", _extended_bitmaps, bitmaps_changed_live),
    scenario(
        "first and last bitmap, external data file",
        images.data_file("cluster_size=4k", 64 * KiB),
        first_and_last_bitmap,
    ),
    scenario("first and last bitmap, LUKS", images.encrypted("cluster_size=4k", 64 * KiB), first_and_last_bitmap),
    scenario("first and last bitmap, lazy refcounts", images.plain(_lazy, 64 * KiB), first_and_last_bitmap),
    scenario(
        "first and last bitmap, backing file", images.overlay(_tiny, 64 * KiB, 32 * KiB, "raw"), first_and_last_bitmap
    ),
)

_by_name = {each.name.removeprefix("qcow2, "): each for each in FIRST}

SCENARIOS = (
    *FIRST,
    again("crashed before", _by_name["internal snapshot"], _three),
    again("crashed before, lazy refcounts", _by_name["lazy refcounts, snapshots"], clients(2, 8, 8 * KiB)),
    again("crashed before, discard and reuse", _by_name["discard and reuse"], discard_and_reuse(4 * KiB, 10)),
)
