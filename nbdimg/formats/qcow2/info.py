"""What an image says of itself, for people: no other file is opened, nothing is locked, nothing is changed.

Only header, snapshot table, bitmap directory and LUKS header are read; each has its limits, so a hostile image costs no
more than a sound one. Somebody may be writing to the image: then parts may not fit each other, or be found malformed.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdimg.formats.qcow2 import luks
from nbdimg.formats.qcow2.bitmaps import BitmapEntry, load_directory
from nbdimg.formats.qcow2.header import KNOWN_AUTOCLEAR, Header
from nbdimg.formats.qcow2.open import read_luks_area
from nbdimg.formats.qcow2.snapshots import Snapshot, load_snapshots
from nbdimg.formats.qcow2.structs import Compatible, Crypt, ExtensionType, FeatureKind
from nbdimg.storage.file import BlockFile


@dataclass(frozen=True, slots=True)
class Info:
    """`luks` is None for other images, those with legacy AES among them. `has_stale_bitmaps`: there are bitmaps, and
    somebody has changed the image without them. `unknown_features`: of those that do not matter to a reader, by the
    image's own names.
    """

    header: Header
    snapshots: list[Snapshot]
    bitmaps: list[BitmapEntry]
    has_stale_bitmaps: bool
    luks: luks.LuksHeader | None
    unknown_features: list[str]


async def describe(file: BlockFile, header: Header) -> Info:
    """Raises: CorruptImage, UnsupportedFeature: naming what was found, what is allowed, and the offset. OSError."""
    bitmaps = await load_directory(file, header)
    return Info(
        header=header,
        snapshots=await load_snapshots(file, header),
        bitmaps=bitmaps,
        has_stale_bitmaps=not bitmaps and header.extension(ExtensionType.BITMAPS) is not None,
        luks=luks.parse(file.path, await read_luks_area(file, header)) if header.crypt_method == Crypt.LUKS else None,
        unknown_features=[
            *_named(header, FeatureKind.COMPATIBLE, header.compatible & ~int(Compatible.LAZY_REFCOUNTS)),
            *_named(header, FeatureKind.AUTOCLEAR, header.autoclear & ~KNOWN_AUTOCLEAR),
        ],
    )


def _named(header: Header, kind: FeatureKind, bits: int) -> list[str]:
    names = header.feature_names(kind)
    called = {bit: f" ({name})" for bit, name in names.items()}
    return [f"{kind.name.lower()} bit {bit}{called.get(bit, '')}" for bit in range(64) if bits >> bit & 1]
