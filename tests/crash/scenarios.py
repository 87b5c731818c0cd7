"""The writers that are crashed, by their format and by their name."""

from __future__ import annotations

import random
from collections.abc import Sequence

from nbdimg.formats.raw import RawDriver
from nbdimg.image.image import Image
from tests.crash import qcow2, vhdx
from tests.crash.workloads import three_clients
from tests.support.crash import Built, ExportTarget, RecordingFile, Scenario, Target, written

RAW_SIZE = 128 * 1024


def build_raw(rng: random.Random) -> Built:
    """Every second 4 KiB hold bytes that are as easily told apart as a client's; serial 0 is no client's."""
    sectors = [written(index, 0) if index // 8 % 2 else bytes(512) for index in range(RAW_SIZE // 512)]
    content = b"".join(sectors)
    return Built([content], content)


async def open_raw(files: Sequence[RecordingFile]) -> Target:
    return ExportTarget(Image(RawDriver(files[0]), writable=True))


RAW = Scenario("raw", build_raw, open_raw, three_clients)

FORMATS: dict[str, Sequence[Scenario]] = {"raw": (RAW,), "qcow2": qcow2.SCENARIOS, "vhdx": vhdx.SCENARIOS}
