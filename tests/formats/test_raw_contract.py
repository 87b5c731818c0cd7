"""Raw keeps the contract of every format."""

from __future__ import annotations

from pathlib import Path

from tests.formats.contract import DriverContract


class TestRaw(DriverContract):
    format = "raw"
    cluster_size = 64 * 1024
    locates = False

    def make(self, path: Path, guest: bytes) -> None:
        size = self.cluster_size
        with open(path, "wb") as file:
            file.truncate(len(guest))
            for offset in range(0, len(guest), size):
                piece = guest[offset : offset + size]
                if any(piece):
                    file.seek(offset)
                    file.write(piece)
