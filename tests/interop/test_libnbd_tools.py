"""libnbd's tools and fio's nbd engine as clients: what nbdinfo reports, what nbdcopy moves, what fio verifies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.interop.samples import (
    KIB,
    MIB,
    SPARSE_SIZE,
    allocated_bytes,
    file_extents,
    first_difference,
    flip_byte,
    run,
    run_ok,
    write_full,
    write_sparse,
)
from tests.support.peers import require_program
from tests.support.server import NbdimgServer

STATE_HOLE_AND_ZERO = 3  # base:allocation, NBD_STATE_HOLE | NBD_STATE_ZERO
NBDINFO_FALSE = 2  # the exit status of --can and --is for "no"; 1 is a failure

WRITABLE = {"write", "trim", "zero", "fast-zero"}
EITHER_WAY = {"connect", "read", "cache", "df", "flush", "fua", "multi-conn", "structured-reply"}


def nbdinfo_json(uri: str, *options: str) -> Any:
    return json.loads(run_ok(require_program("nbdinfo"), "--json", *options, uri))


def nbdinfo_map(uri: str, context: str) -> list[tuple[int, int, int]]:
    """(offset, length, type) of `nbdinfo --map=CONTEXT`; checks that the extents follow one another."""
    extents = [(entry["offset"], entry["length"], entry["type"]) for entry in nbdinfo_json(uri, f"--map={context}")]
    stop = 0
    for offset, length, _ in extents:
        assert offset == stop
        stop = offset + length
    return extents


# nbdinfo


def test_nbdinfo_json_reports_every_feature_of_a_writable_export(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    with NbdimgServer(image) as server:
        info = nbdinfo_json(server.uri)
    (export,) = info["exports"]
    assert (info["protocol"], info["TLS"], info["structured"]) == ("newstyle-fixed", False, True)
    assert (export["export-name"], export["export-size"]) == ("disk", SPARSE_SIZE)
    assert {"base:allocation", "qemu:allocation-depth"} <= set(export["contexts"])
    wanted = {
        "is_rotational": False,
        "is_read_only": False,
        **{f"can_{name.replace('-', '_')}": True for name in WRITABLE - {"write"}},
        "can_cache": True,
        "can_df": True,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
    }
    assert {key: export.get(key) for key in wanted} == wanted
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] == 4096
    assert export["block_size_maximum"] == 64 * MIB


def test_nbdinfo_json_reports_block_size_that_was_configured(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    with NbdimgServer(image, options=["--min-block-size", "4096"]) as server:
        (export,) = nbdinfo_json(server.uri)["exports"]
    assert (export["block_size_minimum"], export["block_size_preferred"]) == (4096, 4096)


def test_nbdinfo_json_reports_description(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    with NbdimgServer(image, options=["--description", "Böot disk of “alpha”"]) as server:
        (export,) = nbdinfo_json(server.uri)["exports"]
    assert export["description"] == "Böot disk of “alpha”"


@pytest.mark.parametrize("size", [512, 4 * KIB + 1, MIB + 100, 5 * 1024**4])
def test_nbdinfo_size_is_the_size_of_the_file(tmp_path: Path, size: int) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image, data=(), size=0)
    with open(image, "r+b") as file:
        file.truncate(size)
    with NbdimgServer(image, options=["--read-only"]) as server:
        assert int(run_ok(require_program("nbdinfo"), "--size", server.uri)) == size


def test_nbdinfo_list_reports_every_export_of_a_server(tmp_path: Path) -> None:
    images = [tmp_path / "alpha.img", tmp_path / "beta.img"]
    for index, image in enumerate(images):
        write_sparse(image, size=(index + 1) * MIB, data=())
    with NbdimgServer(images[0], f"second={images[1]}") as server:
        exports = nbdinfo_json(f"nbd+unix:///?socket={server.socket_path}", "--list")["exports"]
    assert {e["export-name"]: e["export-size"] for e in exports} == {"alpha": MIB, "second": 2 * MIB}


@pytest.mark.parametrize("feature", sorted(WRITABLE | EITHER_WAY))
@pytest.mark.parametrize("mode", ["writable", "read-only"])
def test_nbdinfo_can_agrees_with_the_mode_of_the_export(tmp_path: Path, mode: str, feature: str) -> None:
    nbdinfo, image = require_program("nbdinfo"), tmp_path / "disk.img"
    write_sparse(image, size=MIB, data=())
    with NbdimgServer(image, options=["--read-only"] if mode == "read-only" else []) as server:
        status = run(nbdinfo, "--can", feature, server.uri).returncode
    assert status == (NBDINFO_FALSE if mode == "read-only" and feature in WRITABLE else 0)


@pytest.mark.parametrize("mode", ["writable", "read-only"])
def test_nbdinfo_is_agrees_with_the_mode_of_the_export(tmp_path: Path, mode: str) -> None:
    nbdinfo, image = require_program("nbdinfo"), tmp_path / "disk.img"
    write_sparse(image, size=MIB, data=())
    with NbdimgServer(image, options=["--read-only"] if mode == "read-only" else []) as server:
        found = {name: run(nbdinfo, "--is", name, server.uri).returncode for name in ("read-only", "rotational", "tls")}
    assert found == {
        "read-only": 0 if mode == "read-only" else NBDINFO_FALSE,
        "rotational": NBDINFO_FALSE,
        "tls": NBDINFO_FALSE,
    }


def test_nbdinfo_map_agrees_with_holes_of_the_file(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    holes = [(offset, n, 0 if is_data else STATE_HOLE_AND_ZERO) for offset, n, is_data in file_extents(image)]
    assert len(holes) == 7
    with NbdimgServer(image, options=["--read-only"]) as server:
        assert nbdinfo_map(server.uri, "base:allocation") == holes


def test_nbdinfo_map_of_an_image_beyond_4_gib_is_complete(tmp_path: Path) -> None:
    """Neither the extents nor the requests of libnbd before 1.18 can describe 4 GiB at once."""
    image, size, lone = tmp_path / "disk.img", 9 * 1024**3, 5 * 1024**3
    with open(image, "wb") as file:
        file.truncate(size)
        file.seek(lone)
        file.write(b"x" * 4096)
    with NbdimgServer(image, options=["--read-only"]) as server:
        extents = nbdinfo_map(server.uri, "base:allocation")
    assert [e for e in extents if e[2] == 0] == [(lone, 4096, 0)]
    assert sum(length for _, length, kind in extents if kind == STATE_HOLE_AND_ZERO) == size - 4096


def test_nbdinfo_map_of_allocation_depth_of_a_raw_image_is_one_everywhere(tmp_path: Path) -> None:
    """Like qemu-nbd: a raw image has no backing file, so its holes are its own too."""
    image = tmp_path / "disk.img"
    write_sparse(image)
    with NbdimgServer(image, options=["--read-only"]) as server:
        extents = nbdinfo_map(server.uri, "qemu:allocation-depth")
    assert {kind for _, _, kind in extents} == {1}
    assert sum(length for _, length, _ in extents) == SPARSE_SIZE


# nbdcopy


def nbdcopy(source: str | Path, target: str | Path) -> None:
    """Copy over 4 connections with 4 threads, and make sure that nbdcopy did so."""
    words = [require_program("nbdcopy"), "-v", "--connections=4", "--threads=4", "--requests=16", source, target]
    completed = run(*words)
    assert completed.returncode == 0, completed.stderr[-4000:]
    assert "connections=4 requests=16 threads=4" in completed.stderr


def test_nbdcopy_from_export_copies_bytes_and_holes(tmp_path: Path) -> None:
    image, copy = tmp_path / "disk.img", tmp_path / "copy.img"
    expected = write_sparse(image)
    with NbdimgServer(image, options=["--read-only"]) as server:
        nbdcopy(server.uri, copy)
    assert first_difference(copy, expected) is None
    assert allocated_bytes(copy) <= allocated_bytes(image)


def test_nbdcopy_to_export_replaces_every_byte_and_frees_holes(tmp_path: Path) -> None:
    source, image = tmp_path / "source.img", tmp_path / "disk.img"
    expected = write_sparse(source)
    write_full(image, SPARSE_SIZE)
    with NbdimgServer(image) as server:
        nbdcopy(source, server.uri)
    assert first_difference(image, expected) is None
    assert allocated_bytes(image) <= SPARSE_SIZE // 4


def test_nbdcopy_to_empty_export_stays_sparse(tmp_path: Path) -> None:
    source, image = tmp_path / "source.img", tmp_path / "disk.img"
    expected = write_sparse(source)
    write_sparse(image, data=())
    with NbdimgServer(image) as server:
        nbdcopy(source, server.uri)
    assert first_difference(image, expected) is None
    assert allocated_bytes(image) <= allocated_bytes(source) + 64 * KIB


def test_nbdcopy_between_two_exports_of_one_server_copies_every_byte(tmp_path: Path) -> None:
    source, target = tmp_path / "source.img", tmp_path / "target.img"
    expected = write_full(source, SPARSE_SIZE)
    write_sparse(target, data=())
    with NbdimgServer(source, target) as server:
        nbdcopy(server.uris[0], server.uris[1])
    assert first_difference(target, expected) is None
    assert first_difference(source, expected) is None


# fio

VERIFY_JOBS = 4
VERIFY_SIZE = 4 * MIB
TRIM_OFFSET = VERIFY_JOBS * VERIFY_SIZE
IMAGE_SIZE = TRIM_OFFSET + VERIFY_SIZE


def fio(directory: Path, uri: str, *options: str, jobs: str = "") -> tuple[int, list[dict[str, Any]]]:
    """Run fio's nbd engine: `VERIFY_JOBS` connections that write and verify their own regions, and further `jobs`.

    Returns the exit status and the report of each job.
    """
    script, report = directory / "jobs.fio", directory / "report.json"
    script.write_text(
        f"[global]\nioengine=nbd\nuri={uri}\nbs=4k\niodepth=16\nrandseed=20260701\n"
        f"[verify]\nrw=randwrite\nsize={VERIFY_SIZE}\noffset_increment={VERIFY_SIZE}\nnumjobs={VERIFY_JOBS}\n"
        f"verify=crc32c\nverify_fatal=1\n{jobs}"
    )
    completed = run(
        require_program("fio"), *options, "--output-format=json", f"--output={report}", script, cwd=directory
    )
    return completed.returncode, json.loads(report.read_text())["jobs"] if completed.returncode == 0 else []


def test_fio_writes_on_four_connections_verify_beside_trims(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    original = write_full(image, IMAGE_SIZE)
    trims = f"[trims]\nrw=randtrim\noffset={TRIM_OFFSET}\nsize={VERIFY_SIZE // 2}\n"
    with NbdimgServer(image) as server:
        status, jobs = fio(tmp_path, server.uri, jobs=trims)
    assert status == 0
    verified, trimmed = jobs[:VERIFY_JOBS], jobs[VERIFY_JOBS]
    blocks = VERIFY_SIZE // (4 * KIB)
    assert [(job["error"], job["read"]["total_ios"], job["write"]["total_ios"]) for job in verified] == (
        [(0, blocks, blocks)] * VERIFY_JOBS
    )
    assert (trimmed["error"], trimmed["trim"]["total_ios"]) == (0, blocks // 2)
    # Every block of the trimmed half was discarded, and nothing beyond it was touched.
    tail = image.read_bytes()[TRIM_OFFSET:]
    assert tail[: VERIFY_SIZE // 2] == bytes(VERIFY_SIZE // 2)
    assert tail[VERIFY_SIZE // 2 :] == original[TRIM_OFFSET + VERIFY_SIZE // 2 :]


@pytest.mark.parametrize("spoiled", [False, True], ids=["intact", "one-byte-flipped"])
def test_fio_verifies_after_a_restart_unless_a_byte_was_flipped(tmp_path: Path, spoiled: bool) -> None:
    """The flipped byte is the control of fio's verification."""
    image = tmp_path / "disk.img"
    write_sparse(image, size=IMAGE_SIZE, data=())
    with NbdimgServer(image) as server:
        status, _ = fio(tmp_path, server.uri, "--do_verify=0")
        assert status == 0
    if spoiled:
        flip_byte(image, 6 * MIB + 2000)
    with NbdimgServer(image) as server:
        status, _ = fio(tmp_path, server.uri, "--verify_only=1")
    assert (status != 0) is spoiled
