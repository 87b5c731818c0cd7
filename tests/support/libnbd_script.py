"""Run short scripts with libnbd's Python module, which lives in the system's interpreter, not in a virtual environment.

This file plays two parts. Imported by a test, `run_libnbd(script, **parameters)` starts the system's interpreter on
this same file and exchanges JSON with it. Started that way, it executes the script with these names defined:

    nbd             the libnbd module
    every parameter, by its name
    outcome(call)   "ok", or the name of the error number with which the server answered call(); an error that libnbd
                    raised without asking the server is given as "client: ..."
    extents(h, length, offset, flags=0)   {context: [[length, flags], ...]} of one BLOCK_STATUS
    chunks(h, length, offset, flags=0)    (data, [[offset, length, kind], ...]) of one READ, kind "data" or "hole"
    set_reply_style, reply_style, set_lenient, random_bytes, digest, parallel_load   the functions below

and prints whatever the script stores in `result`. A script that needs a call which this libnbd lacks skips its test.
The bytes of large payloads never travel in JSON: both sides derive them from a seed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import random
import select
import subprocess
import sys
from collections.abc import Callable
from typing import Any

SYSTEM_PYTHON = os.environ.get("NBDIMG_LIBNBD_PYTHON", "/usr/bin/python3")
SCRIPT_TIMEOUT_S = 120.0


class Lacking(Exception):
    """This libnbd has no such feature."""


def random_bytes(seed: int, length: int) -> bytes:
    """`length` bytes that depend on `seed` only, the same in every process and Python version."""
    return random.Random(seed).randbytes(length)


def digest(data: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def run_libnbd(script: str, **parameters: object) -> Any:
    """Execute `script` under the system's interpreter; returns its `result`.

    Raises: AssertionError with the script's traceback if it fails; pytest's skip or failure without libnbd's module, or
    if this libnbd lacks what the script needs.
    """
    import pytest

    require_libnbd_python()
    completed = subprocess.run(
        [SYSTEM_PYTHON, os.path.abspath(__file__)],
        check=False,
        input=json.dumps({"script": script, "parameters": parameters}),
        capture_output=True,
        text=True,
        timeout=SCRIPT_TIMEOUT_S,
    )
    assert completed.returncode == 0, f"the libnbd script failed:\n{completed.stderr}"
    answer = json.loads(completed.stdout)
    if "lacking" in answer:
        pytest.skip(answer["lacking"])
    return answer["result"]


def require_libnbd_python() -> None:
    """Skip the running test, or fail it if NBDIMG_REQUIRE_PEERS=1, unless the system's Python has libnbd's module."""
    from tests.support.peers import peer_unavailable, require_program

    require_program(SYSTEM_PYTHON)
    probe = subprocess.run([SYSTEM_PYTHON, "-c", "import nbd; nbd.NBD"], check=False, capture_output=True)
    if probe.returncode != 0:
        peer_unavailable(f"{SYSTEM_PYTHON} has no libnbd module (python3-libnbd)")


def set_reply_style(h: Any, style: str) -> None:
    """Ask for "simple", "structured" or "extended" replies and nothing better; call it before connecting.

    Raises: Lacking, for extended replies with libnbd before 1.18.
    """
    if hasattr(h, "set_request_extended_headers"):
        h.set_request_extended_headers(style == "extended")
    elif style == "extended":
        raise Lacking(f"libnbd {h.get_version()} has no extended headers (1.18 has)")
    h.set_request_structured_replies(style != "simple")


def reply_style(h: Any) -> str:
    """What a connected handle negotiated, in the words of `set_reply_style`."""
    if hasattr(h, "get_extended_headers_negotiated") and h.get_extended_headers_negotiated():
        return "extended"
    return "structured" if h.get_structured_replies_negotiated() else "simple"


def set_lenient(nbd: Any, h: Any) -> None:
    """Let the handle send wrong requests, but keep them in step with the wire: the length flag of extended headers."""
    h.set_strict_mode(getattr(nbd, "STRICT_AUTO_FLAG", 0))


class Load:
    """Random reads, writes and write-zeroes with many requests in flight, checked against a shadow copy in memory.

    A request is issued only where no other one in flight overlaps it, unless both read, so each byte has exactly one
    right value whatever order the server works in. Connections share the export: what one has been told is written,
    every other one must read.
    """

    def __init__(self, handles: list[Any], size: int, in_flight: int, length_max: int, seed: int) -> None:
        self.handles = handles
        self.shadow = bytearray(size)
        self.in_flight_per_handle = in_flight
        self.length_max = length_max
        self.random = random.Random(seed)
        self.running: dict[int, tuple[int, int, bool]] = {}
        self.issued = 0
        self.completed = {"read": 0, "write": 0, "zero": 0}
        self.in_flight_max = 0
        self.mismatches: list[dict[str, Any]] = []

    def free_range(self, mutates: bool) -> tuple[int, int]:
        while True:
            length = self.random.randint(1, self.length_max)
            start = self.random.randrange(len(self.shadow) - length + 1)
            stop = start + length
            if all(stop <= a or b <= start or not (mutates or m) for a, b, m in self.running.values()):
                return start, stop

    def issue(self, nbd: Any, handle: Any) -> None:
        kind = self.random.choices(["read", "write", "zero"], [50, 40, 10])[0]
        start, stop = self.free_range(kind != "read")
        serial = self.issued
        self.issued += 1
        self.running[serial] = (start, stop, kind != "read")
        buffer = nbd.Buffer(stop - start)

        def complete(error: Any) -> int:
            del self.running[serial]
            self.completed[kind] += 1
            if error.value:
                self.mismatches.append({"kind": kind, "start": start, "stop": stop, "errno": error.value})
            elif kind == "read" and buffer.to_bytearray() != self.shadow[start:stop]:
                self.mismatches.append({"kind": kind, "start": start, "stop": stop})
            return 1

        if kind == "read":
            handle.aio_pread(buffer, start, complete)
        elif kind == "write":
            data = self.random.randbytes(stop - start)
            self.shadow[start:stop] = data
            handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), start, complete)
        else:
            self.shadow[start:stop] = bytes(stop - start)
            handle.aio_zero(stop - start, start, complete)

    def run(self, nbd: Any, requests: int) -> None:
        poll = select.poll()
        by_descriptor = {handle.aio_get_fd(): handle for handle in self.handles}
        while True:
            for handle in self.handles:
                while self.issued < requests and handle.aio_in_flight() < self.in_flight_per_handle:
                    self.issue(nbd, handle)
            self.in_flight_max = max(self.in_flight_max, len(self.running))
            if self.issued >= requests and not self.running:
                return
            for descriptor, handle in by_descriptor.items():
                direction = handle.aio_get_direction()
                events = (select.POLLIN if direction & 1 else 0) | (select.POLLOUT if direction & 2 else 0)
                poll.register(descriptor, events)
            for descriptor, event in poll.poll(30_000):
                handle = by_descriptor[descriptor]
                direction = handle.aio_get_direction()
                if event & (select.POLLIN | select.POLLHUP) and direction & 1:
                    handle.aio_notify_read()
                elif event & select.POLLOUT and direction & 2:
                    handle.aio_notify_write()


def parallel_load(
    nbd: Any,
    uri: str,
    *,
    size: int,
    connections: int,
    in_flight: int,
    requests: int,
    length_max: int,
    seed: int,
    negotiate_block_size: bool = True,
    spoil_shadow: bool = False,
) -> dict[str, Any]:
    """Run a `Load` over a fresh export of zeroes; returns its mismatches, counts and the digest of the final shadow.

    `spoil_shadow` makes the shadow wrong from the start: the control, which must report mismatches.
    """
    handles = [nbd.NBD() for _ in range(connections)]
    for handle in handles:
        handle.set_request_block_size(negotiate_block_size)
        handle.connect_uri(uri)
    load = Load(handles, size, in_flight, length_max, seed)
    if spoil_shadow:
        load.shadow[:] = b"\x01" * size
    load.run(nbd, requests)
    handles[0].flush()
    for handle in handles:
        handle.shutdown()
    return {
        "mismatches": load.mismatches[:5],
        "completed": load.completed,
        "in_flight_max": load.in_flight_max,
        "digest": digest(load.shadow),
    }


def _script_names(nbd: Any) -> dict[str, Any]:
    def outcome(call: Callable[[], Any]) -> str:
        try:
            call()
        except nbd.Error as error:
            return str(error.errno) if "command failed" in error.string else f"client: {error}"
        return "ok"

    def extents(h: Any, length: int, offset: int, flags: int = 0) -> dict[str, list[list[int]]]:
        found: dict[str, list[list[int]]] = {}

        def store(context: str, start: int, pairs: list[list[int]]) -> int:
            assert start == offset, (start, offset)
            assert context not in found, f"two chunks for {context}"
            found[context] = pairs
            return 0

        def extent(context: str, start: int, entries: list[int], error: Any) -> int:
            return store(context, start, [list(pair) for pair in zip(entries[::2], entries[1::2], strict=True)])

        def extent_64(context: str, start: int, entries: list[tuple[int, int]], error: Any) -> int:
            return store(context, start, [list(pair) for pair in entries])

        if hasattr(h, "block_status_64"):
            h.block_status_64(length, offset, extent_64, flags)
        else:
            h.block_status(length, offset, extent, flags)
        return found

    kinds = {nbd.READ_DATA: "data", nbd.READ_HOLE: "hole", nbd.READ_ERROR: "error"}

    def chunks(h: Any, length: int, offset: int, flags: int = 0) -> tuple[bytearray, list[tuple[int, int, str]]]:
        seen: list[tuple[int, int, str]] = []

        def chunk(data: Any, start: int, kind: int, error: Any) -> int:
            seen.append((start, len(data), kinds[kind]))
            return 0

        return h.pread_structured(length, offset, chunk, flags), seen

    return {
        "nbd": nbd,
        "errno": errno,
        "outcome": outcome,
        "extents": extents,
        "chunks": chunks,
        "set_reply_style": set_reply_style,
        "reply_style": reply_style,
        "set_lenient": lambda h: set_lenient(nbd, h),
        "random_bytes": random_bytes,
        "digest": digest,
        "parallel_load": parallel_load,
    }


def main() -> None:
    request = json.load(sys.stdin)
    names = _script_names(importlib.import_module("nbd"))
    names.update(request["parameters"])
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(request["script"], "<libnbd script>", "exec"), names)
    except Lacking as lacking:
        answer = {"lacking": str(lacking)}
    else:
        answer = {"result": names["result"]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
