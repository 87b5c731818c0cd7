"""Random changes of qcow2 images against a byte model, with QEMU as the judge of what is left on disk.

Each case runs two rounds of changes with an orderly end behind each, and QEMU writes to the image between them. After
each round `qemu-img check` is clean and `qemu-img compare` finds the model's bytes.
"""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from nbdimg.formats import open_image
from tests.model.disk import Disk
from tests.support.reading import bytes_of

STEPS = 70
SIZE = (700 << 10) + 512
LENGTHS = (1, 512, 4096, 65536, 200_000)

OPTIONS = (
    "cluster_size=64k",
    "cluster_size=512",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=4k,refcount_bits=2",
    "cluster_size=2k,refcount_bits=4",
    "cluster_size=1k,refcount_bits=8",
    "cluster_size=4k,refcount_bits=32",
    "compat=0.10",
    "compat=0.10,cluster_size=4k",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on",
    "lazy_refcounts=on,cluster_size=4k",
    "cluster_size=2M",
)
COMPRESSED = (
    "cluster_size=64k",
    "cluster_size=512",
    "compat=0.10,cluster_size=4k",
    "cluster_size=4k,compression_type=zstd",
    "cluster_size=2M,compression_type=zstd",
    "extended_l2=on,cluster_size=16k",
)
EXTERNAL = ("", ",data_file_raw=on", ",extended_l2=on", ",cluster_size=4k")


def qemu(*arguments: str | Path) -> None:
    done = subprocess.run([str(each) for each in arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"


class Case(Disk):
    def __init__(self, directory: Path, seed: int) -> None:
        super().__init__(directory, seed, bytearray(SIZE), LENGTHS, (11, 3, 2, 2, 2))
        self.path = directory / "disk.qcow2"

    def create(self, options: str, *more: str) -> None:
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *more, self.path, str(SIZE))

    def create_overlay(self, options: str, backing_size: int, backing_format: str) -> None:
        content = self.sample(backing_size, 4096)
        raw = self.directory / "content.raw"
        raw.write_bytes(content)
        qemu("qemu-img", "convert", "-f", "raw", "-O", backing_format, raw, self.directory / "base")
        self.create(options, "-b", "base", "-F", backing_format)
        self.model[: min(backing_size, SIZE)] = content[:SIZE]

    def create_compressed(self, options: str) -> None:
        self.model[:] = self.sample(SIZE, 4096)
        raw = self.directory / "content.raw"
        raw.write_bytes(self.model)
        qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, self.path)

    async def round(self) -> None:
        image = await open_image(self.path, format="qcow2")
        for _ in range(STEPS):
            await self.step(image, *self.range(4096))
        await self.check(image, 0, SIZE, "before closing")
        await image.close()

    def judge(self) -> None:
        qemu("qemu-img", "check", "-q", self.path)
        expected = self.directory / "model.raw"
        expected.write_bytes(self.model)
        qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", expected, self.path)

    def change_with_qemu(self) -> None:
        commands = []
        for number in range(1, 5):
            offset = self.generator.randrange(0, SIZE - 9000, 512)
            commands += ["-c", f"write -q -P {number} {offset} 8192"]
            self.model[offset : offset + 8192] = bytes([number]) * 8192
        qemu("qemu-io", "-f", "qcow2", *commands, self.path)

    def run(self) -> None:
        asyncio.run(self.round())
        self.judge()
        self.change_with_qemu()
        asyncio.run(self.round())
        self.judge()


@pytest.mark.parametrize("options", OPTIONS)
def test_random_changes_leave_what_the_model_holds(tmp_path: Path, options: str) -> None:
    case = Case(tmp_path, 1)
    case.create(options)
    case.run()


@pytest.mark.parametrize("backing_format", ["raw", "qcow2"])
@pytest.mark.parametrize("backing_size", [SIZE // 2 // 512 * 512 + 1024, 2 * SIZE])
@pytest.mark.parametrize("options", [each for each in OPTIONS if "refcount_bits=" not in each])
def test_random_changes_of_an_overlay_leave_what_the_model_holds(
    tmp_path: Path, options: str, backing_size: int, backing_format: str
) -> None:
    case = Case(tmp_path, 2)
    case.create_overlay(options, backing_size, backing_format)
    before = (tmp_path / "base").read_bytes()
    case.run()
    assert (tmp_path / "base").read_bytes() == before, "the backing file was written"


@pytest.mark.parametrize("options", COMPRESSED)
def test_random_changes_of_a_compressed_image_leave_what_the_model_holds(tmp_path: Path, options: str) -> None:
    case = Case(tmp_path, 3)
    case.create_compressed(options)
    case.run()


@pytest.mark.parametrize("options", EXTERNAL)
def test_random_changes_with_an_external_data_file_leave_what_the_model_holds(tmp_path: Path, options: str) -> None:
    case = Case(tmp_path, 4)
    case.create(f"data_file={tmp_path}/data.raw{options}")
    case.run()
    if "data_file_raw" in options:
        assert (tmp_path / "data.raw").read_bytes()[:SIZE] == case.model, "the data file is not the raw image"


def test_random_changes_under_an_internal_snapshot_leave_both(tmp_path: Path) -> None:
    case = Case(tmp_path, 5)
    case.create("cluster_size=4k")
    asyncio.run(case.round())
    frozen = bytes(case.model)
    qemu("qemu-img", "snapshot", "-c", "s", case.path)
    case.run()

    async def main() -> bytes:
        image = await open_image(case.path, format="qcow2", writable=False, snapshot="s")
        try:
            return await bytes_of(image, 0, SIZE)
        finally:
            await image.close()

    assert asyncio.run(main()) == frozen
    qemu("qemu-img", "snapshot", "-a", "s", case.path)
    case.model[:] = frozen
    case.judge()


def test_control_a_byte_that_differs_is_caught(tmp_path: Path) -> None:
    case = Case(tmp_path, 6)
    case.create("cluster_size=4k")
    asyncio.run(case.round())
    case.judge()
    case.model[SIZE // 2] ^= 1
    with pytest.raises(AssertionError, match="compare"):
        case.judge()


def test_control_a_driver_that_skips_the_old_clusters_reference_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbdimg.formats.qcow2.refcount import Refcounts

    case = Case(tmp_path, 7)
    case.create("cluster_size=4k")
    monkeypatch.setattr(Refcounts, "free", lambda *arguments, **options: None)
    asyncio.run(case.round())
    with pytest.raises(AssertionError, match="check"):
        case.judge()
