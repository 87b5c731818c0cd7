"""A server is restarted under load, in order and by SIGKILL: clients that reconnect see no error, and no byte is lost.

What is demanded afterwards is everything that was answered, not only what was flushed. After an orderly end that is a
promise. After SIGKILL it holds as long as the machine runs and writes are in place (raw, and clusters that are there
already): what the dead process had answered is in the page cache, and the next flush covers it; what it had not
answered is sent again. So qcow2 images have all their clusters when SIGKILL comes. A write that allocates one is in the
page cache too, but until a flush only the process knows where, as with QEMU.

Contents are read by qemu-img afterwards, and compared with what was written according to the client alone.
"""

from __future__ import annotations

import random
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.certificates import LOOPBACK_NAMES, Authority
from tests.support.guest import HOST_ADDRESS, GuestResult, attach_files, run_guest
from tests.support.peers import require_program
from tests.support.rawclient import Client, connect_negotiated
from tests.support.rawprotocol import MIB, Command, Request
from tests.support.restart import LastingServer
from tests.support.rss import wait_until
from tests.support.server import PeerServer

SIZE = 32 * MIB
SLOT_SIZE = 64 * 1024
DEPTH = 16
SEED = 20261122
RESTARTS = 3
LOAD_BETWEEN = 300  # requests answered between two restarts
WAIT_S = 120.0
RECONNECT = "reconnect-delay=120"

REGION_SIZE = MIB // 2
REGION_COUNT = 3
DISK_SIZE = 4 * MIB
DISKS = {"vda": "raw", "vdb": "qcow2", "nbd0": "raw", "nbd1": "qcow2"}
GUEST_TIMEOUT_S = 200.0
ERROR_ON_CONSOLE = re.compile(r"I/O error|Other side returned error|No space left")

GUEST_SCRIPT = r"""
await() { until "$@"; do test ! -e /tmp/failed; sleep 0.2; done; }
has_size() { read -r size < /sys/block/$1/size; test $size != 0; }
stream() {
    shift=$(($1 * 4097 % SIZE))
    tail -c +$((shift + 1)) /data/pattern
    head -c $shift /data/pattern
}
round() {
    at=$(($2 % REGIONS * BLOCKS))
    stream $2 | dd of=/dev/$1 bs=64k iflag=fullblock seek=$at conv=notrunc,fsync &&
        dd if=/dev/$1 of=/tmp/read.$1 bs=64k skip=$at count=$BLOCKS iflag=direct &&
        stream $2 | cmp - /tmp/read.$1
}
rounds() {
    count=0
    until test -e /tmp/stop; do
        count=$((count + 1))
        if ! round $1 $count 2> /tmp/log.$1; then
            cat /tmp/log.$1
            touch /tmp/failed
            return
        fi
        echo $count > /tmp/new.$1
        mv /tmp/new.$1 /tmp/rounds.$1
    done
    touch /tmp/ended.$1
}
has_rounds() { read -r count < /tmp/rounds.$1; test $count -ge $2; }
more_rounds() {
    for disk in $DISKS; do read -r count < /tmp/rounds.$disk; eval "goal_$disk=$((count + $1))"; done
    for disk in $DISKS; do eval "await has_rounds $disk \$goal_$disk"; done
}

nbdattach $HOST $PORT nbd0 nbd1 &
set +x
for disk in $DISKS; do await has_size $disk; echo 0 > /tmp/rounds.$disk; done
for disk in $DISKS; do rounds $disk & done
more_rounds $((REGIONS + 1))
pause SIGTERM
more_rounds 2
pause SIGKILL
more_rounds 2
touch /tmp/stop
for disk in $DISKS; do
    await test -e /tmp/ended.$disk
    report $disk $(cat /tmp/rounds.$disk)
done
"""

CONTROL_SCRIPT = r"""
nbd-client $HOST $PORT /dev/nbd0 -N nbd0 -b 4096
until test "$(cat /sys/block/nbd0/size)" != 0; do sleep 0.05; done
for disk in vda nbd0; do dd if=/data/pattern of=/dev/$disk bs=64k conv=fsync; done
pause SIGTERM
for disk in vda nbd0; do
    if dd if=/data/pattern of=/dev/$disk bs=64k conv=fsync; then report $disk written; else report $disk failed; fi
done
"""


def run(*argv: str) -> None:
    done = subprocess.run([require_program(argv[0]), *argv[1:]], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"


def new_image(directory: Path, name: str, format: str, size: int, *, is_allocated: bool = False) -> str:
    path = directory / f"{name}.{format}"
    options = ["-o", "preallocation=metadata"] if is_allocated and format == "qcow2" else []
    run("qemu-img", "create", "-q", "-f", format, *options, str(path), str(size))
    return str(path)


def content(path: str, directory: Path) -> bytes:
    """What qemu-img reads from an image; a qcow2 image is checked too."""
    format = path.rpartition(".")[2]
    if format == "qcow2":
        run("qemu-img", "check", "-q", path)
    read = directory / "read.raw"
    run("qemu-img", "convert", "-f", format, "-O", "raw", path, str(read))
    return read.read_bytes()


class Load(threading.Thread):
    """16 requests in flight on disjoint slots: writes, reads that are compared, flushes.

    `model` is the disk's content by what was answered; `failures` what must not be.
    """

    def __init__(self, client: Client, seed: int) -> None:
        super().__init__()
        self.model = bytearray(SIZE)
        self.failures: list[str] = []
        self.answered_count = 0
        self._client = client
        self._random = random.Random(seed)
        self._in_flight: dict[int, tuple[Request, int]] = {}
        self._free = list(range(SIZE // SLOT_SIZE))
        self._is_stopping = False

    def run(self) -> None:
        try:
            while not self.failures and not (self._is_stopping and not self._in_flight):
                while len(self._in_flight) < DEPTH and not self._is_stopping:
                    self._send()
                self._receive()
        except Exception as error:
            self.failures.append(repr(error))

    def finish(self) -> None:
        """Wait for what is in flight."""
        self._is_stopping = True
        self.join(WAIT_S)
        assert not self.is_alive()

    def await_progress(self) -> None:
        """Until many requests were answered, or one has failed."""
        goal = self.answered_count + LOAD_BETWEEN
        assert wait_until(lambda: bool(self.failures) or self.answered_count >= goal, WAIT_S)

    def _send(self) -> None:
        draw = self._random
        slot = self._free.pop(draw.randrange(len(self._free)))
        start, stop = sorted(draw.sample(range(SLOT_SIZE // 512 + 1), 2))
        offset, length = slot * SLOT_SIZE + start * 512, (stop - start) * 512
        command = draw.choices((Command.WRITE, Command.READ, Command.FLUSH), (70, 20, 10))[0]
        payload = draw.randbytes(length) if command == Command.WRITE else b""
        extent = (0, 0) if command == Command.FLUSH else (offset, length)
        request = self._client.new_request(command, *extent, payload=payload)
        self._in_flight[request.cookie] = request, slot
        self._client.send_requests([request])

    def _receive(self) -> None:
        reply = self._client.read_reply()
        request, slot = self._in_flight.pop(reply.cookie)
        self._free.append(slot)
        span = slice(request.offset, request.offset + request.length)
        if reply.error:
            self.failures.append(f"{request!r}: error {reply.error}")
        elif request.command == Command.WRITE:
            self.model[span] = request.payload
        elif request.command == Command.READ and reply.data != self.model[span]:
            self.failures.append(f"{request!r}: other bytes")
        self.answered_count += 1


def blockdev(server: LastingServer, export: str, node: str, *more: str) -> str:
    """QEMU's disk `node`; `more` says whether it reconnects."""
    where = f"server.type=inet,server.host=127.0.0.1,server.port={server.port},export={export}"
    return ",".join([f"driver=nbd,node-name={node},{where}", *more])


@contextmanager
def qemu_client(server: LastingServer, *more: str, options: Sequence[str] = ()) -> Iterator[Client]:
    """A client of a QEMU process whose disk is the export "disk": QEMU's NBD client, without a guest's kernel."""

    def argv(path: str) -> list[str]:
        program = require_program("qemu-storage-daemon")
        listen = f"addr.type=unix,addr.path={path}"
        export = "type=nbd,id=export,node-name=disk,name=disk,writable=on"
        disk = blockdev(server, "disk", "disk", *more)
        return [program, *options, "--blockdev", disk, "--nbd-server", listen, "--export", export]

    with PeerServer(argv) as daemon, connect_negotiated(daemon.socket_path, "disk", WAIT_S) as client:
        yield client


@dataclass(frozen=True)
class Case:
    format: str
    how: signal.Signals
    is_activated: bool = False
    is_tls: bool = False

    def __str__(self) -> str:
        words = [self.format, self.how.name, "activated" * self.is_activated, "tls" * self.is_tls]
        return "-".join(filter(None, words))


CASES = [
    Case("raw", signal.SIGTERM),
    Case("raw", signal.SIGKILL, is_activated=True),
    Case("qcow2", signal.SIGTERM, is_activated=True, is_tls=True),
    Case("qcow2", signal.SIGKILL),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_qemu_client_under_load_server_restarts_without_error_or_lost_byte(case: Case, tmp_path: Path) -> None:
    image = new_image(tmp_path, "disk", case.format, SIZE, is_allocated=case.how == signal.SIGKILL)
    options, more, daemon_options = [f"--format={case.format}"], [RECONNECT], []
    if case.is_tls:
        authority = Authority(tmp_path / "ca")
        identity = authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES)
        known = authority.issue("client")
        options += [f"--tls-certificate={identity.certificate_path}", f"--tls-key={identity.key_path}"]
        daemon_options = ["--object", f"tls-creds-x509,id=tls0,endpoint=client,dir={known.directory}"]
        more.append("tls-creds=tls0")
    scheme = "nbds" if case.is_tls else "nbd"
    with LastingServer(f"disk={image}", options=options, scheme=scheme, is_activated=case.is_activated) as server:
        with qemu_client(server, *more, options=daemon_options) as client:
            load = Load(client, SEED)
            load.start()
            for _ in range(RESTARTS):
                load.await_progress()
                server.restart(case.how)
            load.await_progress()
            load.finish()
        assert load.failures == []
        server.stop()
    assert content(image, tmp_path) == load.model


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_control_qemu_client_that_does_not_reconnect_sees_an_error(how: signal.Signals, tmp_path: Path) -> None:
    image = new_image(tmp_path, "disk", "raw", SIZE)
    with LastingServer(f"disk={image}", options=["--format=raw"]) as server, qemu_client(server) as client:
        load = Load(client, SEED)
        load.start()
        load.await_progress()
        server.restart(how)
        load.await_progress()
        load.finish()
    assert load.failures != []


# The same in a guest: its disks are QEMU's, and its own kernel's


def guest_disks(server: LastingServer, *more: str) -> list[str]:
    """Arguments for QEMU: the guest's /dev/vda and /dev/vdb, which are the exports of these names."""
    arguments = []
    for name in ("vda", "vdb"):
        arguments += ["-blockdev", blockdev(server, name, name, *more), "-device", f"virtio-blk-pci,drive={name}"]
    return arguments


def run_restarted_guest(server: LastingServer, script: str, *more: str) -> GuestResult:
    """Runs `script` in a guest whose pauses restart the server with the signal that they name."""
    settings = {
        "HOST": HOST_ADDRESS,
        "PORT": server.port,
        "SIZE": REGION_SIZE,
        "REGIONS": REGION_COUNT,
        "BLOCKS": REGION_SIZE // SLOT_SIZE,
        "DISKS": " ".join(DISKS),
    }
    head = "".join(f"{name}='{value}'\n" for name, value in settings.items())
    return run_guest(
        head + script,
        timeout_s=GUEST_TIMEOUT_S,
        files={**attach_files(), "/data/pattern": guest_pattern()},
        devices=guest_disks(server, *more),
        on_pause=lambda name: server.restart(signal.Signals[name]),
    )


def guest_pattern() -> bytes:
    return random.Random(SEED).randbytes(REGION_SIZE)


def expected_disk(round_count: int) -> bytes:
    """What a disk holds after so many rounds: in each region what was written there last."""
    pattern, disk = guest_pattern(), bytearray(DISK_SIZE)
    for count in range(1, round_count + 1):
        shift = count * 4097 % REGION_SIZE
        start = count % REGION_COUNT * REGION_SIZE
        disk[start : start + REGION_SIZE] = pattern[shift:] + pattern[:shift]
    return bytes(disk)


@pytest.fixture
def images(tmp_path: Path) -> dict[str, str]:
    """The image of each of the guest's disks."""
    return {name: new_image(tmp_path, name, format, DISK_SIZE) for name, format in DISKS.items()}


@pytest.mark.guest
def test_guest_under_load_server_restarts_without_error_or_lost_byte(images: dict[str, str], tmp_path: Path) -> None:
    """Two disks of QEMU's client and two of the kernel's write and read in rounds, each with a flush, all along."""
    with LastingServer(*(f"{name}={path}" for name, path in images.items())) as server:
        result = run_restarted_guest(server, GUEST_SCRIPT, RECONNECT)
        server.stop()
    assert result.status == 0, result.console[-6000:]
    assert not ERROR_ON_CONSOLE.search(result.console), result.console[-6000:]
    for name in ("nbd0", "nbd1"):
        assert result.console.count(f"block {name}: reconnected socket") >= 2, result.console[-6000:]
    for name, path in images.items():
        assert content(path, tmp_path) == expected_disk(int(result.values[name])), name


@pytest.mark.guest
def test_control_guest_whose_clients_do_not_reconnect_sees_errors(images: dict[str, str]) -> None:
    with LastingServer(*(f"{name}={path}" for name, path in images.items())) as server:
        result = run_restarted_guest(server, CONTROL_SCRIPT)
    assert result.values == {"vda": "failed", "nbd0": "failed"}
    for name in ("vda", "nbd0"):
        assert re.search(rf"I/O error.*\b{name}\b", result.console), result.console[-6000:]
