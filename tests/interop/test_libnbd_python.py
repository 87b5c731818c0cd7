"""libnbd's Python module as a client: single requests and what each must answer, right and wrong ones.

The scripts run in the system's interpreter, see tests/support/libnbd_script.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.interop.samples import KIB, MIB, SPARSE_SIZE, file_extents, first_difference, write_full, write_sparse
from tests.support.libnbd_script import digest, random_bytes, run_libnbd
from tests.support.peers import require_program
from tests.support.server import NbdimgServer

PAYLOAD_MAX = 64 * MIB
STATE_HOLE_AND_ZERO = 3  # base:allocation, NBD_STATE_HOLE | NBD_STATE_ZERO
REPLY_STYLES = pytest.mark.parametrize("style", ["simple", "structured", "extended"])


# Handshake


@pytest.mark.parametrize("flags", range(4), ids=["none", "fixed-newstyle", "no-zeroes", "both"])
def test_handshake_with_any_client_flags_reaches_transmission(tmp_path: Path, flags: int) -> None:
    """Without fixed newstyle libnbd has only EXPORT_NAME, followed by 124 zeroes unless no-zeroes is set too."""
    image = tmp_path / "disk.img"
    expected = write_sparse(image)
    script = """
h = nbd.NBD()
h.set_handshake_flags(flags)
h.connect_uri(uri)
result = [h.get_size(), digest(h.pread(65536, 0))]
"""
    with NbdimgServer(image, options=["--read-only"]) as server:
        assert run_libnbd(script, uri=server.uri, flags=flags) == [SPARSE_SIZE, digest(expected[:65536])]


def test_option_list_reports_every_export(tmp_path: Path) -> None:
    images = [tmp_path / "alpha.img", tmp_path / "beta.img"]
    for image in images:
        write_sparse(image, size=MIB, data=())
    script = """
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix(socket)
result = []
h.opt_list(lambda name, description: result.append(name) or 0)
h.opt_abort()
"""
    with NbdimgServer(*images) as server:
        assert sorted(run_libnbd(script, socket=server.socket_path)) == ["alpha", "beta"]


def test_option_info_and_go_after_an_unknown_export_succeed(tmp_path: Path) -> None:
    images = [tmp_path / "alpha.img", tmp_path / "beta.img"]
    for index, image in enumerate(images):
        write_sparse(image, size=(index + 1) * MIB, data=())
    script = """
h = nbd.NBD()
h.set_opt_mode(True)
h.set_full_info(True)
h.connect_unix(socket)

def attempt(call):
    try:
        call()
    except nbd.Error as error:
        return error.errno
    return h.get_size()

def named(name, call):
    h.set_export_name(name)
    return attempt(call)

result = {
    "unknown info": named("absent", h.opt_info),
    "unknown go": named("absent", h.opt_go),
    "alpha info": named("alpha", h.opt_info),
    "beta info": named("beta", h.opt_info),
    "canonical": h.get_canonical_export_name(),
    "beta go": named("beta", h.opt_go),
    "ready": h.aio_is_ready(),
}
"""
    with NbdimgServer(*images) as server:
        assert run_libnbd(script, socket=server.socket_path) == {
            "unknown info": "ENOENT",
            "unknown go": "ENOENT",
            "alpha info": MIB,
            "beta info": 2 * MIB,
            "canonical": "beta",
            "beta go": 2 * MIB,
            "ready": True,
        }


@pytest.mark.parametrize("name", ["", "disk", "/disk"], ids=["empty", "name", "slash-name"])
def test_single_export_answers_to_its_name_and_its_aliases(tmp_path: Path, name: str) -> None:
    """Spec: initramfs-tools' nbd hook asks for `/name` when its boot parameter reads `nbdroot=SERVER:/name`."""
    image = tmp_path / "disk.img"
    write_sparse(image)
    script = """
h = nbd.NBD()
h.set_export_name(name)
h.connect_unix(socket)
result = h.get_size()
"""
    with NbdimgServer(image, options=["--read-only"]) as server:
        assert run_libnbd(script, socket=server.socket_path, name=name) == SPARSE_SIZE


def test_option_list_meta_context_reports_what_each_query_matches(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    script = """
h = nbd.NBD()
h.set_opt_mode(True)
h.set_export_name("disk")
h.connect_unix(socket)

def contexts(*queries):
    h.clear_meta_contexts()
    for query in queries:
        h.add_meta_context(query)
    found = []
    h.opt_list_meta_context(lambda name: found.append(name) or 0)
    return sorted(found)

result = {
    "all": contexts(),
    "base:": contexts("base:"),
    "qemu:": contexts("qemu:"),
    "exact": contexts("base:allocation"),
    "unknown": contexts("base:absent", "x-unknown:thing"),
}
"""
    with NbdimgServer(image) as server:
        found = run_libnbd(script, socket=server.socket_path)
    assert found == {
        "all": ["base:allocation", "qemu:allocation-depth"],
        "base:": ["base:allocation"],
        "qemu:": ["qemu:allocation-depth"],
        "exact": ["base:allocation"],
        "unknown": [],
    }


def test_option_set_meta_context_selects_only_what_was_asked(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    script = """
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.add_meta_context("x-unknown:thing")
h.connect_uri(uri)
result = [[h.can_meta_context("base:allocation"), h.can_meta_context("x-unknown:thing")], list(extents(h, 4096, 0))]
"""
    with NbdimgServer(image) as server:
        assert run_libnbd(script, uri=server.uri) == [[True, False], ["base:allocation"]]


# Commands


@REPLY_STYLES
def test_every_command_works_with_each_reply_style(tmp_path: Path, style: str) -> None:
    image = tmp_path / "disk.img"
    expected = bytearray(write_full(image, MIB))
    script = """
h = nbd.NBD()
set_reply_style(h, style)
h.connect_uri(uri)
before = digest(h.pread(h.get_size(), 0))
h.pwrite(random_bytes(7, 70001), 12345)
h.zero(50000, 200001)
h.zero(50000, 300001, nbd.CMD_FLAG_NO_HOLE)
h.trim(65536, 524288)
h.cache(65536, 0)
h.flush()
result = {
    "style": reply_style(h),
    "can_df": h.can_df(),
    "before": before,
    "after": digest(h.pread(h.get_size(), 0)),
}
h.shutdown()
"""
    before = digest(expected)
    expected[12345 : 12345 + 70001] = random_bytes(7, 70001)
    expected[200001:250001] = bytes(50000)
    expected[300001:350001] = bytes(50000)
    expected[524288 : 524288 + 65536] = bytes(65536)
    with NbdimgServer(image) as server:
        assert run_libnbd(script, uri=server.uri, style=style) == {
            "style": style,
            "can_df": style != "simple",
            "before": before,
            "after": digest(expected),
        }
    assert first_difference(image, expected) is None


def test_extended_headers_allow_requests_beyond_4_gib(tmp_path: Path) -> None:
    image, size = tmp_path / "disk.img", 9 * 1024**3
    with open(image, "wb") as file:
        file.truncate(size)
        file.seek(6 * 1024**3)
        file.write(b"x" * 8192)
    script = """
h = nbd.NBD()
set_reply_style(h, "extended")
h.add_meta_context("base:allocation")
h.connect_uri(uri)
found = extents(h, h.get_size(), 0)["base:allocation"]
h.zero(5 << 30, (1 << 30) + (1 << 12))
result = {"style": reply_style(h), "extents": found, "zeroed": h.pread(8192, 6 << 30).count(0)}
h.trim(9 << 30, 0)
result["trimmed"] = extents(h, h.get_size(), 0)["base:allocation"]
h.shutdown()
"""
    with NbdimgServer(image) as server:
        found = run_libnbd(script, uri=server.uri)
    # 1 GiB + 4 KiB and 5 GiB end at 6 GiB + 4 KiB: one of the two blocks that were written is zeroed.
    assert found == {
        "style": "extended",
        "extents": [[6 * 1024**3, 3], [8192, 0], [3 * 1024**3 - 8192, 3]],
        "zeroed": 4096,
        "trimmed": [[size, 3]],
    }


@REPLY_STYLES
def test_payload_of_64_mib_is_written_and_read_whole(tmp_path: Path, style: str) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image, size=PAYLOAD_MAX + MIB, data=())
    script = """
h = nbd.NBD()
set_lenient(h)
set_reply_style(h, style)
h.connect_uri(uri)
assert reply_style(h) == style
h.pwrite(random_bytes(64, length), 4097)
result = digest(h.pread(length, 4097))
h.shutdown()
"""
    payload = random_bytes(64, PAYLOAD_MAX)
    with NbdimgServer(image) as server:
        assert run_libnbd(script, uri=server.uri, style=style, length=PAYLOAD_MAX) == digest(payload)
    expected = bytes(4097) + payload + bytes(MIB - 4097)
    assert first_difference(image, expected) is None


# Requests that are wrong, and the answers that the specification wants

WRONG_ON_ANY_EXPORT = {
    "read across the end": ("h.pread(512, size - 256)", "EINVAL"),
    "read at the end": ("h.pread(1, size)", "EINVAL"),
    "read across 2^64": ("h.pread(1024, 2**64 - 512)", "EINVAL"),
    "cache across the end": ("h.cache(512, size - 256)", "EINVAL"),
    "block status across the end": ("extents(h, 512, size - 256)", "EINVAL"),
    "block status of nothing": ("extents(h, 0, 0)", "EINVAL"),
    "read with an unknown flag": ("h.pread(512, 0, 1 << 9)", "EINVAL"),
    "read with a flag of write zeroes": ("h.pread(512, 0, nbd.CMD_FLAG_NO_HOLE)", "EINVAL"),
    "read with a flag of block status": ("h.pread(512, 0, nbd.CMD_FLAG_REQ_ONE)", "EINVAL"),
    "flush with an unknown flag": ("h.flush(1 << 9)", "EINVAL"),
    "cache with an unknown flag": ("h.cache(512, 0, 1 << 9)", "EINVAL"),
    "block status with an unknown flag": ("extents(h, 512, 0, 1 << 9)", "EINVAL"),
}
WRONG_ON_WRITABLE_EXPORT = {
    "write across the end": ("h.pwrite(bytes(512), size - 256)", "ENOSPC"),
    "write at the end": ("h.pwrite(bytes(1), size)", "ENOSPC"),
    "write across 2^64": ("h.pwrite(bytes(1024), 2**64 - 512)", "ENOSPC"),
    "zeroes across the end": ("h.zero(512, size - 256)", "ENOSPC"),
    "zeroes across 2^64": ("h.zero(1024, 2**64 - 512)", "ENOSPC"),
    "trim across the end": ("h.trim(512, size - 256)", "EINVAL"),
    "write with an unknown flag": ("h.pwrite(bytes(512), 0, 1 << 9)", "EINVAL"),
    "write with a flag of read": ("h.pwrite(bytes(512), 0, nbd.CMD_FLAG_DF)", "EINVAL"),
    "zeroes with an unknown flag": ("h.zero(512, 0, 1 << 9)", "EINVAL"),
    "trim with an unknown flag": ("h.trim(512, 0, 1 << 9)", "EINVAL"),
    "trim with a flag of write zeroes": ("h.trim(512, 0, nbd.CMD_FLAG_FAST_ZERO)", "EINVAL"),
}
FORBIDDEN_ON_READ_ONLY_EXPORT = {
    "write": ("h.pwrite(bytes(512), 0)", "EPERM"),
    "zeroes": ("h.zero(512, 0)", "EPERM"),
    "trim": ("h.trim(512, 0)", "EPERM"),
}

# Each request is followed by a read of known bytes: the connection must survive and stay in step.
WRONG_REQUESTS_SCRIPT = """
h = nbd.NBD()
set_lenient(h)
set_reply_style(h, style)
h.add_meta_context("base:allocation")
h.connect_uri(uri)
assert reply_style(h) == style
size = h.get_size()
result = {}
for name, call in calls.items():
    answer = outcome(lambda: eval(call))
    assert digest(h.pread(4096, 4096)) == wanted, name
    result[name] = answer
"""


@pytest.mark.parametrize(
    ("options", "requests"),
    [
        ([], WRONG_ON_ANY_EXPORT | WRONG_ON_WRITABLE_EXPORT),
        (["--read-only"], WRONG_ON_ANY_EXPORT | FORBIDDEN_ON_READ_ONLY_EXPORT),
    ],
    ids=["writable", "read-only"],
)
@REPLY_STYLES
def test_wrong_requests_get_their_error_and_the_connection_goes_on(
    tmp_path: Path, options: list[str], requests: dict[str, tuple[str, str]], style: str
) -> None:
    image = tmp_path / "disk.img"
    expected = write_full(image, MIB)
    # Without structured replies there are no contexts, and libnbd does not even send a block status.
    requests = {name: r for name, r in requests.items() if style != "simple" or not r[0].startswith("extents")}
    with NbdimgServer(image, options=options) as server:
        answers = run_libnbd(
            WRONG_REQUESTS_SCRIPT,
            uri=server.uri,
            style=style,
            calls={name: call for name, (call, _) in requests.items()},
            wanted=digest(expected[4096:8192]),
        )
    assert answers == {name: error for name, (_, error) in requests.items()}
    assert first_difference(image, expected) is None


def test_read_with_df_without_structured_replies_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    expected = write_full(image, MIB)
    with NbdimgServer(image) as server:
        answers = run_libnbd(
            WRONG_REQUESTS_SCRIPT,
            uri=server.uri,
            style="simple",
            calls={"df": "h.pread(512, 0, nbd.CMD_FLAG_DF)"},
            wanted=digest(expected[4096:8192]),
        )
    assert answers == {"df": "EINVAL"}


def test_zero_length_requests_change_nothing_and_keep_the_connection(tmp_path: Path) -> None:
    """Spec: proto.md leaves the answer open, but the server SHOULD NOT disconnect."""
    image = tmp_path / "disk.img"
    expected = write_full(image, MIB)
    calls = ["h.pread(0, 0)", "h.pwrite(b'', 0)", "h.zero(0, 0)", "h.trim(0, 0)", "h.cache(0, 0)", "h.pread(0, size)"]
    with NbdimgServer(image) as server:
        answers = run_libnbd(
            WRONG_REQUESTS_SCRIPT,
            uri=server.uri,
            style="structured",
            calls={call: call for call in calls},
            wanted=digest(expected[4096:8192]),
        )
    assert set(answers) == set(calls)
    assert set(answers.values()) <= {"ok", "EINVAL"}
    assert first_difference(image, expected) is None


# Block status and structured reads of a known layout


def test_block_status_describes_the_holes_of_the_file(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    holes = [[length, 0 if is_data else STATE_HOLE_AND_ZERO] for _, length, is_data in file_extents(image)]
    script = """
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:allocation-depth")
h.connect_uri(uri)
result = extents(h, h.get_size(), 0)
"""
    with NbdimgServer(image, options=["--read-only"]) as server:
        found = run_libnbd(script, uri=server.uri)
    assert found == {"base:allocation": holes, "qemu:allocation-depth": [[SPARSE_SIZE, 1]]}


def test_block_status_of_a_part_starts_at_its_offset(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    script = """
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(uri)
found = extents(h, 2 << 20, 4097)["base:allocation"]
# Only the last extent may go beyond the request.
assert sum(length for length, _ in found[:-1]) < 2 << 20 <= sum(length for length, _ in found)
result = found[:-1]
"""
    with NbdimgServer(image, options=["--read-only"]) as server:
        found = run_libnbd(script, uri=server.uri)
    assert found == [[64 * KIB - 4097, 0], [MIB - 64 * KIB, 3], [4 * KIB, 0]]


def test_block_status_with_req_one_is_one_extent_within_the_request(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    requests = [
        (0, SPARSE_SIZE),
        (0, 512),
        (64 * KIB, MIB),
        (MIB - 1, 2),
        (3 * MIB + 5, 100 * KIB),
        (SPARSE_SIZE - 1, 1),
    ]
    script = """
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(uri)
result = [extents(h, length, offset, nbd.CMD_FLAG_REQ_ONE)["base:allocation"] for offset, length in requests]
"""
    with NbdimgServer(image, options=["--read-only"]) as server:
        found = run_libnbd(script, uri=server.uri, requests=requests)
    assert found == [[[64 * KIB, 0]], [[512, 0]], [[MIB - 64 * KIB, 3]], [[1, 3]], [[100 * KIB, 0]], [[1, 0]]]


def test_structured_read_of_a_sparse_range_sends_holes_as_holes(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    expected = write_sparse(image)
    script = """
h = nbd.NBD()
h.connect_uri(uri)
data, seen = chunks(h, 4 << 20, 0)
result = [digest(data), sorted(seen)]
"""
    with NbdimgServer(image, options=["--read-only"]) as server:
        found_digest, seen = run_libnbd(script, uri=server.uri)
    assert found_digest == digest(expected[: 4 * MIB])
    stop = 0
    for offset, length, _ in seen:
        assert offset == stop
        stop += length
    assert stop == 4 * MIB
    hole_bytes = sum(length for offset, length, kind in seen if kind == "hole")
    assert hole_bytes == sum(
        length for offset, length, data in file_extents(image) if not data and offset < 3 * MIB
    ) + (4 * MIB - (3 * MIB + 204 * KIB))


def test_structured_read_with_df_is_one_chunk(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    expected = write_sparse(image)
    requests = [(0, 64 * KIB), (32 * KIB, 64 * KIB), (256 * KIB, 64 * KIB), (MIB - 1, 4098)]
    script = """
h = nbd.NBD()
h.connect_uri(uri)
result = []
for offset, length in requests:
    data, seen = chunks(h, length, offset, nbd.CMD_FLAG_DF)
    result.append([digest(data), [[start, size] for start, size, kind in seen]])
"""
    with NbdimgServer(image, options=["--read-only"]) as server:
        found = run_libnbd(script, uri=server.uri, requests=requests)
    assert found == [[digest(expected[o : o + n]), [[o, n]]] for o, n in requests]


# FUA


def test_fua_is_accepted_on_every_command(tmp_path: Path) -> None:
    """Spec: proto.md "NBD_CMD_FLAG_FUA": a server that offers it MUST accept it on every command."""
    image = tmp_path / "disk.img"
    write_sparse(image)
    calls = ["h.pread(512, 0, fua)", "h.pwrite(bytes(512), 0, fua)", "h.zero(512, 0, fua)", "h.trim(4096, 0, fua)"]
    calls += ["h.cache(512, 0, fua)", "h.flush(fua)", "extents(h, 512, 0, fua)"]
    script = """
h = nbd.NBD()
set_lenient(h)
h.add_meta_context("base:allocation")
h.connect_uri(uri)
fua = nbd.CMD_FLAG_FUA
result = {call: outcome(lambda: eval(call)) for call in calls}
"""
    with NbdimgServer(image) as server:
        assert run_libnbd(script, uri=server.uri, calls=calls) == dict.fromkeys(calls, "ok")


def test_fua_and_flush_reply_after_the_file_was_synced(tmp_path: Path) -> None:
    """The plain write is the control: without FUA no system call makes it durable before its reply."""
    strace, image, log = require_program("strace"), tmp_path / "disk.img", tmp_path / "strace.log"
    write_full(image, MIB)
    program = [strace, "-D", "-f", "-qq", "-o", str(log), "-e", "trace=fdatasync,fsync,sync_file_range,pwritev2,openat"]
    script = r"""
import re
DONE = re.compile(r"(?:fdatasync|fsync)(?:\(\d+\)| resumed>\)) += 0|RWF_D?SYNC")

def syncs():
    with open(log) as file:
        return len(DONE.findall(file.read()))

h = nbd.NBD()
h.connect_uri(uri)
fua = nbd.CMD_FLAG_FUA
result = {}
for name, call in calls.items():
    before = syncs()
    eval(call)
    result[name] = syncs() > before
"""
    calls = {
        "plain write": "h.pwrite(bytes(4096), 0)",
        "write": "h.pwrite(bytes(4096), 4096, fua)",
        "plain zeroes": "h.zero(4096, 8192)",
        "zeroes": "h.zero(4096, 12288, fua)",
        "trim": "h.trim(4096, 16384, fua)",
        "write before flush": "h.pwrite(bytes(4096), 0)",
        "flush": "h.flush()",
    }
    with NbdimgServer(image, program=[*program, sys.executable, "-m", "nbdimg"]) as server:
        found = run_libnbd(script, uri=server.uri, log=str(log), calls=calls)
    assert re.search(r"disk\.img", log.read_text()), "strace did not follow the server"
    assert found == {name: name not in {"plain write", "plain zeroes", "write before flush"} for name in calls}


# Many requests at once

LOAD_SCRIPT = "result = parallel_load(nbd, uri, **load)"


def test_load_of_64_requests_on_8_connections_matches_the_shadow(tmp_path: Path) -> None:
    image, size = tmp_path / "disk.img", 64 * MIB
    write_sparse(image, size=size, data=())
    load = {"size": size, "connections": 8, "in_flight": 64, "requests": 6000, "length_max": 16 * KIB, "seed": 20260702}
    with NbdimgServer(image) as server:
        found = run_libnbd(LOAD_SCRIPT, uri=server.uri, load=load)
    assert found["mismatches"] == [], load
    assert found["in_flight_max"] == 8 * 64
    assert sum(found["completed"].values()) == 6000
    assert digest(image.read_bytes()) == found["digest"]


def test_load_against_a_wrong_shadow_reports_mismatches(tmp_path: Path) -> None:
    """The control of the load: its shadow says ones where the image holds zeroes."""
    image = tmp_path / "disk.img"
    write_sparse(image, size=MIB, data=())
    load = {"size": MIB, "connections": 2, "in_flight": 4, "requests": 100, "length_max": KIB, "seed": 1}
    with NbdimgServer(image) as server:
        found = run_libnbd(LOAD_SCRIPT, uri=server.uri, load=load | {"spoil_shadow": True})
    assert found["mismatches"]
    assert digest(image.read_bytes()) != found["digest"]


# A larger minimum block size


def test_unaligned_requests_of_a_client_that_never_asked_keep_neighbours_intact(tmp_path: Path) -> None:
    """Like the kernel's client, which never asks for the block size: read-modify-write, or refuse; never corrupt."""
    image = tmp_path / "disk.img"
    expected = bytearray(write_full(image, MIB))
    script = """
h = nbd.NBD()
h.set_request_block_size(False)
h.connect_uri(uri)
reads = []
for index, (offset, length) in enumerate(writes):
    h.pwrite(random_bytes(index, length), offset)
    reads.append(digest(h.pread(length + 2, offset - 1)))
for offset, length in zeroes:
    h.zero(length, offset)
    reads.append(digest(h.pread(length + 2, offset - 1)))
result = reads
h.shutdown()
"""
    writes = [(1, 1), (4000, 200), (4095, 4098), (65536, 512), (100_001, 65_537), (MIB - 513, 511)]
    zeroes = [(8193, 1), (20_000, 10_000), (200_704, 4096 + 17)]
    reads = []
    for index, (offset, length) in enumerate(writes):
        expected[offset : offset + length] = random_bytes(index, length)
        reads.append(digest(expected[offset - 1 : offset + length + 1]))
    for offset, length in zeroes:
        expected[offset : offset + length] = bytes(length)
        reads.append(digest(expected[offset - 1 : offset + length + 1]))
    with NbdimgServer(image, options=["--min-block-size", "4096"]) as server:
        assert run_libnbd(script, uri=server.uri, writes=writes, zeroes=zeroes) == reads
    assert first_difference(image, expected) is None


def test_unaligned_load_within_shared_blocks_loses_no_update(tmp_path: Path) -> None:
    """Requests to different bytes of one 4096-byte block, at once on 4 connections: each must survive the others."""
    image, size = tmp_path / "disk.img", 128 * KIB
    write_sparse(image, size=size, data=())
    load = {"size": size, "connections": 4, "in_flight": 16, "requests": 3000, "length_max": 700, "seed": 20260703}
    with NbdimgServer(image, options=["--min-block-size", "4096"]) as server:
        found = run_libnbd(LOAD_SCRIPT, uri=server.uri, load=load | {"negotiate_block_size": False})
    assert found["mismatches"] == [], load
    assert digest(image.read_bytes()) == found["digest"]


def test_unaligned_requests_of_a_client_that_asked_are_refused(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    expected = write_full(image, MIB)
    calls = ["h.pread(512, 0)", "h.pread(4096, 512)", "h.pwrite(bytes(100), 4096)", "h.zero(4096, 1)", "h.trim(1, 0)"]
    with NbdimgServer(image, options=["--min-block-size", "4096"]) as server:
        answers = run_libnbd(
            WRONG_REQUESTS_SCRIPT,
            uri=server.uri,
            style="structured",
            calls={call: call for call in calls},
            wanted=digest(expected[4096:8192]),
        )
    assert answers == dict.fromkeys(calls, "EINVAL")
    assert first_difference(image, expected) is None
