"""The search for the active sequence in a ring that is in memory."""

from __future__ import annotations

from nbdimg.formats.vhdx.header import Header
from nbdimg.formats.vhdx.log import Scanner, Sequence
from nbdimg.formats.vhdx.structs import LOG_SECTOR_SIZE
from nbdimg.storage.file import Buffer


def scan(ring: Buffer, header: Header) -> Scanner:
    """All of a ring; of `header` the log's place and LogGuid count."""
    assert len(ring) == header.log_length
    scanner, view = Scanner(header), memoryview(ring)
    scanner.feed(view)
    start = 0
    while scanner.is_open:
        scanner.feed(view[start : start + LOG_SECTOR_SIZE])
        start += LOG_SECTOR_SIZE
    return scanner


def find_active(ring: Buffer, header: Header) -> Sequence | None:
    return scan(ring, header).active()
