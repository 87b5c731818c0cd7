"""A chain whose images have a passphrase each: as qemu reads it with a secret for each node, so it is read here.

top.qcow2 ──▶ mid.qcow2 (LUKS, its data in mid.data) ──▶ base.qcow2 (legacy AES)
LUKS, with a snapshot
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nbdimg.cli.main import run
from nbdimg.config import ExportConfig
from nbdimg.errors import ConfigError
from nbdimg.formats import create_image, open_image
from nbdimg.formats.qcow2 import luks
from nbdimg.formats.qcow2.create import create as create_qcow2
from nbdimg.formats.qcow2.create_options import CreateOptions
from nbdimg.units import KiB, MiB
from tests.server.controlled import ControlledServer
from tests.support.qcow2edit import qemu_img, qemu_io
from tests.support.reading import read_all
from tests.support.server import NbdimgServer

SIZE = MiB
KINDS = {"top": "luks", "mid": "luks", "base": "aes"}
KEYS = {name: f"of {name}".encode() for name in KINDS}
SECRETS = [word for name in KINDS for word in ("--object", f"secret,id={name},data={KEYS[name].decode()}")]


def node(directory: Path, *names: str) -> str:
    """How qemu is told of the chain of images, the first on top."""
    name, *below = names
    options: dict[str, Any] = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": f"{directory}/{name}.qcow2"},
        "encrypt": {"format": KINDS[name], "key-secret": name},
        "backing": json.loads(node(directory, *below).removeprefix("json:")) if below else None,
    }
    if name == "mid":
        options["data-file"] = {"driver": "file", "filename": f"{directory}/mid.data"}
    return f"json:{json.dumps(options)}"


def seen_by_qemu(directory: Path) -> bytes:
    raw = directory / "raw"
    qemu_img("convert", *SECRETS, "-O", "raw", node(directory, *KINDS), raw)
    return raw.read_bytes()


def path_of(directory: Path, name: str) -> str:
    return str(directory / f"{name}.qcow2")


def own_keys(directory: Path, **other: bytes) -> dict[str, bytes]:
    return {path_of(directory, name): key for name, key in (KEYS | other).items()}


def content(
    path: str, own: Mapping[str, bytes], key: bytes | None = None, write: tuple[int, bytes] | None = None
) -> bytes:
    async def opened() -> bytes:
        image = await open_image(path, writable=write is not None, own_keys=own, key=key)
        try:
            if write is not None:
                await image.write(*write)
            return await read_all(image)
        finally:
            await image.close()

    return asyncio.run(opened())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by us where keys are derived: qemu takes seconds for that, however few rounds are asked for."""
    directory = tmp_path_factory.mktemp("keys")
    aes = "cluster_size=4k,encrypt.format=aes,encrypt.key-secret=base"
    qemu_img("create", "-q", *SECRETS, "-f", "qcow2", "-o", aes, path_of(directory, "base"), str(SIZE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(luks, "iterations_for", lambda *_: 1000)
        for name, below, data_name in (("mid", "base.qcow2", "mid.data"), ("top", "mid.qcow2", None)):
            options = CreateOptions(
                cluster_size=4 * KiB,
                luks_passphrase=KEYS[name],
                backing_name=below,
                backing_format="qcow2",
                data_file_name=data_name,
            )
            create_qcow2(path_of(directory, name), SIZE, options)
    qemu_io(node(directory, "base"), "write -q -P 1 0 300k", options=SECRETS)
    qemu_io(node(directory, "mid", "base"), "write -q -P 2 100k 300k", options=SECRETS)
    qemu_io(node(directory, *KINDS), "write -q -P 3 10k 1k", "write -q -P 4 200k 9k", options=SECRETS)
    assert run(["snapshot", "create", path_of(directory, "top"), "one"]) == 0
    qemu_io(node(directory, *KINDS), "write -q -P 5 300k 200k", options=SECRETS)
    return directory


@pytest.fixture
def chain(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "images"))


def test_chain_is_read_and_written_with_a_key_for_each_image_as_qemu_does(chain: Path) -> None:
    top, own = path_of(chain, "top"), own_keys(chain)
    expected = bytearray(seen_by_qemu(chain))
    assert content(top, own) == expected
    expected[150_001:160_002] = bytes(range(1, 74)) * 137
    assert content(top, own, write=(150_001, bytes(expected[150_001:160_002]))) == expected
    assert seen_by_qemu(chain) == expected


@pytest.mark.parametrize("name", KINDS)
def test_image_without_a_key_of_its_own_has_that_of_the_chain(chain: Path, name: str) -> None:
    own = own_keys(chain)
    assert content(path_of(chain, "top"), own, key=own.pop(path_of(chain, name))) == seen_by_qemu(chain)


def test_image_is_known_by_the_file_and_by_one_name(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (chain / "sub").mkdir()
    (chain / "link").symlink_to("mid.qcow2")
    monkeypatch.chdir(chain / "sub")
    own = {"../top.qcow2": KEYS["top"], "../link": KEYS["mid"], path_of(chain, "base"): KEYS["base"]}
    assert content("../top.qcow2", own) == seen_by_qemu(chain)
    with pytest.raises(ConfigError, match=r"keys are given for \.\./link and \.\./mid\.qcow2, which are one file"):
        content("../top.qcow2", own | {"../mid.qcow2": b"x"})


def test_wrong_and_missing_passphrases_are_told_of_the_image_that_they_are_for(chain: Path) -> None:
    mid = path_of(chain, "mid")
    with pytest.raises(ConfigError, match=f"^{mid}: the passphrase is wrong"):
        content(path_of(chain, "top"), own_keys(chain, mid=KEYS["top"]))
    own = own_keys(chain)
    del own[mid]
    with pytest.raises(ConfigError, match=f"^{mid}: it is encrypted, and no key file was given for it"):
        content(path_of(chain, "top"), own)


def test_legacy_image_with_another_passphrase_reads_as_noise_to_qemu_too(chain: Path) -> None:
    """Nothing in it tells a wrong passphrase; what lies above it is as it should be."""
    found, sound = content(path_of(chain, "top"), own_keys(chain, base=b"wrong")), seen_by_qemu(chain)
    assert found[: 8 * KiB] != sound[: 8 * KiB]
    assert found[100 * KiB :] == sound[100 * KiB :]
    raw = chain / "noise"
    qemu_img("convert", "--object", "secret,id=base,data=wrong", "-O", "raw", node(chain, "base"), raw)
    assert raw.read_bytes()[: 8 * KiB] == found[: 8 * KiB]


@pytest.mark.parametrize("name", ["bse.qcow2", "mid.data", "other.qcow2"])
def test_key_for_what_is_no_encrypted_image_of_the_chain_is_refused_before_anything_changes(
    chain: Path, name: str
) -> None:
    """Top is dirty, and has an unknown autoclear bit: opened for writing it would be repaired."""
    create_qcow2(str(chain / "other.qcow2"), SIZE, CreateOptions())
    top, own = chain / "top.qcow2", own_keys(chain)
    dirty = bytearray(top.read_bytes())
    dirty[79] |= 1
    dirty[88] |= 1
    top.write_bytes(dirty)
    descriptors = os.listdir("/proc/self/fd")
    known = " or ".join(own)
    with pytest.raises(ConfigError) as refused:
        content(str(top), {**own, f"{chain}/{name}": b"x"}, write=(0, b"x"))
    found = str(refused.value).replace(str(chain), "")
    assert found == (
        f"/top.qcow2: a key is given for /{name}, which is no encrypted image of its chain, expected "
        f"{known.replace(str(chain), '')}"
    )
    assert top.read_bytes() == dirty
    assert os.listdir("/proc/self/fd") == descriptors


@pytest.mark.parametrize("format", ["raw", "qcow2", "vhdx"])
def test_key_for_an_image_that_is_not_encrypted_is_refused(tmp_path: Path, format: str) -> None:
    path = str(tmp_path / "disk")
    create_image(path, 4 * MiB, format=format)
    with pytest.raises(ConfigError, match=f"^{path}: a key is given for {path}, .* its chain, there is none$"):
        content(path, {path: b"x"})


def test_server_opens_the_chain_and_its_snapshot_and_resize_the_chain(chain: Path) -> None:
    options = [f"--backing-key-file={path_of(chain, name)}={chain}/{name}.key" for name in ("mid", "base")]
    for name, key in KEYS.items():
        (chain / f"{name}.key").write_bytes(key + b"\n")
    options.append(f"--key-file={chain}/top.key")
    top, expected = path_of(chain, "top"), seen_by_qemu(chain)
    with NbdimgServer(top, options=options) as server:
        qemu_img("compare", "-f", "raw", "-F", "raw", chain / "raw", server.uri)
        snapshot = server.uri.replace("top", "top@one")
        qemu_io(snapshot, "read -q -P 3 10k 1k", "read -q -P 2 300k 100k", options=("-r", "-f", "raw"))
        qemu_io(server.uri, "write -q -P 9 20k 1k", options=("-f", "raw"))
    expected = expected[: 20 * KiB] + b"\t" * KiB + expected[21 * KiB :]
    assert seen_by_qemu(chain) == expected
    assert run(["resize", top, "30001", "--shrink", options[0], *options[1:]]) == 0
    assert seen_by_qemu(chain) == expected[:30208]


def test_snapshot_of_a_running_server_is_opened_with_the_keys_of_its_chain(chain: Path, tmp_path: Path) -> None:
    paths = []
    for name, key in KEYS.items():
        (chain / name).write_bytes(key)
        paths.append((path_of(chain, name), str(chain / name)))
    expected = seen_by_qemu(chain)
    with ControlledServer(tmp_path, ExportConfig(path_of(chain, "top"), "top", key_paths=tuple(paths))) as server:
        server.ask(server.control.snapshot_create("top", "two"))
        with server.connect("top") as client:
            assert client.write(0, b"x" * KiB).error == 0
        with server.connect("top@two") as client:
            assert client.read(0, SIZE).data == expected
