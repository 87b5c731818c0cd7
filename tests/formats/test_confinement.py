"""Images that reach for files which are not theirs: the ways that have worked elsewhere, and each one's sentence.

The secret lies beside the image's directory. Every case runs with openat2 and with the walk that replaces it. The
controls show that the same image gives the secret to a program that opens what the name says: a plain open, or qemu-io.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdimg.errors import ImageError, escaped
from nbdimg.formats.gate import ConfinedGate
from nbdimg.formats.probe import probe
from nbdimg.image.gate import Reference
from nbdimg.storage.locks import lock_image
from nbdimg.storage.posix import PosixFile
from tests.storage.test_beneath import WAYS, resolve_by
from tests.support.peers import require_program

SIZE = 64 * 1024
SECRET = b"\x5a" * SIZE
BASE = b"\xb0" * SIZE
RACE_S = 2.0
RACE_OUTCOMES = 20
"""How often each outcome of the race is wanted before it ends early."""


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    way: str = request.param
    resolve_by(way, monkeypatch)
    return way


class Scene:
    """`inside` holds the images, `secret` lies outside of it."""

    def __init__(self, directory: Path) -> None:
        self.inside = directory / "in"
        self.secret = directory / "out" / "secret"
        (self.inside / "sub").mkdir(parents=True)
        self.secret.parent.mkdir()
        self.secret.write_bytes(SECRET)
        (self.inside / "base").write_bytes(BASE)
        self.top = self.inside / "top.qcow2"
        self.closers: list[Callable[[], object]] = []

    def close(self) -> None:
        while self.closers:
            self.closers.pop()()

    def overlay(self, backing: str, path: Path | None = None) -> Reference:
        """A qcow2 image, the top one by default, whose backing file is called this; what it refers to."""
        path = path or self.top
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, str(path), str(SIZE))
        head = path.read_bytes()
        offset, length = struct.unpack_from(">QI", head, 8)
        name = head[offset : offset + length].decode()
        assert name == backing
        return Reference(str(path), "backing file", name, offset, is_writable=False)

    def gate(self) -> ConfinedGate:
        """For the top image, opened and locked as an image that is written."""
        top = PosixFile(self.top, writable=True)
        lock_image(top.descriptor, top.path, writable=True)
        gate = ConfinedGate(top)
        self.closers += [lambda: asyncio.run(top.close()), gate.close]
        return gate

    def open(self, gate: ConfinedGate, reference: Reference) -> PosixFile:
        file = asyncio.run(gate.open(reference))
        self.closers.append(lambda: asyncio.run(file.close()))
        return file

    def assert_refused(self, reference: Reference, found: str, gate: ConfinedGate | None = None) -> None:
        """By the whole sentence; and nothing is left open."""
        gate = gate or self.gate()
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ImageError) as caught:
            self.open(gate, reference)
        assert os.listdir("/proc/self/fd") == before
        assert (caught.value.path, caught.value.offset) == (reference.owner_path, reference.offset)
        start = f"{reference.owner_path}: {reference.field} {escaped(reference.name)} {found}, allowed is "
        assert str(caught.value).startswith(start)
        assert str(caught.value).endswith(f" (offset {reference.offset})")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path.resolve())
    yield scene
    scene.close()


def qemu_img(*arguments: str) -> None:
    subprocess.run([require_program("qemu-img"), *arguments], check=True, timeout=30)


def qemu_io_reads(path: Path, byte: int) -> bool:
    """Whether qemu-io opens the qcow2 image, with all that it refers to, and reads this byte from its start."""
    command = [require_program("qemu-io"), "-U", "-r", "-f", "qcow2", "-c", f"read -P {byte} 0 {SIZE}", str(path)]
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


def make_links(links: dict[str, str]) -> Callable[[Scene], None]:
    def make(scene: Scene) -> None:
        for name, target in links.items():
            (scene.inside / name).symlink_to(target.format(scene=scene))

    return make


OUTSIDE = "leads outside"
LINK = "leads through a link that is not followed"

ESCAPES = {
    "absolute": ("{scene.secret}", make_links({}), OUTSIDE, OUTSIDE),
    "dots": ("../out/secret", make_links({}), OUTSIDE, OUTSIDE),
    "dots-behind-a-directory": ("sub/../../out/secret", make_links({}), OUTSIDE, OUTSIDE),
    "dots-back-in": ("../in/../out/secret", make_links({}), OUTSIDE, OUTSIDE),
    "absolute-with-dots": ("{scene.inside}/../out/secret", make_links({}), OUTSIDE, OUTSIDE),
    "symlink": ("link", make_links({"link": "../out/secret"}), OUTSIDE, LINK),
    "absolute-symlink": ("link", make_links({"link": "{scene.secret}"}), OUTSIDE, LINK),
    "directory-symlink": ("link/secret", make_links({"link": "../out"}), OUTSIDE, LINK),
    "symlink-chain": ("a", make_links({"a": "b", "b": "sub/c", "sub/c": "../../out/secret"}), OUTSIDE, LINK),
}
"""Name, what is made beforehand, what is found by openat2 and by walking."""


@pytest.mark.parametrize("case", ESCAPES)
def test_backing_name_that_leads_to_the_secret_is_refused(scene: Scene, way: str, case: str) -> None:
    name, prepare, by_openat2, by_walking = ESCAPES[case]
    prepare(scene)
    reference = scene.overlay(name.format(scene=scene))
    scene.assert_refused(reference, by_openat2 if way == "openat2" else by_walking)
    assert (scene.inside / reference.name).read_bytes() == SECRET, "control: a plain open gives the secret"
    assert qemu_io_reads(scene.top, 0x5A), "control: qemu-io gives the secret"


def test_backing_name_within_the_directory_is_opened_as_control(scene: Scene, way: str) -> None:
    reference = scene.overlay("base")
    file = scene.open(scene.gate(), reference)
    assert os.pread(file.descriptor, SIZE + 1, 0) == BASE
    assert qemu_io_reads(scene.top, 0xB0)
    assert not qemu_io_reads(scene.top, 0x5A)


def test_backing_name_in_proc_is_refused(scene: Scene, way: str) -> None:
    descriptor = os.open(scene.secret, os.O_RDONLY)
    reference = scene.overlay(f"/proc/self/fd/{descriptor}")
    scene.assert_refused(reference, "lies in /proc")
    assert Path(reference.name).read_bytes() == SECRET, "control: a plain open gives the secret"
    os.close(descriptor)


def test_backing_name_of_a_link_into_proc_is_refused(scene: Scene, way: str) -> None:
    descriptor = os.open(scene.secret, os.O_RDONLY)
    (scene.inside / "link").symlink_to(f"/proc/self/fd/{descriptor}")
    reference = scene.overlay("link")
    scene.assert_refused(reference, OUTSIDE if way == "openat2" else LINK)
    assert (scene.inside / "link").read_bytes() == SECRET, "control: a plain open gives the secret"
    os.close(descriptor)


def test_magic_link_beneath_the_images_own_directory_is_refused(scene: Scene, way: str) -> None:
    """An image that was itself opened as /proc/self/fd/N, so that its neighbours are the server's descriptors."""
    scene.overlay("base")
    top, secret = os.open(scene.top, os.O_RDWR), os.open(scene.secret, os.O_RDONLY)
    file = PosixFile(f"/proc/self/fd/{top}", writable=True)
    with ConfinedGate(file) as gate:
        reference = Reference(file.path, "backing file", str(secret), 512, is_writable=False)
        scene.assert_refused(reference, LINK, gate)
    assert Path(f"/proc/self/fd/{secret}").read_bytes() == SECRET, "control: a plain open gives the secret"
    asyncio.run(file.close())
    os.close(top)
    os.close(secret)


def protocol(name: str) -> str:
    return f"has the protocol '{name}' (a file of that name is written with './' before it)"


def test_backing_name_in_json_is_refused(scene: Scene, way: str) -> None:
    reference = scene.overlay(f'json:{{"driver":"raw","file":{{"filename":"{scene.secret}"}}}}')
    scene.assert_refused(reference, protocol("json"))
    assert qemu_io_reads(scene.top, 0x5A), "control: qemu-io gives the secret"


@pytest.mark.parametrize("name", ["nbd://127.0.0.1/x", "nbd:unix:/x", "http://a/b", "ssh://h/f", "file:/x", "rbd:p/i"])
def test_backing_name_with_a_protocol_is_refused(scene: Scene, way: str, name: str) -> None:
    scene.overlay("base")
    reference = Reference(str(scene.top), "backing file", name, 512, is_writable=False)
    scene.assert_refused(reference, protocol(name.partition(":")[0]))


def test_backing_name_of_a_server_is_not_dialled(scene: Scene, way: str) -> None:
    with socket.socket(socket.AF_INET) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        reference = scene.overlay(f"nbd://127.0.0.1:{listener.getsockname()[1]}/x")
        scene.assert_refused(reference, protocol("nbd"))
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.settimeout(30)
        command = [require_program("qemu-io"), "-U", "-r", "-f", "qcow2", "-c", "read 0 512", str(scene.top)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            listener.accept()[0].close()  # control: qemu-io dials


@pytest.mark.parametrize("writable", [False, True])
def test_external_data_file_outside_is_refused(scene: Scene, way: str, writable: bool) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={scene.secret}", str(scene.top), str(SIZE))
    offset = scene.top.read_bytes().index(os.fsencode(scene.secret))
    reference = Reference(str(scene.top), "external data file", str(scene.secret), offset, is_writable=writable)
    scene.assert_refused(reference, OUTSIDE)
    scene.close()
    command = [require_program("qemu-io"), "-f", "qcow2", "-c", f"write -P 0x66 0 {SIZE}", str(scene.top)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    assert scene.secret.read_bytes() == b"\x66" * SIZE, "control: qemu-io writes to the file outside"


def test_backing_file_with_a_magic_is_bytes_and_leads_nowhere(scene: Scene, way: str) -> None:
    """A raw file whose guest wrote a qcow2 header into it, with the secret for its backing file.

    The gate opens it and looks at nothing inside: the format is stated by whoever asks, and without a stated one
    the caller refuses (it never probes).
    """
    polyglot = scene.inside / "base"
    scene.overlay(str(scene.secret), polyglot)
    reference = scene.overlay("base")
    gate = scene.gate()
    before = len(os.listdir("/proc/self/fd"))
    file = scene.open(gate, reference)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert os.pread(file.descriptor, SIZE, 0) == polyglot.read_bytes()[:SIZE]
    assert os.lseek(file.descriptor, 0, os.SEEK_CUR) == 0
    assert probe(os.pread(file.descriptor, 4096, 0)) == "qcow2", "control: probing would take it for qcow2"
    assert qemu_io_reads(polyglot, 0x5A), "control: taken for qcow2, it gives the secret"


@pytest.mark.timeout(30)
@pytest.mark.parametrize("writable", [False, True])
def test_backing_name_of_a_fifo_is_refused_at_once(scene: Scene, way: str, writable: bool) -> None:
    os.mkfifo(scene.inside / "fifo")
    scene.overlay("base")
    reference = Reference(str(scene.top), "backing file", "fifo", 512, is_writable=writable)
    scene.assert_refused(reference, "cannot be opened: it is a FIFO")


def test_backing_name_of_a_device_is_refused(scene: Scene, way: str) -> None:
    scene.assert_refused(scene.overlay("/dev/zero"), "lies in /dev")
    assert qemu_io_reads(scene.top, 0), "control: qemu-io reads the device"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device")
def test_backing_name_of_a_device_within_the_directory_is_refused(scene: Scene, way: str) -> None:
    try:
        os.mknod(scene.inside / "zero", 0o20666, os.makedev(1, 5))
        os.close(os.open(scene.inside / "zero", os.O_RDONLY))
    except OSError as error:
        pytest.skip(f"devices do not work here: {error}")
    scene.assert_refused(scene.overlay("zero"), "cannot be opened: it is a character device")


def test_backing_name_of_a_unix_socket_is_refused(scene: Scene, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scene.inside)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        scene.assert_refused(
            scene.overlay("socket"), "cannot be opened: it is a socket or a device that does not exist"
        )


HELD = "is a file that this chain holds already"


def test_image_that_is_its_own_backing_file_is_refused(scene: Scene, way: str) -> None:
    scene.assert_refused(scene.overlay("top.qcow2"), HELD)


def test_image_that_is_its_own_backing_file_by_another_name_is_refused(scene: Scene, way: str) -> None:
    reference = scene.overlay("alias")
    os.link(scene.top, scene.inside / "alias")
    scene.assert_refused(reference, HELD)


def test_images_that_back_each_other_are_refused(scene: Scene, way: str) -> None:
    first = scene.overlay("sub/other.qcow2")
    second = scene.overlay(str(scene.top), scene.inside / "sub" / "other.qcow2")
    gate = scene.gate()
    assert scene.open(gate, first).path == second.owner_path
    scene.assert_refused(second, HELD, gate)


class Swapper(threading.Thread):
    """Exchanges the directory `victim` with the symlink `trap` and back, until it is stopped."""

    def __init__(self, inside: Path) -> None:
        super().__init__()
        self.victim, self.trap, self.parked = inside / "victim", inside / "trap", inside / "parked"
        self.victim.mkdir()
        (self.victim / "secret").write_bytes(BASE)
        self.trap.symlink_to("../out")
        self._is_stopped = threading.Event()

    def swap(self) -> None:
        self.victim.rename(self.parked)
        self.trap.rename(self.victim)

    def swap_back(self) -> None:
        self.victim.rename(self.trap)
        self.parked.rename(self.victim)

    def run(self) -> None:
        while not self._is_stopped.is_set():
            self.swap()
            self.swap_back()

    def __enter__(self) -> Swapper:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_stopped.set()
        self.join()


async def race(gate_for: Callable[[], ConfinedGate], reference: Reference) -> dict[str, int]:
    """Open until every outcome was seen often, or the time is over: {what was read, or the refusal: how often}."""
    outcomes = {"inside": 0, "secret": 0, "refused": 0, "absent": 0}
    deadline = time.monotonic() + RACE_S
    while time.monotonic() < deadline and min(outcomes["inside"], outcomes["refused"]) < RACE_OUTCOMES:
        with gate_for() as gate:
            try:
                file = await gate.open(reference)
            except ImageError as error:
                outcomes["refused" if OUTSIDE in str(error) or LINK in str(error) else "absent"] += 1
                continue
        content = os.pread(file.descriptor, SIZE, 0)
        outcomes["inside" if content == BASE else "secret"] += 1
        await file.close()
    return outcomes


def test_directory_that_becomes_a_link_while_it_is_opened_never_leads_out(scene: Scene, way: str) -> None:
    reference = scene.overlay("victim/secret")
    top = PosixFile(scene.top, writable=False)
    with Swapper(scene.inside):
        outcomes = asyncio.run(race(lambda: ConfinedGate(top), reference))
    asyncio.run(top.close())
    assert outcomes["secret"] == 0, outcomes
    assert outcomes["inside"], f"control: the directory was met: {outcomes}"
    assert outcomes["refused"], f"control: the link was met: {outcomes}"


def test_control_plain_open_in_the_same_race_leads_out(scene: Scene) -> None:
    path = scene.inside / "victim" / "secret"
    deadline = time.monotonic() + RACE_S
    content = b""
    with Swapper(scene.inside):
        while content != SECRET and time.monotonic() < deadline:
            try:
                content = path.read_bytes()
            except OSError:
                continue
    assert content == SECRET


def test_control_name_that_is_checked_and_then_opened_leads_out(scene: Scene) -> None:
    swapper = Swapper(scene.inside)
    path = swapper.victim / "secret"
    assert path.resolve().is_relative_to(scene.inside)
    swapper.swap()
    assert path.read_bytes() == SECRET
