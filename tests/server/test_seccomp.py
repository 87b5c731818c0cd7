"""The filter of system calls: its program is run by an interpreter here, and by the kernel in a process that tries it.

What it is for, the ways out that it closes, is in test_sandbox.py.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from struct import Struct

import pytest

from nbdimg.server import seccomp
from nbdimg.server.seccomp import ARCHITECTURES, NEWEST, Instruction, program

PID = 4711
ALLOW = 0x7FFF0000
REFUSE, UNKNOWN = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
DATA = Struct("<iIQ6Q")
"""struct seccomp_data: nr, arch, instruction_pointer, args."""

LIMIT_S = 60
IO_URING_SETUP = 425
UNAVAILABLE = 77
HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


def evaluate(lines: list[Instruction], number: int, arguments: tuple[int, ...], audit: int) -> int:
    """What the kernel would answer. Source: Documentation/networking/filter.rst; `A` is the accumulator."""
    data = DATA.pack(number, audit, 0, *arguments, *[0xDEAD] * (6 - len(arguments)))
    place, accumulator = 0, 0
    while True:
        code, if_true, if_false, operand = lines[place]
        place += 1
        match code:
            case 0x20:
                assert operand % 4 == 0
                accumulator = int.from_bytes(data[operand : operand + 4], "little")
            case 0x54:
                accumulator &= operand
            case 0x15:
                place += if_true if accumulator == operand else if_false
            case 0x25:
                place += if_true if accumulator > operand else if_false
            case 0x06:
                return operand
            case _:
                raise AssertionError(f"code {code:#x}")


def numbers(machine: str) -> dict[str, int]:
    """Of CALLS, read anew."""
    column = list(ARCHITECTURES).index(machine)
    rows = re.findall(r"(\w+) (\d+|-) (\d+|-)", seccomp.CALLS)
    return {name: int(found[column]) for name, *found in rows if found[column] != "-"}


def answer(machine: str, call: str | int, *arguments: int, has_tcp: bool = True, audit: int | None = None) -> int:
    architecture = ARCHITECTURES[machine]
    number = numbers(machine)[call] if isinstance(call, str) else call
    lines = program(architecture, PID, has_tcp=has_tcp)
    return evaluate(lines, number, arguments, architecture.audit if audit is None else audit)


UNIX, INET, INET6, NETLINK, PACKET, VSOCK = 1, 2, 10, 16, 17, 40
STREAM, DGRAM, RAW, SEQPACKET = 1, 2, 3, 5
FLAGS = 0o2000000 | 0o4000
TCP, SCTP, MPTCP = 6, 132, 262
FAST_OPEN, NO_SIGNAL, DONT_WAIT = 0x20000000, 0x4000, 0x40
HIGH = 1 << 32

PARTLY: list[tuple[str, tuple[int, ...], int]] = [
    ("socket", (UNIX, STREAM, 0), ALLOW),
    ("socket", (UNIX, STREAM | FLAGS, 0), ALLOW),
    ("socket", (HIGH | UNIX, HIGH | STREAM | FLAGS, HIGH), ALLOW),
    ("socket", (UNIX, DGRAM, 0), REFUSE),
    ("socket", (UNIX, DGRAM | FLAGS, 0), REFUSE),
    ("socket", (UNIX, RAW, 0), REFUSE),
    ("socket", (UNIX, SEQPACKET, 0), REFUSE),
    *(("socket", (family, STREAM | FLAGS, protocol), ALLOW) for family in (INET, INET6) for protocol in (0, TCP)),
    *(("socket", (family, STREAM, protocol), REFUSE) for family in (INET, INET6) for protocol in (MPTCP, SCTP, 256)),
    *(("socket", (family, kind | FLAGS, 0), REFUSE) for family in (INET, INET6) for kind in (DGRAM, RAW, SEQPACKET)),
    *(("socket", (family, kind, 0), REFUSE) for family in (NETLINK, PACKET, VSOCK, 38) for kind in (STREAM, RAW)),
    ("socketpair", (UNIX, STREAM | FLAGS, 0), ALLOW),
    ("socketpair", (UNIX, DGRAM, 0), REFUSE),
    ("socketpair", (UNIX, SEQPACKET, 0), REFUSE),
    ("sendto", (3, 0x1000, 9, NO_SIGNAL | DONT_WAIT, 0, 0), ALLOW),
    ("sendto", (3, 0x1000, 9, 0, 0x7FFF00001000, 16), REFUSE),
    ("sendto", (3, 0x1000, 9, 0, HIGH, 16), REFUSE),
    ("sendto", (3, 0x1000, 9, 0, 0x1000, 0), REFUSE),
    ("sendto", (3, 0x1000, 9, FAST_OPEN | NO_SIGNAL, 0, 0), REFUSE),
    ("sendmsg", (3, 0x1000, NO_SIGNAL), ALLOW),
    ("sendmsg", (3, 0x1000, NO_SIGNAL | FAST_OPEN), REFUSE),
    ("sendmsg", (3, 0x1000, HIGH | FAST_OPEN), REFUSE),
    ("ioctl", (1, 0x5401, 0), ALLOW),
    ("ioctl", (1, 0x5412, 0), REFUSE),
    ("ioctl", (1, HIGH | 0x5412, 0), REFUSE),
    ("ioctl", (1, 0x541C, 0), REFUSE),
    ("ioctl", (1, 0x8901, 0), REFUSE),
    ("ioctl", (1, 0x8902, 0), REFUSE),
    ("ioctl", (1, 0x40086602, 0), REFUSE),
    ("ioctl", (1, 0x401C5820, 0), REFUSE),
    ("ioctl", (1, 0x80086601, 0), ALLOW),
    ("fcntl", (1, 1030, 0), ALLOW),
    ("fcntl", (1, 8, 1), REFUSE),
    ("fcntl", (1, 15, 1), REFUSE),
    ("clone", (0x3D0F00, 0x1000), ALLOW),
    *(("clone", (1 << bit | 17,), REFUSE) for bit in (17, 25, 26, 27, 28, 29, 30)),
    ("prlimit64", (0, 7), ALLOW),
    ("prlimit64", (PID, 7), ALLOW),
    ("prlimit64", (PID + 1, 7), REFUSE),
    *((call, (PID, 9), ALLOW) for call in ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")),
    *((call, (other, 9), REFUSE) for call in ("kill", "tgkill", "rt_sigqueueinfo") for other in (0, 1, -1 % HIGH)),
    ("rt_tgsigqueueinfo", (1, 9), REFUSE),
]
needs_filter = pytest.mark.skipif(os.uname().machine not in ARCHITECTURES, reason="no filter for this machine")
both = pytest.mark.parametrize("machine", list(ARCHITECTURES))


@both
def test_calls_with_good_uses_are_judged_by_their_arguments(machine: str) -> None:
    assert [(call, each, answer(machine, call, *each)) for call, each, _ in PARTLY] == PARTLY


@both
def test_without_tcp_listeners_there_are_unix_sockets_alone(machine: str) -> None:
    assert answer(machine, "socket", UNIX, STREAM | FLAGS, 0, has_tcp=False) == ALLOW
    for family in (INET, INET6):
        for protocol in (0, TCP):
            assert answer(machine, "socket", family, STREAM, protocol, has_tcp=False) == REFUSE


@both
def test_other_calls_of_the_list_are_refused_and_those_beside_it_are_not(machine: str) -> None:
    listed = numbers(machine)
    judged = {call for call, *_ in PARTLY}
    for call, number in listed.items():
        if call not in judged:
            assert answer(machine, number, 0, 0, 0, 0, 0, 0) == (UNKNOWN if call == "clone3" else REFUSE), call
    for number in set(range(NEWEST + 1)) - set(listed.values()):
        assert answer(machine, number) == ALLOW


@both
def test_calls_newer_than_the_list_and_those_of_x32_do_not_exist(machine: str) -> None:
    for number in (NEWEST + 1, 512, 547, 0x40000000, 0x40000000 | 42, 0x40000000 | 520, 0x7FFFFFFF, -1):
        assert answer(machine, number) == UNKNOWN


@both
def test_calls_of_another_architecture_are_refused(machine: str) -> None:
    """i386 on x86_64, by int 0x80, and ARM on aarch64: other numbers, which would pass."""
    for audit in (0x40000003, 0x40000028, 0):
        for number in (0, 1, 102, 362, NEWEST + 1):
            assert answer(machine, number, audit=audit) == REFUSE


@both
def test_numbers_are_those_of_the_kernels_headers(machine: str) -> None:
    """As far as the header that is installed knows them."""
    if not os.path.exists(HEADERS[machine]):
        pytest.skip("the kernel's headers are not installed")
    text = Path(HEADERS[machine]).read_text()
    known = {name: int(number) for name, number in re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)", text, re.M)}
    listed = numbers(machine)
    assert {name: number for name, number in listed.items() if known.get(name, number) != number} == {}
    assert len(listed.keys() - known.keys()) < 10
    assert {"connect", "execve", "io_uring_setup"} <= listed.keys() & known.keys()


# Installed

INSTALLED = """
import errno, json, os, socket, sys, threading
from nbdimg.server import seccomp
from nbdimg.storage import landlock

def outcome(attempt):
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"

def connect():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sys.argv[1])

def attempts():
    return [outcome(connect), outcome(lambda: os.chmod(sys.argv[1], 0o777))]

found = [attempts()]
landlock.give_up_privileges()
seccomp.install(has_tcp=False)
found.append(attempts())
later = threading.Thread(target=lambda: found.append(attempts()))
later.start()
later.join()
child = os.fork()
if not child:
    os._exit(0 if attempts() == ["EPERM", "EPERM"] else 1)
found.append(os.waitpid(child, 0)[1])
print(json.dumps(found))
os.abort()
"""


@needs_filter
def test_installed_filter_holds_for_threads_and_children_that_are_started_behind_it(tmp_path: Path) -> None:
    """And a process can still abort, which is a signal to itself."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        argv = [sys.executable, "-c", INSTALLED, path]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S)
    assert json.loads(done.stdout) == [["ok", "ok"], *[["EPERM", "EPERM"]] * 2, 0]
    assert done.returncode == -6


RING = """
import errno, json, os, sys
from nbdimg.server import seccomp
from nbdimg.storage import landlock
from nbdimg.storage.system import system_call

def open_ring():
    try:
        return system_call(IO_URING_SETUP, 4, bytes(120))
    except OSError as error:
        return errno.errorcode[error.errno]

found = [seccomp.without_rings(open_ring)]
ring = open_ring()
if isinstance(ring, str):
    sys.exit(UNAVAILABLE)
landlock.give_up_privileges()
try:
    seccomp.install(has_tcp=False)
except OSError as error:
    found.append(error.strerror)
os.close(ring)
seccomp.install(has_tcp=False)
print(json.dumps([*found, open_ring()]))
"""


@needs_filter
def test_filter_is_not_installed_beside_a_ring_and_then_there_is_none(tmp_path: Path) -> None:
    code = RING.replace("IO_URING_SETUP", str(IO_URING_SETUP)).replace("UNAVAILABLE", str(UNAVAILABLE))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode == UNAVAILABLE:
        pytest.skip("this machine allows no io_uring")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["ENOSYS", "io_uring is in use", "EPERM"]


NO_FILTERS = """
import sys
from nbdimg.server import seccomp
from nbdimg.storage import landlock
from nbdimg.storage.system import system_call

landlock.give_up_privileges()
machine = seccomp._architecture()
refused = (seccomp._IF_EQUAL, 0, 1, machine.seccomp), seccomp._answer(1)
seccomp._install(machine, [(seccomp._LOAD, 0, 0, seccomp._NUMBER), *refused, seccomp._ALLOWED])
try:
    seccomp.without_rings(lambda: system_call(IO_URING_SETUP, 4, bytes(120)))
except OSError:
    sys.exit(UNAVAILABLE)
try:
    seccomp.install(has_tcp=False)
except OSError as error:
    print(error.strerror)
"""


@needs_filter
def test_ring_that_could_not_be_prevented_is_not_the_reason_for_no_filter() -> None:
    """As in a unit whose own filter does not name `seccomp`."""
    code = NO_FILTERS.replace("IO_URING_SETUP", str(IO_URING_SETUP)).replace("UNAVAILABLE", str(UNAVAILABLE))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode == UNAVAILABLE:
        pytest.skip("this machine allows no io_uring")
    assert (done.stdout, done.stderr) == ("Operation not permitted\n", "")


def test_loop_is_made_where_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert seccomp.without_rings(lambda: "made") == "made"


def test_unknown_machine_has_no_filter_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "ARCHITECTURES", {})
    with pytest.raises(OSError, match=f"system calls of {os.uname().machine} are not known"):
        seccomp.install(has_tcp=True)
