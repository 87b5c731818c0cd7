"""Payloads of the sizes in the reference server's integrity traces.

Its test suite (nbd, tests/run) replays 68,991 recorded transactions of up to 130,048 bytes and 251 of up to 49,865,728
bytes against a fresh export of 50 MiB. A server that caps payloads at 32 MiB, like QEMU's, fails the second one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.samples import MIB, first_difference, write_sparse
from tests.support.libnbd_script import digest, random_bytes, run_libnbd
from tests.support.server import NbdimgServer

TRACE_EXPORT_SIZE = 50 * MIB
SMALL_TRACE_MAX = 130_048
HUGE_TRACE_MAX = 49_865_728

# (offset, length): both maxima, the sizes around limits of other servers and of socket buffers, and odd ones.
PAYLOADS = [
    (0, HUGE_TRACE_MAX),
    (TRACE_EXPORT_SIZE - HUGE_TRACE_MAX, HUGE_TRACE_MAX),
    (1, 32 * MIB + 1),
    (512, 32 * MIB),
    (MIB - 1, 8 * MIB + 513),
    (3 * MIB, SMALL_TRACE_MAX),
    (TRACE_EXPORT_SIZE - SMALL_TRACE_MAX, SMALL_TRACE_MAX),
    (5 * MIB + 511, 65_537),
    (7 * MIB, 4096),
    (7 * MIB + 4095, 1),
]

SCRIPT = """
h = nbd.NBD()
set_lenient(h)
set_reply_style(h, style)
h.connect_uri(uri)
assert reply_style(h) == style
read_back = []
for seed, (offset, length) in enumerate(payloads):
    h.pwrite(random_bytes(seed, length), offset)
    read_back.append(digest(h.pread(length, offset)))
h.flush()
result = read_back
h.shutdown()
"""

PIPELINED_SCRIPT = """
h = nbd.NBD()
set_lenient(h)
h.connect_uri(uri)
errors = []

def complete(error):
    errors.append(error.value)
    return 1

# The largest payload is on its way while the small requests around it wait for their turn in both directions.
h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(random_bytes(1, huge))), 0, complete)
for index in range(16):
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(random_bytes(100 + index, small))), huge + index * small, complete)
while h.aio_in_flight() > 0:
    h.poll(-1)
buffers = [nbd.Buffer(huge), nbd.Buffer(huge), *(nbd.Buffer(small) for _ in range(16))]
for buffer, offset in zip(buffers, [0, 0, *(huge + index * small for index in range(16))]):
    h.aio_pread(buffer, offset, complete)
while h.aio_in_flight() > 0:
    h.poll(-1)
result = {"errors": sorted(set(errors)), "count": len(errors), "digests": [digest(b.to_bytearray()) for b in buffers]}
h.shutdown()
"""


@pytest.mark.parametrize("style", ["simple", "structured", "extended"])
def test_payloads_of_trace_sizes_are_written_and_read_whole(tmp_path: Path, style: str) -> None:
    image = tmp_path / "disk.img"
    expected = bytearray(write_sparse(image, size=TRACE_EXPORT_SIZE, data=()))
    read_back = []
    for seed, (offset, length) in enumerate(PAYLOADS):
        expected[offset : offset + length] = random_bytes(seed, length)
        read_back.append(digest(expected[offset : offset + length]))
    with NbdimgServer(image) as server:
        assert run_libnbd(SCRIPT, uri=server.uri, style=style, payloads=PAYLOADS) == read_back
    assert first_difference(image, expected) is None


def test_huge_payloads_pipelined_with_small_ones_all_complete(tmp_path: Path) -> None:
    image, small = tmp_path / "disk.img", 32 * 1024
    write_sparse(image, size=TRACE_EXPORT_SIZE, data=())
    payloads = [random_bytes(1, HUGE_TRACE_MAX), *(random_bytes(100 + index, small) for index in range(16))]
    expected = b"".join(payloads).ljust(TRACE_EXPORT_SIZE, b"\0")
    with NbdimgServer(image) as server:
        found = run_libnbd(PIPELINED_SCRIPT, uri=server.uri, huge=HUGE_TRACE_MAX, small=small)
    assert found["errors"] == [0]
    assert found["count"] == 2 * 17 + 1
    assert found["digests"] == [digest(payload) for payload in (payloads[0], *payloads)]
    assert first_difference(image, expected) is None
