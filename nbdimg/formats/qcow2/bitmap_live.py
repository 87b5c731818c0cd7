"""Changes to the dirty bitmaps of an open, writable image: the same as `bitmap_edit` makes, while it goes on.

    stands still, all durable ──▶ new bits, tables and directory | counts | the header names them ──▶ goes on

At each bar everything before it is durable. A crash leaves the bitmaps as they were before or as they are after; see
`bitmap_store` for what is in use then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nbdimg.errors import ImageError, UnsupportedFeature
from nbdimg.formats.qcow2.bitmap_edit import BitmapAction, BitmapEditor
from nbdimg.formats.qcow2.bitmap_store import Change
from nbdimg.formats.qcow2.bitmaps import BitmapEntry
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.image.bitmap import DirtyBitmap
from nbdimg.image.image import Image
from nbdimg.storage.ordering import leaves_no_doubt


@contextmanager
def failing_in_doubt(image: Image) -> Iterator[None]:
    """Around a change of its bitmaps: an error that leaves a doubt about what the disk has makes the image fail."""
    try:
        yield
    except UnsupportedFeature:
        raise
    except (OSError, ImageError) as error:
        if not leaves_no_doubt(error):
            reason = error.strerror if isinstance(error, OSError) else error
            image.gate.failure = f"a change of its bitmaps failed ({reason}); open it anew"
        raise


def _editor(image: Image) -> BitmapEditor:
    driver = image.driver
    assert isinstance(driver, Qcow2Driver)
    counts = driver.refcounts
    assert counts is not None
    driver.check()
    store = driver.made_bitmaps()

    async def load(entry: BitmapEntry) -> DirtyBitmap:
        return await store.copy(entry.name)

    async def save(changes: list[Change]) -> None:
        await store.replace(counts, changes)

    return BitmapEditor(driver.file, driver.header, store.entries, load, save)


async def foresee(image: Image, actions: Sequence[BitmapAction]) -> list[str]:
    """The names of the bitmaps that there would be, changing nothing; requests may be in flight.

    Raises: ConfigError, ImageError, OSError: as `change_bitmaps`.
    """
    editor = _editor(image)
    await editor.carry_out(actions)
    return [entry.name for entry in editor.entries]


async def change_bitmaps(image: Image, actions: Sequence[BitmapAction]) -> None:
    """Carry out all of `actions` or none, durably. No request and no flush is in flight, and everything is durable.

    Raises: ConfigError: as `BitmapEditor`. UnsupportedFeature: it has no room for them. ImageError, OSError: nothing
        has changed; what leaves a doubt about what the disk has makes the image fail.
    """
    editor = _editor(image)
    await editor.carry_out(actions)
    try:
        with failing_in_doubt(image):
            await editor.save()
    finally:
        image.gate.changed()
        image.bitmaps_changed()
