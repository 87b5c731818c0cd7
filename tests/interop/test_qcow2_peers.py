"""qcow2 images of qemu-img's making, served by nbdimg: QEMU's and libnbd's tools see what QEMU itself sees in them.

Deliberate differences to qemu-nbd's block status: a zero cluster that keeps its space is a hole here too, for qemu-nbd
it is `zero` without `hole`. Zeroes behind the end of a short backing file belong to nobody here (depth 0), to qemu-nbd
they belong to the file that is short.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.interop.samples import KIB, MIB, allocated_bytes, first_difference, run, run_ok, write_sparse
from tests.support.peers import require_program
from tests.support.qcow2edit import make_luks, qemu_check, qemu_img, qemu_io
from tests.support.server import NbdimgServer, PeerServer

SIZE = 4 * MIB
WRITES = (
    "write -q -P 1 0 40k",
    "write -q -P 2 3M 9k",
    "write -q -z 2M 64k",
    "write -q -P 3 100k 512",
    "write -q -P 4 1000k 200k",
    "write -q -z -u 1M 16k",
    "discard -q 24k 8k",
)


def _plain(options: str, size: int = SIZE) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))
        qemu_io(path, *WRITES)

    return make


def _compressed(options: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        source = path.with_suffix(".source")
        pattern = b"".join(bytes([index % 251]) * 700 + bytes(range(256)) for index in range(2000))
        source.write_bytes(pattern.ljust(SIZE, b"\0"))
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source, path)
        qemu_io(path, "write -q -P 9 64k 4k", "discard -q 128k 64k")

    return make


def _chain(*layers: tuple[str, str, int]) -> Callable[[Path], None]:
    """(format, options, size) from the lowest up; each layer writes some of the disk."""

    def make(path: Path) -> None:
        below: tuple[str, str] | None = None
        for number, (form, options, size) in enumerate(layers):
            is_top = number == len(layers) - 1
            name = path.name if is_top else f"{path.stem}-{number}"
            more = ("-o", options) if options else ()
            under = ("-b", below[0], "-F", below[1]) if below else ()
            layer = path.parent / name
            qemu_img("create", "-q", "-f", form, *more, *under, layer, str(size))
            writes = [f"write -q -P {16 * number + n + 1} {n * 700 + number * 96}k 70k" for n in range(4)]
            if below:
                writes.append(f"write -q -z {200 + 64 * number}k 64k")
            fitting = [each for each in writes if int(each.split()[-2][:-1]) * KIB + 70 * KIB <= size]
            qemu_io(layer, *fitting, options=("-f", form))
            below = name, form

    return make


def _snapshots(options: str, first_size: int = MIB) -> Callable[[Path], None]:
    """The disk grows after the first of two snapshots; with version 2 qemu-img does not do that."""

    def make(path: Path) -> None:
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(first_size))
        qemu_io(path, "write -q -P 1 0 300k")
        qemu_img("snapshot", "-c", "one", path)
        if first_size != SIZE:
            qemu_img("resize", "-q", path, str(SIZE))
        qemu_io(path, "write -q -P 2 100k 100k", "write -q -P 3 3M 64k", "discard -q 0 64k")
        qemu_img("snapshot", "-c", "two", path)
        qemu_io(path, "write -q -P 4 150k 100k")

    return make


def _data_file(options: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        data = path.with_suffix(".data")
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data}{options}", path, str(SIZE))
        qemu_io(path, *WRITES)

    return make


GRID: dict[str, Callable[[Path], None]] = {
    "v2": _plain("compat=0.10"),
    "v3": _plain("compat=1.1"),
    **{f"cluster-{size}": _plain(f"cluster_size={size}") for size in ("512", "1k", "4k", "32k", "256k", "2M")},
    **{f"refcount-{bits}": _plain(f"cluster_size=4k,refcount_bits={bits}") for bits in (1, 2, 4, 8, 32, 64)},
    "odd-size": _plain("cluster_size=64k", 3 * MIB + 200 * KIB + 512),
    "extended": _plain("extended_l2=on,cluster_size=64k"),
    "extended-16k": _plain("extended_l2=on,cluster_size=16k"),
    "lazy": _plain("lazy_refcounts=on"),
    **{f"preallocation-{kind}": _plain(f"preallocation={kind}") for kind in ("metadata", "falloc", "full")},
    "preallocation-extended": _plain("preallocation=metadata,extended_l2=on"),
    "zlib": _compressed("cluster_size=64k"),
    "zstd": _compressed("compression_type=zstd,cluster_size=4k"),
    "zlib-extended": _compressed("extended_l2=on,cluster_size=16k"),
    "zstd-2M": _compressed("compression_type=zstd,cluster_size=2M"),
    "data-file": _data_file(""),
    "data-file-raw": _data_file(",data_file_raw=on"),
    "backing-raw-short": _chain(("raw", "", 1 * MIB + 4608), ("qcow2", "cluster_size=4k", SIZE)),
    "backing-raw-long": _chain(("raw", "", 6 * MIB), ("qcow2", "", SIZE)),
    "backing-qcow2": _chain(("qcow2", "cluster_size=512", SIZE), ("qcow2", "cluster_size=64k", SIZE)),
    "backing-v2": _chain(("qcow2", "compat=0.10", SIZE), ("qcow2", "compat=0.10,cluster_size=4k", SIZE)),
    "backing-extended": _chain(("qcow2", "", SIZE), ("qcow2", "extended_l2=on", SIZE)),
    "chain-3": _chain(
        ("raw", "", 2 * MIB),
        ("qcow2", "cluster_size=4k", 3 * MIB),
        ("qcow2", "extended_l2=on", SIZE),
        ("qcow2", "", SIZE),
    ),
    "snapshots": _snapshots("cluster_size=4k"),
    "snapshots-v2": _snapshots("compat=0.10", SIZE),
    "snapshots-extended": _snapshots("extended_l2=on"),
}


HAS_SHORT_BACKING = {"backing-raw-short", "chain-3"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of each kind."""
    made = tmp_path_factory.mktemp("grid")
    for name, make in GRID.items():
        make(made / f"{name}.qcow2")
    return made


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[NbdimgServer]:
    """All of them behind one socket, read-only; an export is named as its image."""
    images = [directory / f"{name}.qcow2" for name in GRID]
    with NbdimgServer(*images, options=["--read-only"]) as server:
        yield server


def uri_of(server: NbdimgServer, export: str) -> str:
    return f"nbd+unix:///{export}?socket={server.socket_path}"


def compare(left: str | Path, left_format: str, right: str | Path, right_format: str = "raw") -> None:
    """Identical, but for zeroes behind the end of the shorter one."""
    run_ok(require_program("qemu-img"), "compare", "-f", left_format, "-F", right_format, left, right)


def contents_equal(left: str | Path, right: str | Path) -> None:
    run_ok(require_program("qemu-img"), "compare", "-f", "raw", "-F", "raw", left, right)


def info_map(uri: str, context: str = "base:allocation") -> list[tuple[int, int, int]]:
    """(offset, length, flags) of `nbdinfo --map`, equal neighbours merged."""
    merged: list[tuple[int, int, int]] = []
    for each in json.loads(run_ok(require_program("nbdinfo"), "--json", f"--map={context}", uri)):
        offset, length, kind = each["offset"], each["length"], each["type"]
        if merged and merged[-1][2] == kind:
            offset, length = merged[-1][0], merged.pop()[1] + length
        merged.append((offset, length, kind))
    return merged


@pytest.mark.parametrize("name", GRID)
def test_image_with_every_option_reads_as_qemu_img_converts_it(
    server: NbdimgServer, directory: Path, tmp_path: Path, name: str
) -> None:
    raw = tmp_path / "raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", directory / f"{name}.qcow2", raw)
    contents_equal(raw, uri_of(server, name))
    size = int(run_ok(require_program("nbdinfo"), "--size", uri_of(server, name)))
    assert size == raw.stat().st_size


@pytest.mark.parametrize("name", [name for name in GRID if name.startswith("snapshots")])
@pytest.mark.parametrize("snapshot", ["one", "two"])
def test_snapshot_reads_with_its_own_size_as_qemu_img_converts_it(
    server: NbdimgServer, directory: Path, tmp_path: Path, name: str, snapshot: str
) -> None:
    raw = tmp_path / "raw"
    image = directory / f"{name}.qcow2"
    qemu_img("convert", "-l", f"snapshot.name={snapshot}", "-f", "qcow2", "-O", "raw", image, raw)
    uri = uri_of(server, f"{name}%40{snapshot}")
    shown = int(run_ok(require_program("nbdinfo"), "--size", uri))
    assert shown == (MIB if snapshot == "one" and name != "snapshots-v2" else SIZE)
    contents_equal(raw, uri)


class Reference(PeerServer):
    def __init__(self, image: Path) -> None:
        program = require_program("qemu-nbd")
        super().__init__(lambda path: [program, "-t", "-e", "8", "-r", "-A", "-f", "qcow2", "-k", path, str(image)])
        self.uri = f"nbd+unix:///?socket={self.socket_path}"


@pytest.mark.parametrize("name", GRID)
def test_block_status_agrees_with_qemu_nbd(server: NbdimgServer, directory: Path, name: str) -> None:
    """What qemu-nbd says reads as zeroes does here, and nothing else; see this file's head for `hole`."""
    with Reference(directory / f"{name}.qcow2") as reference:
        expected, depths = info_map(reference.uri), info_map(reference.uri, "qemu:allocation-depth")
    found = info_map(uri_of(server, name))
    assert _bytes(found, lambda flags: bool(flags & 2)) >= _bytes(expected, lambda flags: bool(flags & 1 and flags & 2))
    if "prealloc" not in name and not name.startswith("data-file"):
        assert _where(found, lambda flags: bool(flags & 2)) == _where(expected, lambda flags: bool(flags & 2))
    found_depths = info_map(uri_of(server, name), "qemu:allocation-depth")
    if name in HAS_SHORT_BACKING:
        assert _sectors(found_depths)[: MIB // 512] == _sectors(depths)[: MIB // 512]
        differing = {pair for pair in zip(_sectors(found_depths), _sectors(depths), strict=True) if pair[0] != pair[1]}
        assert {ours for ours, _ in differing} == {0}
    else:
        assert found_depths == depths


def _sectors(extents: list[tuple[int, int, int]]) -> list[int]:
    """The flags of each sector."""
    return [flags for _, length, flags in extents for _ in range(length // 512)]


def _where(extents: list[tuple[int, int, int]], chosen: Callable[[int], bool]) -> list[tuple[int, int]]:
    """Start and end of the runs whose flags are chosen."""
    merged: list[tuple[int, int]] = []
    for offset, length, flags in extents:
        if chosen(flags):
            start = merged.pop()[0] if merged and merged[-1][1] == offset else offset
            merged.append((start, offset + length))
    return merged


def _bytes(extents: list[tuple[int, int, int]], chosen: Callable[[int], bool]) -> int:
    return sum(stop - start for start, stop in _where(extents, chosen))


def test_control_a_changed_byte_is_a_difference(server: NbdimgServer, directory: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", directory / "v3.qcow2", raw)
    qemu_io(raw, "write -q -P 0x77 1000k 512", options=("-f", "raw"))
    done = run(require_program("qemu-img"), "compare", "-f", "raw", "-F", "raw", raw, uri_of(server, "v3"))
    assert done.returncode == 1
    assert "mismatch" in done.stdout


def test_encrypted_image_reads_and_writes_with_its_key_file(tmp_path: Path) -> None:
    image, key, raw = tmp_path / "disk.qcow2", tmp_path / "key", tmp_path / "raw"
    key.write_text("key")
    encrypted = make_luks(image, SIZE, "write -q -P 1 0 100k", "write -q -P 2 3M 5k")
    with NbdimgServer(image, options=[f"--key-file={key}"]) as server:
        qemu_io(server.uri, "read -q -P 1 0 100k", "read -q -P 2 3M 5k", "read -q -P 0 1M 1M", options=("-f", "raw"))
        qemu_io(server.uri, "write -q -P 7 50k 20k", "write -q -P 8 2M 3k", "discard 0 16k", options=("-f", "raw"))
        qemu_img("convert", "-f", "raw", "-O", "raw", server.uri, raw)
    assert qemu_check(image).exit_status == 0
    run_ok(require_program("qemu-img"), "compare", *encrypted, f"driver=raw,file.filename={raw}")


# Through us, and then without us


WRITABLE = [name for name in GRID if name not in ("cluster-2M", "zstd-2M", "preallocation-full")]


@pytest.fixture(scope="module")
def written(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the images, changed by one qemu-io each through one server that has been stopped since; beside each
    the raw copy on which the same was done by qemu-io alone."""
    made = tmp_path_factory.mktemp("written")
    for each in directory.iterdir():
        if not each.name.startswith("data-file"):
            run_ok("cp", "--sparse=always", each, made)
    for name in WRITABLE:
        if name.startswith("data-file"):
            GRID[name](made / f"{name}.qcow2")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", made / f"{name}.qcow2", made / f"{name}.raw")
    with NbdimgServer(*(made / f"{name}.qcow2" for name in WRITABLE)) as server:
        for number, name in enumerate(WRITABLE):
            commands = _changes(number)
            qemu_io(uri_of(server, name), *commands, options=("-f", "raw"))
            qemu_io(made / f"{name}.raw", *commands, options=("-f", "raw"))
    return made


def _changes(seed: int) -> list[str]:
    generator = random.Random(seed)
    commands = []
    for _ in range(24):
        offset = generator.randrange(3 * MIB // 512) * 512
        length = generator.choice((512, 3072, 4096, 65536, 100 * KIB))
        kind = generator.choice(
            (f"-P {generator.randrange(1, 256)}", f"-P {generator.randrange(1, 256)}", "-z", "-z -u")
        )
        commands.append(f"write -q {kind} {offset} {length}")
    return [*commands, "flush", "write -q -P 99 7 1000"]


@pytest.mark.parametrize("name", WRITABLE)
def test_image_changed_through_us_is_sound_and_as_qemu_would_have_it(written: Path, name: str) -> None:
    report = qemu_check(written / f"{name}.qcow2")
    assert (report.exit_status, report.leaks, report.corruptions) == (0, 0, 0)
    compare(written / f"{name}.qcow2", "qcow2", written / f"{name}.raw")


@pytest.mark.parametrize("name", [name for name in WRITABLE if name.startswith("snapshots")])
@pytest.mark.parametrize("snapshot", ["one", "two"])
def test_snapshot_of_image_changed_through_us_is_what_it_was(
    directory: Path, written: Path, tmp_path: Path, name: str, snapshot: str
) -> None:
    copies = []
    for number, place in enumerate((directory, written)):
        copies.append(tmp_path / str(number))
        image = place / f"{name}.qcow2"
        qemu_img("convert", "-l", f"snapshot.name={snapshot}", "-f", "qcow2", "-O", "raw", image, copies[-1])
    compare(copies[0], "raw", copies[1])


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k,lazy_refcounts=on", "extended_l2=on"])
def test_trim_gives_space_of_the_file_back(tmp_path: Path, options: str) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "32M")
    qemu_io(image, "write -q -P 1 0 16M")
    before = allocated_bytes(image)
    with NbdimgServer(image) as server:
        qemu_io(server.uri, "discard 0 12M", "flush", options=("-f", "raw", "-d", "unmap"))
        during = allocated_bytes(image)
        assert _bytes(info_map(server.uri), lambda flags: flags == 3) == 28 * MIB
    assert before - during >= 12 * MIB - 64 * KIB
    assert qemu_check(image).exit_status == 0
    qemu_io(image, "read -q -P 0 0 12M", "read -q -P 1 12M 4M")


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512", "extended_l2=on", "compat=0.10"])
def test_nbdcopy_into_and_out_of_export_keeps_every_byte(tmp_path: Path, options: str) -> None:
    source, image, copy = tmp_path / "source", tmp_path / "disk.qcow2", tmp_path / "copy"
    expected = write_sparse(source)
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, str(len(expected)))
    nbdcopy = require_program("nbdcopy")
    with NbdimgServer(image) as server:
        run_ok(nbdcopy, "--flush", source, server.uri)
        run_ok(nbdcopy, server.uri, copy)
    assert first_difference(copy, expected) is None
    assert qemu_check(image).exit_status == 0
    compare(image, "qcow2", source)


# Locks


def test_qemu_io_cannot_write_what_we_serve_and_we_cannot_serve_what_it_has(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    program = require_program("qemu-io")
    with NbdimgServer(image):
        refused = run(program, "-f", "qcow2", "-c", "write 0 512", image)
        assert refused.returncode == 1
        assert 'Failed to get "write" lock' in refused.stderr
    with subprocess.Popen([program, "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(b"write -P 5 0 512\n")
        other.stdin.flush()
        while b"wrote 512" not in other.stdout.readline():
            assert other.poll() is None
        with pytest.raises(RuntimeError, match="another process"):
            NbdimgServer(image)
        other.stdin.write(b"quit\n")
        other.stdin.close()
        other.wait()
    with NbdimgServer(image) as server:
        qemu_io(server.uri, "read -q -P 5 0 512", options=("-f", "raw"))


def test_backing_file_of_what_we_serve_is_open_to_readers_alone(tmp_path: Path) -> None:
    base, image = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", image)
    program = require_program("qemu-io")
    with NbdimgServer(image):
        assert run(program, "-f", "qcow2", "-r", "-c", "read 0 512", base).returncode == 0
        refused = run(program, "-f", "qcow2", "-c", "write 0 512", base)
        assert refused.returncode == 1
        assert "lock" in refused.stderr
