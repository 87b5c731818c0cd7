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
from nbdimg.formats.qcow2.bitmap_write import Change
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


async def prepare(image: Image, actions: Sequence[BitmapAction]) -> BitmapEditor:
    """What `change_bitmaps` takes for `actions`, one after the other; nothing has changed, and requests may be in
    flight. What reads and refuses is done here, so that a standstill is short.

    Raises: ConfigError: as `BitmapEditor`. UnsupportedFeature: it has no room for them. ImageError, OSError.
    """
    driver = image.driver
    assert isinstance(driver, Qcow2Driver)
    counts = driver.refcounts
    assert counts is not None
    driver.check()
    store = driver.made_bitmaps()

    async def load(entry: BitmapEntry) -> DirtyBitmap:
        return await store.get(entry.name)

    async def save(changes: list[Change]) -> None:
        await store.replace(counts, changes)

    editor = BitmapEditor(driver.file, driver.header, store.entries, load, save)
    editor.carry_out(actions)
    await editor.load()
    return editor


async def change_bitmaps(image: Image, editor: BitmapEditor) -> None:
    """Carry out all or nothing of what was prepared, durably; no bitmap has come or gone since then. No request and no
    flush is in flight, and everything is durable.

    Raises: UnsupportedFeature: it has no room for them. ImageError, OSError: nothing has changed; what leaves a doubt
        about what the disk has makes the image fail.
    """
    try:
        with failing_in_doubt(image):
            await editor.save()
    finally:
        image.gate.changed()
        image.bitmaps_changed()
