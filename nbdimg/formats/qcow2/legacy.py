"""Legacy AES (crypt_method 1), read only: each sector's IV is its guest sector, wherever it lies in the file."""

from __future__ import annotations

from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.crypt import EncryptedFile
from nbdimg.formats.qcow2.mapping import Mapping
from nbdimg.formats.qcow2.subclusters import SubclusterMapping
from nbdimg.image.driver import Extent, ExtentKind, Miss


class LegacyMapping(Mapping):
    def map(self, offset: int, stop: int) -> Extent | Miss:
        return _shifted(super().map(offset, stop))

    def locate(self, offset: int, stop: int) -> int:
        return -1


class LegacySubclusterMapping(SubclusterMapping):
    def map(self, offset: int, stop: int) -> Extent | Miss:
        return _shifted(super().map(offset, stop))

    def locate(self, offset: int, stop: int) -> int:
        return -1


def _shifted(extent: Extent | Miss) -> Extent | Miss:
    """The same run in a view that knows how far its guest and host sectors are apart."""
    if isinstance(extent, Miss) or extent.kind is not ExtentKind.DATA:
        return extent
    assert isinstance(extent.file, EncryptedFile)
    shift = (extent.offset - extent.file_offset) // s.SECTOR_SIZE
    return Extent(extent.kind, extent.offset, extent.length, extent.file.shifted(shift), extent.file_offset, False)
