"""New qcow2 images, judged by QEMU: its check, its description, its map, its reads and writes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdimg.errors import ConfigError, ImageLocked
from nbdimg.formats import newfile
from nbdimg.formats.qcow2 import create as create_module
from nbdimg.formats.qcow2 import luks
from nbdimg.formats.qcow2.create import create, referred_path
from nbdimg.formats.qcow2.create_options import CreateOptions
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.layout import PIECE_SIZE, Layout, layout, rounded_size
from nbdimg.storage import system
from nbdimg.storage.locks import lock_image
from nbdimg.units import GiB, KiB, MiB, TiB
from tests.support.peers import require_program

PiB = 1024 * TiB
SIZE = 4 * MiB + 3 * 512
"""Ends within a cluster of every size but the smallest."""

PASSPHRASE = b"correct horse"
SECRET = ["--object", f"secret,id=key,data={PASSPHRASE.decode()}"]

GRID: dict[str, CreateOptions] = {
    "defaults": CreateOptions(),
    "version 2": CreateOptions(version=2),
    "version 2, metadata": CreateOptions(version=2, preallocation="metadata"),
    "version 2, backing": CreateOptions(version=2, backing_name="base.raw", backing_format="raw"),
    **{f"clusters of {1 << bits}": CreateOptions(cluster_size=1 << bits) for bits in range(9, 22)},
    **{
        f"refcounts of {1 << order}, metadata": CreateOptions(
            refcount_bits=1 << order, cluster_size=512, preallocation="metadata"
        )
        for order in range(7)
    },
    **{
        f"extended L2, clusters of {1 << bits}": CreateOptions(has_extended_l2=True, cluster_size=1 << bits)
        for bits in (14, 16, 21)
    },
    "zstd": CreateOptions(compression="zstd"),
    "lazy refcounts": CreateOptions(has_lazy_refcounts=True),
    "backing": CreateOptions(backing_name="base.raw", backing_format="raw"),
    "backing, extended L2, metadata": CreateOptions(
        backing_name="base.raw", backing_format="raw", has_extended_l2=True, preallocation="metadata"
    ),
    "data file": CreateOptions(data_file_name="data"),
    "data file, backing": CreateOptions(data_file_name="data", backing_name="base.raw", backing_format="raw"),
    "raw data file": CreateOptions(data_file_name="data", is_data_file_raw=True),
    "raw data file, extended L2": CreateOptions(data_file_name="data", is_data_file_raw=True, has_extended_l2=True),
    **{
        f"{mode}, {'extended L2' if extended else 'plain'}{', data file' if name else ''}": CreateOptions(
            preallocation=mode, has_extended_l2=extended, data_file_name=name
        )
        for mode in ("metadata", "falloc", "full")
        for extended in (False, True)
        for name in (None, "data")
    },
    "everything": CreateOptions(
        cluster_size=16 * KiB,
        refcount_bits=1,
        has_extended_l2=True,
        compression="zstd",
        has_lazy_refcounts=True,
        backing_name="base.raw",
        backing_format="raw",
        data_file_name="data",
        preallocation="metadata",
    ),
}
ENCRYPTED: dict[str, CreateOptions] = {
    "encrypted": CreateOptions(luks_passphrase=PASSPHRASE),
    "encrypted, version 2": CreateOptions(luks_passphrase=PASSPHRASE, version=2),
    "encrypted, clusters of 512": CreateOptions(luks_passphrase=PASSPHRASE, cluster_size=512, refcount_bits=1),
    "encrypted, clusters of 2M": CreateOptions(luks_passphrase=PASSPHRASE, cluster_size=2 * MiB),
    "encrypted, metadata": CreateOptions(luks_passphrase=PASSPHRASE, preallocation="metadata"),
    "encrypted, extended L2, full": CreateOptions(
        luks_passphrase=PASSPHRASE, preallocation="full", has_extended_l2=True
    ),
    "encrypted, data file, metadata": CreateOptions(
        luks_passphrase=PASSPHRASE, preallocation="metadata", data_file_name="data"
    ),
}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new image's, in the working directory: QEMU takes data file names as relative to that."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.raw").write_bytes(b"\xba" * SIZE)
    return str(tmp_path / "new.qcow2")


@pytest.fixture(autouse=True)
def _quick_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(luks, "iterations_for", lambda *arguments: 1000)


def qemu(program: str, *arguments: str) -> str:
    done = subprocess.run([require_program(program), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def image_arguments(path: str, options: CreateOptions) -> list[str]:
    if options.luks_passphrase is None:
        return ["-f", "qcow2", path]
    return [*SECRET, "--image-opts", f"driver=qcow2,encrypt.key-secret=key,file.filename={path}"]


def assert_clean(path: str, options: CreateOptions = CreateOptions()) -> None:  # noqa: B008  (frozen)
    """No corruption, and no leak either."""
    found = json.loads(qemu("qemu-img", "check", "--output=json", *image_arguments(path, options)))
    wrong = {key: found[key] for key in ("corruptions", "leaks", "check-errors") if found.get(key)}
    assert not wrong, wrong


def info(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qemu("qemu-img", "info", "--output=json", path))
    return found


def mapped(path: str) -> list[tuple[int, int, Any]]:
    """(start, stop, what qemu-img says about it but for where it lies), neighbours that are alike as one."""
    found: list[tuple[int, int, Any]] = []
    for each in json.loads(qemu("qemu-img", "map", "--output=json", path)):
        start, stop = each["start"], each["start"] + each["length"]
        about = {key: each[key] for key in ("depth", "present", "zero", "data")}
        if found and found[-1][2] == about:
            found[-1] = (found[-1][0], stop, about)
        else:
            found.append((start, stop, about))
    return found


def qemu_options(options: CreateOptions, data_file: str | None) -> str:
    """The same for `qemu-img create -o`."""
    on = {True: "on", False: "off"}
    values = {
        "compat": f"v{options.version}",
        "cluster_size": options.cluster_size,
        "refcount_bits": options.refcount_bits,
        "extended_l2": on[options.has_extended_l2],
        "compression_type": options.compression,
        "lazy_refcounts": on[options.has_lazy_refcounts],
        "backing_file": options.backing_name,
        "backing_fmt": options.backing_format,
        "data_file": data_file,
        "data_file_raw": on[options.is_data_file_raw] if data_file else None,
        "preallocation": options.preallocation,
    }
    return ",".join(f"{key}={value}" for key, value in values.items() if value is not None)


# What QEMU makes of it


@pytest.mark.parametrize("options", [pytest.param(each, id=name) for name, each in GRID.items()])
def test_new_image_is_clean_described_as_asked_and_usable(path: str, options: CreateOptions) -> None:
    create(path, SIZE, options)
    assert_clean(path)
    found = info(path)
    about = found["format-specific"]["data"]
    assert found["virtual-size"] == SIZE
    assert found["cluster-size"] == options.cluster_size
    assert found.get("backing-filename") == options.backing_name
    assert found.get("backing-filename-format") == options.backing_format
    assert about["compat"] == {2: "0.10", 3: "1.1"}[options.version]
    assert about["refcount-bits"] == options.refcount_bits
    assert about["compression-type"] == options.compression
    assert about.get("lazy-refcounts", False) == options.has_lazy_refcounts
    assert about.get("extended-l2", False) == options.has_extended_l2
    assert about.get("data-file") == options.data_file_name
    assert about.get("data-file-raw", False) == options.is_data_file_raw
    assert about.get("corrupt", False) is False
    before = "0xba" if options.backing_name else "0"
    script = ["write -P 0x11 65000 70000", f"write -P 0x22 {SIZE - 512} 512", "flush"]
    script += ["read -P 0x11 65000 70000", f"read -P 0x22 {SIZE - 512} 512", f"read -P {before} 0 65000"]
    script += [f"read -P {before} 135000 {SIZE - 512 - 135000}"]
    output = qemu("qemu-io", "-f", "qcow2", *(word for each in script for word in ("-c", each)), path)
    assert "failed" not in output, output
    assert_clean(path)


@pytest.mark.parametrize("options", [pytest.param(each, id=name) for name, each in ENCRYPTED.items()])
def test_new_encrypted_image_is_clean_reads_as_zeroes_and_is_usable(path: str, options: CreateOptions) -> None:
    create(path, SIZE, options)
    assert_clean(path, options)
    assert info(path)["format-specific"]["data"]["encrypt"]["format"] == "luks"
    script = [f"read -P 0 0 {SIZE}", "write -P 0x11 65024 70144", "flush", "read -P 0x11 65024 70144"]
    script += ["read -P 0 0 65024", f"read -P 0 135168 {SIZE - 135168}"]
    commands = [word for each in script for word in ("-c", each)]
    arguments = image_arguments(path, options)
    output = qemu("qemu-io", *arguments[:-1], *commands, arguments[-1])
    assert "failed" not in output, output
    assert_clean(path, options)


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(CreateOptions(), id="plain"),
        pytest.param(CreateOptions(version=2), id="version 2"),
        pytest.param(CreateOptions(cluster_size=4 * KiB), id="small clusters"),
        pytest.param(CreateOptions(has_extended_l2=True), id="extended L2"),
        pytest.param(CreateOptions(data_file_name="data"), id="data file"),
        pytest.param(
            CreateOptions(has_extended_l2=True, backing_name="base.raw", backing_format="raw"),
            id="backing, extended L2",
        ),
    ],
)
def test_preallocated_image_maps_and_reads_as_that_of_qemu_img(path: str, mode: Any, options: CreateOptions) -> None:
    options = replace(options, preallocation=mode)
    size = 4 * MiB
    theirs, their_data = f"{path}.theirs", f"{path}.theirs.data"
    create(path, size, options)
    described = qemu_options(options, their_data if options.data_file_name else None)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", described, theirs, str(size))
    assert "Images are identical" in qemu("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", path, theirs)
    if options.data_file_name and mode == "metadata":
        # QEMU looks for holes in the data file where the image's own tables have holes: ours do, its own do not.
        assert mapped(path)[-1][1] == size
        assert all(about["present"] for _, _, about in mapped(path))
    else:
        assert mapped(path) == mapped(theirs)
    assert info(path)["virtual-size"] == info(theirs)["virtual-size"]


@pytest.mark.parametrize("cluster_size", [512, 2 * KiB, 4 * KiB, 8 * KiB, 64 * KiB])
def test_feature_name_table_is_there_exactly_when_qemu_img_writes_it(path: str, cluster_size: int) -> None:
    create(path, MiB, CreateOptions(cluster_size=cluster_size))
    theirs = f"{path}.theirs"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", theirs, "1M")
    heads = [Path(each).read_bytes()[:cluster_size] for each in (path, theirs)]
    assert (b"lazy refcounts" in heads[0]) == (b"lazy refcounts" in heads[1]) == (cluster_size > 4096)


def test_fields_of_a_new_image_are_these_bytes(path: str) -> None:
    create(path, GiB)
    assert Path(path).read_bytes()[:112] == bytes.fromhex(
        "514649fb 00000003"  # magic, version
        "0000000000000000 00000000"  # no backing file
        "00000010"  # cluster_bits 16
        "0000000040000000"  # size
        "00000000"  # no encryption
        "00000002 0000000000030000"  # L1: 2 entries in cluster 3
        "0000000000010000 00000001"  # refcount table: 1 cluster, cluster 1
        "00000000 0000000000000000"  # no snapshots
        "0000000000000000 0000000000000000 0000000000000000"  # no features
        "00000004 00000070"  # refcount_order, header_length
        "0000000000000000"  # compression_type, padding
    )


@pytest.mark.parametrize("field", ["refcount table", "refcount block", "L1 table", "L2 table"])
def test_control_one_changed_byte_is_no_longer_clean(path: str, field: str) -> None:
    planned = create(path, SIZE, CreateOptions(preallocation="metadata"))
    assert_clean(path)
    offsets = {
        "refcount table": planned.header.refcount_table_offset + 5,
        "refcount block": planned.refcount_blocks_offset + 2 * 20 + 1,
        "L1 table": planned.header.l1_offset + 5,
        "L2 table": planned.l2_offset + 8 * 40 + 5,
    }
    with open(path, "r+b") as file:
        file.seek(offsets[field])
        (byte,) = file.read(1)
        file.seek(offsets[field])
        file.write(bytes([byte ^ 0x03]))
    with pytest.raises(AssertionError):
        assert_clean(path)


# Sizes


@pytest.mark.parametrize(("asked", "size"), [(0, 0), (1, 512), (512, 512), (513, 1024), (SIZE, SIZE)])
@pytest.mark.parametrize("mode", ["off", "metadata", "full"])
def test_size_is_rounded_up_to_whole_sectors(path: str, asked: int, size: int, mode: Any) -> None:
    create(path, asked, CreateOptions(preallocation=mode))
    assert rounded_size(asked) == size
    assert info(path)["virtual-size"] == size
    assert_clean(path)


@pytest.mark.parametrize(
    ("options", "size_max"),
    [
        (CreateOptions(), 2 * PiB),
        (CreateOptions(cluster_size=512), 128 * GiB),
        (CreateOptions(cluster_size=2 * MiB), 2048 * PiB),
        (CreateOptions(has_extended_l2=True), PiB),
    ],
    ids=["64K", "512", "2M", "extended L2"],
)
def test_largest_size_is_clean_and_one_byte_more_is_refused_by_both(
    path: str, options: CreateOptions, size_max: int
) -> None:
    create(path, size_max, options)
    assert_clean(path)
    assert info(path)["virtual-size"] == size_max
    assert os.stat(path).st_blocks * 512 < MiB
    with pytest.raises(ConfigError, match=f"size is {size_max + 1}, expected 0 to {size_max} with clusters of "):
        create(f"{path}.more", size_max + 1, options)
    theirs = ["create", "-f", "qcow2", "-o", qemu_options(options, None), f"{path}.theirs", str(size_max + 1)]
    assert subprocess.run([require_program("qemu-img"), *theirs], capture_output=True).returncode != 0


@pytest.mark.parametrize("bits", [1, 64])
def test_refcount_blocks_describe_themselves_wherever_their_number_changes(path: str, bits: int) -> None:
    """512-byte clusters: a block counts 64 clusters of 64 bits, or 4096 of 1 bit."""
    entries = 512 * 8 // bits
    for clusters in range(entries - 16, entries + 3):
        create(path, clusters * 512, CreateOptions(cluster_size=512, refcount_bits=bits, preallocation="metadata"))
        assert_clean(path)
        os.unlink(path)


def geometry(planned: Layout) -> list[tuple[int, int]]:
    """(first cluster, clusters) of each part of the file, from its fields alone."""
    header = planned.header
    size = header.cluster_size
    l1_clusters = -(-header.l1_size * 8 // size)
    data_clusters = 0 if header.has_data_file else planned.data_cluster_count
    return [
        (0, 1),
        (header.refcount_table_offset // size, header.refcount_table_clusters),
        (planned.refcount_blocks_offset // size, planned.refcount_block_count),
        (planned.luks_offset // size, header.l1_offset // size - planned.luks_offset // size),
        (header.l1_offset // size, l1_clusters),
        (planned.l2_offset // size, planned.l2_table_count),
        (planned.data_offset // size, data_clusters),
    ]


@given(
    size=st.integers(1, 64 * TiB),
    cluster_bits=st.integers(14, 21),
    order=st.integers(0, 6),
    extended=st.booleans(),
    mode=st.sampled_from(("off", "metadata")),
    luks_length=st.sampled_from((0, 2068480)),
)
def test_layout_leaves_no_gap_and_its_refcount_structure_covers_itself_with_no_block_to_spare(
    size: int, cluster_bits: int, order: int, extended: bool, mode: Any, luks_length: int
) -> None:
    options = CreateOptions(
        cluster_size=1 << cluster_bits,
        refcount_bits=1 << order,
        has_extended_l2=extended,
        preallocation=mode,
        luks_passphrase=b"x" if luks_length else None,
    )
    try:
        planned = layout(size, options, luks_length)
    except ConfigError:
        assert options.preallocation == "metadata" or size > PiB // 1024
        return
    end = 0
    for start, count in geometry(planned):
        assert count == 0 or start == end
        end += count
    assert end == planned.cluster_count
    entries = (8 << cluster_bits) >> order
    assert (planned.refcount_block_count - 1) * entries < planned.cluster_count
    assert planned.cluster_count <= planned.refcount_block_count * entries
    assert planned.refcount_block_count * 8 <= planned.header.refcount_table_clusters << cluster_bits


@pytest.mark.parametrize(
    ("size", "options", "clusters", "blocks", "table"),
    [
        # 1 PiB of 2 MiB clusters: 2^29 guest clusters, 2^11 L2 tables, L1 in 1; a block counts 2^20.
        (PiB, CreateOptions(cluster_size=2 * MiB, preallocation="metadata"), 2**29 + 2**11 + 3 + 513, 513, 1),
        # 1-bit counts: a block counts 2^24.
        (
            PiB,
            CreateOptions(cluster_size=2 * MiB, refcount_bits=1, preallocation="metadata"),
            2**29 + 2**11 + 3 + 33,
            33,
            1,
        ),
        # 31 GiB of 512-byte clusters, 16 bits: 65011712 guest clusters, 1015808 L2 tables, L1 in 15872; 256 a block.
        (
            31 * GiB,
            CreateOptions(cluster_size=512, preallocation="metadata"),
            65011712 + 1015808 + 15872 + 1 + 259010 + 4048,
            259010,
            4048,
        ),
    ],
)
def test_huge_preallocated_image_has_these_clusters(
    size: int, options: CreateOptions, clusters: int, blocks: int, table: int
) -> None:
    planned = layout(size, options)
    assert (planned.refcount_block_count, planned.header.refcount_table_clusters) == (blocks, table)
    assert planned.cluster_count == clusters
    assert sum(count for _, count in geometry(planned)) == clusters


def test_pieces_of_a_huge_image_take_little_memory() -> None:
    planned = layout(64 * TiB, CreateOptions(preallocation="metadata"))
    assert planned.metadata_length > 10 * GiB
    tracemalloc.start()
    try:
        for _, data in islice(planned.pieces(), 8):
            assert len(data) <= PIECE_SIZE
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * MiB


# Refused

BACKED = CreateOptions(backing_name="base.raw", backing_format="raw")
DATA = CreateOptions(data_file_name="data")
REFUSED: list[tuple[CreateOptions, str]] = [
    (CreateOptions(version=1), "version is 1, expected 2 or 3"),
    (CreateOptions(version=4), "version is 4, expected 2 or 3"),
    *(
        (CreateOptions(cluster_size=size), f"cluster size is {size}, expected a power of two from 512 to 2097152")
        for size in (0, 256, 1000, 65537, 4 * MiB, -512)
    ),
    *(
        (CreateOptions(refcount_bits=bits), f"refcount bits are {bits}, expected 1, 2, 4, 8, 16, 32 or 64")
        for bits in (0, 3, 128, -1)
    ),
    (CreateOptions(compression="lz4"), "compression type is 'lz4', expected zlib or zstd"),  # type: ignore[arg-type]
    (
        CreateOptions(preallocation="some"),  # type: ignore[arg-type]
        "preallocation is 'some', expected one of off, metadata, falloc, full",
    ),
    (CreateOptions(version=2, has_extended_l2=True), "version is 2, expected 3 for extended L2 entries"),
    (CreateOptions(version=2, has_lazy_refcounts=True), "version is 2, expected 3 for lazy refcounts"),
    (CreateOptions(version=2, refcount_bits=8), "version is 2, expected 3 for refcounts of 8 bits"),
    (CreateOptions(version=2, compression="zstd"), "version is 2, expected 3 for zstd compression"),
    (replace(DATA, version=2), "version is 2, expected 3 for an external data file"),
    (
        CreateOptions(version=2, luks_passphrase=b"x", preallocation="full"),
        "version is 2, expected 3 for preallocation under encryption",
    ),
    (
        CreateOptions(has_extended_l2=True, cluster_size=8192),
        "cluster size is 8192, expected at least 16384 with extended L2 entries",
    ),
    (
        CreateOptions(backing_name="b"),
        "the backing file's format is not given, and it is never guessed: --backing-format",
    ),
    (CreateOptions(backing_format="raw"), "a backing format is given, and no backing file"),
    (replace(BACKED, backing_name=""), "the backing file name has 0 bytes, expected 1 to 1023"),
    (replace(BACKED, backing_name="ü" * 512), "the backing file name has 1024 bytes, expected 1 to 1023"),
    (replace(BACKED, backing_name="a\nb"), r"the backing file name 'a\\nb' is not printable UTF-8"),
    (replace(BACKED, backing_name="\udc80"), r"the backing file name '\\udc80' is not printable UTF-8"),
    (replace(BACKED, backing_format="x" * 16), "the backing format has 16 bytes, expected 1 to 15"),
    (
        replace(BACKED, backing_name="b" * 400, cluster_size=512),
        ".*the header with its extensions and backing file name takes .* bytes, more than a cluster of 512",
    ),
    (replace(DATA, data_file_name=""), "the data file name has 0 bytes, expected 1 to 1023"),
    (
        replace(DATA, data_file_name="nbd:d"),
        "the data file name 'nbd:d' has a protocol, expected a file, as './nbd:d' is one",
    ),
    (CreateOptions(is_data_file_raw=True), "a raw data file is asked for, and no data file is named"),
    (
        replace(BACKED, data_file_name="d", is_data_file_raw=True),
        "a raw data file holds the whole image, so it cannot have a backing file",
    ),
    (
        replace(BACKED, preallocation="metadata"),
        "preallocation would hide the backing file, but with extended L2 entries",
    ),
    (CreateOptions(luks_passphrase=b""), "the passphrase is empty"),
    *(
        (
            CreateOptions(luks_passphrase=passphrase),
            "the passphrase is not UTF-8 text without NUL, and QEMU takes no other",
        )
        for passphrase in (b"\xff", b"a\0b")
    ),
    (
        replace(DATA, is_data_file_raw=True, luks_passphrase=b"x"),
        "an encrypted data file is not a raw image, so it cannot be marked as one",
    ),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_options_that_do_not_go_together_are_refused_and_leave_nothing(
    tmp_path: Path, options: CreateOptions, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}$"):
        create(tmp_path / "new.qcow2", SIZE, options)
    assert os.listdir(tmp_path) == []


def test_negative_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^size is -1, expected 0 to "):
        create(tmp_path / "new.qcow2", -1)


def test_preallocation_beyond_the_refcount_table_is_refused(tmp_path: Path) -> None:
    options = CreateOptions(cluster_size=512, refcount_bits=64, preallocation="metadata")
    with pytest.raises(ConfigError, match=r"^the refcount table would take \d+ bytes, allowed are 8388608: "):
        create(tmp_path / "new.qcow2", 64 * GiB, options)
    assert os.listdir(tmp_path) == []


def test_passphrase_is_not_in_the_representation() -> None:
    assert "horse" not in repr(CreateOptions(luks_passphrase=PASSPHRASE))


def test_file_that_exists_is_kept(path: str) -> None:
    Path(path).write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="the file exists, and no file is ever overwritten") as caught:
        create(path, SIZE)
    assert caught.value.filename == path
    assert Path(path).read_bytes() == b"precious"


def test_symbolic_link_to_nothing_is_not_followed(path: str) -> None:
    os.symlink("elsewhere", path)
    with pytest.raises(FileExistsError):
        create(path, SIZE)
    assert os.path.islink(path)
    assert not os.path.exists(path)


# External data files


def test_data_file_is_made_beside_the_image_as_long_as_its_size(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    create(path, SIZE, DATA)
    assert referred_path(path, "data") == str(tmp_path / "data")
    assert (tmp_path / "data").stat().st_size == SIZE


@pytest.mark.parametrize("extended", [False, True])
def test_raw_data_file_that_exists_keeps_its_content_which_is_the_guests(
    path: str, tmp_path: Path, extended: bool
) -> None:
    (tmp_path / "data").write_bytes(b"\xda" * 100_000)
    create(path, SIZE, replace(DATA, is_data_file_raw=True, has_extended_l2=extended))
    assert (tmp_path / "data").read_bytes() == b"\xda" * 100_000 + bytes(SIZE - 100_000)
    assert_clean(path)
    data = str(tmp_path / "data")
    assert "Images are identical" in qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, data)


@pytest.mark.parametrize(
    ("length", "options", "sentence"),
    [
        (1, DATA, "the data file has 1 bytes, expected none unless it is raw"),
        (
            SIZE + 1,
            replace(DATA, is_data_file_raw=True),
            f"the data file has {SIZE + 1} bytes, the image would have only {SIZE}",
        ),
        (
            SIZE,
            replace(DATA, is_data_file_raw=True, preallocation="full"),
            "full preallocation would overwrite what the data file holds",
        ),
        (0, replace(DATA, data_file_name="new.qcow2"), "the data file is the image itself"),
    ],
)
def test_data_file_that_cannot_be_used_is_refused_and_kept(
    path: str, tmp_path: Path, length: int, options: CreateOptions, sentence: str
) -> None:
    (tmp_path / "data").write_bytes(b"\xda" * length)
    with pytest.raises(ConfigError, match=f": {sentence}$"):
        create(path, SIZE, options)
    assert (tmp_path / "data").read_bytes() == b"\xda" * length
    assert not os.path.exists(path)


def test_data_file_that_is_a_fifo_is_refused(path: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data")
    with pytest.raises(ConfigError, match="data: the data file is neither a regular file nor a block device"):
        create(path, SIZE, DATA)
    assert not os.path.exists(path)


def test_data_file_in_use_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with open(tmp_path / "data", "r+b") as user:
        lock_image(user.fileno(), "data", writable=True)
        with pytest.raises(ImageLocked):
            create(path, SIZE, DATA)
    assert not os.path.exists(path)
    assert (tmp_path / "data").stat().st_size == 0


# Failure, interruption, crash


class Disk:
    """Stands in for FileIO and fdatasync: logs what is done to files, and fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str, int, bytes]] = []
        self.fail_at: int | None = None
        disk = self

        class LoggedFile(FileIO):
            def write(self, data: Any) -> int:
                disk.enter("write", str(self.name), self.tell(), bytes(data))
                return super().write(data)

            def truncate(self, size: int | None = None) -> int:
                disk.enter("truncate", str(self.name), size or 0)
                return super().truncate(size)

        def fdatasync(descriptor: int) -> None:
            disk.enter("sync", os.readlink(f"/proc/self/fd/{descriptor}"))

        monkeypatch.setattr(create_module, "FileIO", LoggedFile)
        monkeypatch.setattr(newfile, "FileIO", LoggedFile)
        monkeypatch.setattr(system, "fdatasync", fdatasync)

    def enter(self, call: str, name: str, offset: int = 0, data: bytes = b"") -> None:
        if len(self.log) == self.fail_at:
            self.fail_at = None
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.log.append((call, name, offset, data))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(CreateOptions(preallocation="metadata"), id="metadata"),
        pytest.param(CreateOptions(preallocation="full"), id="full"),
        pytest.param(replace(DATA, preallocation="full"), id="data file"),
        pytest.param(CreateOptions(luks_passphrase=PASSPHRASE), id="encrypted"),
    ],
)
def test_create_that_fails_at_any_call_leaves_nothing_and_names_the_file(
    path: str, tmp_path: Path, disk: Disk, options: CreateOptions
) -> None:
    before = sorted(os.listdir(tmp_path))
    create(path, SIZE, options)
    call_count = len(disk.log)
    assert call_count >= 7
    for name in set(os.listdir(tmp_path)) - set(before):
        os.unlink(tmp_path / name)
    for index in range(call_count):
        disk.log.clear()
        disk.fail_at = index
        with pytest.raises(OSError, match="No space left") as caught:
            create(path, SIZE, options)
        assert caught.value.filename in (path, str(tmp_path / "data")), index
        assert sorted(os.listdir(tmp_path)) == before, index


def test_create_that_fails_gives_a_raw_data_file_its_length_back(path: str, tmp_path: Path, disk: Disk) -> None:
    (tmp_path / "data").write_bytes(b"\xda" * 5000)
    disk.fail_at = 4
    with pytest.raises(OSError, match="No space left"):
        create(path, SIZE, replace(DATA, is_data_file_raw=True))
    assert (tmp_path / "data").read_bytes() == b"\xda" * 5000
    assert not os.path.exists(path)


def test_create_that_is_interrupted_leaves_nothing(path: str, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create(path, SIZE, replace(DATA, preallocation="full"), progress=interrupt)
    assert sorted(os.listdir(tmp_path)) == before


def assert_header_is_last(log: list[tuple[str, str, int, bytes]], image: str) -> None:
    """The image's first sector is written once, alone, after a sync of every file that was written, and then synced."""
    first_sector = [
        index for index, (call, name, offset, data) in enumerate(log)
        if call == "write" and name == image and offset < 512 and data.strip(b"\0")
    ]  # fmt: skip
    assert len(first_sector) == 1, first_sector
    (index,) = first_sector
    assert index == len(log) - 2, "the first sector is not the last write"
    assert len(log[index][3]) <= 512
    assert log[-1][:2] == ("sync", image)
    unsynced = set()
    for call, name, _, _ in log[:index]:
        if call == "sync":
            unsynced.discard(name)
        else:
            unsynced.add(name)
    assert unsynced == set(), "the first sector is written before these are durable"


@pytest.mark.parametrize("cluster_size", [512, 64 * KiB, 2 * MiB])
@pytest.mark.parametrize("mode", ["off", "metadata", "full"])
@pytest.mark.parametrize("name", [None, "data"])
def test_header_is_written_when_all_else_is_durable(
    path: str, disk: Disk, cluster_size: int, mode: Any, name: str | None
) -> None:
    create(path, SIZE, CreateOptions(cluster_size=cluster_size, preallocation=mode, data_file_name=name))
    assert_header_is_last(disk.log, path)


@pytest.mark.parametrize("change", ["header first", "no barrier", "no last barrier"])
def test_control_other_orders_are_noticed(path: str, disk: Disk, change: str) -> None:
    create(path, SIZE)
    log = disk.log
    orders: dict[str, Callable[[], list[Any]]] = {
        "header first": lambda: [log[-2], *log[:-2], log[-1]],
        "no barrier": lambda: [*log[:-3], *log[-2:]],
        "no last barrier": lambda: log[:-1],
    }
    assert_header_is_last(log, path)
    with pytest.raises(AssertionError):
        assert_header_is_last(orders[change](), path)


# Space and progress


@pytest.mark.parametrize("name", [None, "data"])
@pytest.mark.parametrize(("mode", "is_reserved"), [("metadata", False), ("falloc", True), ("full", True)])
def test_space_is_reserved_for_data_and_tables(
    path: str, tmp_path: Path, name: str | None, mode: Any, is_reserved: bool
) -> None:
    create(path, SIZE, CreateOptions(preallocation=mode, data_file_name=name))
    for each in [path, str(tmp_path / "data")] if name else [path]:
        status = os.stat(each)
        assert (status.st_blocks * 512 >= status.st_size) == is_reserved, each


def test_falloc_where_space_cannot_be_reserved_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(system, "fallocate", lambda *arguments: False)
    with pytest.raises(OSError, match="cannot reserve space") as caught:
        create(path, SIZE, CreateOptions(preallocation="falloc"))
    assert caught.value.filename == path
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("options", [CreateOptions(), *(GRID[f"{m}, plain, data file"] for m in ("falloc", "full"))])
def test_progress_rises_to_its_total(path: str, options: CreateOptions) -> None:
    seen: list[tuple[int, int]] = []
    create(path, SIZE, options, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {seen[-1][0]}


def test_header_is_one_that_this_project_reads(path: str) -> None:
    create(path, SIZE, replace(GRID["everything"], has_lazy_refcounts=False))
    header = Header.from_bytes(path, Path(path).read_bytes()[: 16 * KiB])
    assert (header.backing_name, header.backing_format, header.data_file_name) == ("base.raw", "raw", "data")
    assert (header.size, header.refcount_bits, header.has_subclusters) == (SIZE, 1, True)
