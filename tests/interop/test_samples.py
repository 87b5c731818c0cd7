"""Controls of the checks in samples.py: each must notice what it exists to notice."""

from __future__ import annotations

from pathlib import Path

from tests.interop.samples import (
    KIB,
    MIB,
    SPARSE_SIZE,
    allocated_bytes,
    file_extents,
    first_difference,
    flip_byte,
    write_full,
    write_sparse,
)


def test_first_difference_of_a_flipped_byte_is_its_offset(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    expected = write_sparse(image)
    assert first_difference(image, expected) is None
    flip_byte(image, 5_000_001)
    assert first_difference(image, expected) == 5_000_001


def test_first_difference_of_a_shorter_file_is_its_end(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    expected = write_full(image, 4096)
    assert first_difference(image, expected + b"\0") == 4096


def test_file_extents_of_sparse_sample_are_rounded_to_file_system_blocks(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    # 3 MiB + 100 for 200 KiB ends inside a 4 KiB block: 204 KiB are data.
    assert [(offset, length) for offset, length, is_data in file_extents(image) if is_data] == [
        (0, 64 * KIB),
        (MIB, 4 * KIB),
        (3 * MIB, 204 * KIB),
        (SPARSE_SIZE - 8 * KIB, 8 * KIB),
    ]


def test_allocated_bytes_of_sparse_sample_is_its_data_only(tmp_path: Path) -> None:
    sparse, full = tmp_path / "sparse.img", tmp_path / "full.img"
    write_sparse(sparse)
    write_full(full, MIB)
    assert allocated_bytes(sparse) < MIB <= allocated_bytes(full)
