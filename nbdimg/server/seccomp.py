"""A filter of system calls, for what Landlock does not know. Source: seccomp(2), linux/filter.h, linux/seccomp.h.

The program that the kernel runs at each call sees its number and its registers, not what they point to. So it cannot
tell where `connect` leads, and refuses it; and `sendmsg` may name an address, which does nothing at a stream socket.

It names what is refused, with EPERM, since what Python and its libraries call is not known for all their versions. What
is newer than the list does not exist (ENOSYS), as on an older kernel: else each new way to do an old thing would be a
way around it. The numbers of x32 lie there too. With clone3 it is the same, for its flags lie in memory, and libraries
fall back to clone. io_uring does what it is asked beside all filters, so no ring may be open: libuv opens one for each
loop and uses it for good, but does without where it gets none.

What has 32 bits is compared by its lower half, as the kernel looks at no more; a pointer has both.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from struct import Struct, calcsize
from typing import NamedTuple, TypeVar

from nbdimg.storage.system import PR_SET_NO_NEW_PRIVS, set_process_option, system_call

Instruction = tuple[int, int, int, int]
"""code, how many to skip if true, and if false, operand."""

_INSTRUCTION = Struct("=HBBI")  # struct sock_filter
_PROGRAM = Struct("@HP")  # struct sock_fprog: how many, where
assert _INSTRUCTION.size == 8

_LOAD, _AND, _IF_EQUAL, _IF_ABOVE, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in struct seccomp_data; six arguments of 8 bytes."""

_ERRNO = 0x00050000
_ALLOWED: Instruction = (_RETURN, 0, 0, 0x7FFF0000)
_SET_MODE_FILTER, _GET_ACTION_AVAILABLE = 1, 2
_SPEC_ALLOW = 4
"""Without making all of the process slower against Spectre, which Linux did before 5.16."""

_DESCRIPTORS, _RING = "/proc/self/fd", "anon_inode:[io_uring]"

T = TypeVar("T")


class Architecture(NamedTuple):
    """`audit`: AUDIT_ARCH_*. `column`: in CALLS. `seccomp`: the call's own number."""

    audit: int
    column: int
    seccomp: int


ARCHITECTURES = {"x86_64": Architecture(0xC000003E, 1, 317), "aarch64": Architecture(0xC00000B7, 2, 277)}

CALLS = """
connect 42 203, sendto 44 206, sendmsg 46 211, sendmmsg 307 269, socket 41 198, socketpair 53 199
execve 59 221, execveat 322 281, clone 56 220, clone3 435 435, unshare 272 97, setns 308 268

chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54
utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7
removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, setxattrat 463 463, removexattrat 466 466
file_setattr 469 469, ioctl 16 29, fcntl 72 25

ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440, process_mrelease 448 448
kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240
pidfd_send_signal 424 424, pidfd_open 434 434, pidfd_getfd 438 438, kcmp 312 272
move_pages 279 239, migrate_pages 256 238, prlimit64 302 261, setpriority 141 140, ioprio_set 251 30
sched_setparam 142 118, sched_setscheduler 144 119, sched_setaffinity 203 122, sched_setattr 314 274
shmget 29 194, shmat 30 196, shmctl 31 195, msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187
semget 64 190, semop 65 193, semtimedop 220 192, semctl 66 191, mq_open 240 180, mq_unlink 241 181

io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427, bpf 321 280, perf_event_open 298 241
userfaultfd 323 282, add_key 248 217, request_key 249 218, keyctl 250 219

mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, open_tree 428 428, move_mount 429 429, fsopen 430 430
fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442, open_tree_attr 467 467
open_by_handle_at 304 265, fanotify_init 300 262, fanotify_mark 301 263, quotactl 179 60, quotactl_fd 443 443
swapon 167 224, swapoff 168 225, acct 163 89, syslog 103 116, vhangup 153 58, iopl 172 -, ioperm 173 -
init_module 175 105, finit_module 313 273, delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294
reboot 169 142, settimeofday 164 170, clock_settime 227 112, clock_adjtime 305 266, adjtimex 159 171
sethostname 170 161, setdomainname 171 162
"""
"""What is refused, wholly or in part, with its number on each architecture: ways out to others and to other programs;
attributes of files; other processes; what does work for others or watches them; mounts and the machine.
"""

NEWEST = 469
"""The last number that was looked at, of Linux 6.17."""


class Comparison(NamedTuple):
    """Of an argument: whether its bits in `mask` are `value`, or are not. `is_upper`: of its upper 32 bits."""

    argument: int
    value: int
    mask: int = 0xFFFFFFFF
    is_equal: bool = True
    is_upper: bool = False


Alternatives = Sequence[Sequence[Comparison]]
"""It is enough if all of one hold."""

_MSG_FASTOPEN = 0x20000000
_NOT_FASTOPEN = 0, _MSG_FASTOPEN
_CLONE_NEW = 0x7E020000
_TO_OTHERS = 0x5412, 0x541C, 0x8901, 0x8902  # TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP
_TO_ATTRIBUTES = 0x40086602, 0x401C5820  # FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR: what file_setattr does
_F_SETOWN, _F_SETOWN_EX = 8, 15
_TYPE = 0xFFFFFFFF & ~(socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def _is_socket(family: int, protocol: int) -> Sequence[Comparison]:
    return Comparison(0, family), Comparison(1, socket.SOCK_STREAM, _TYPE), Comparison(2, protocol)


def _conditions(pid: int, *, has_tcp: bool) -> dict[str, Alternatives]:
    """What is allowed of calls that have good uses."""
    unix = _is_socket(socket.AF_UNIX, 0)
    tcp = [
        _is_socket(family, protocol)
        for family in (socket.AF_INET, socket.AF_INET6)
        for protocol in (0, socket.IPPROTO_TCP)
    ]
    own = [[Comparison(0, pid)]]
    return {
        "sendto": [[Comparison(3, *_NOT_FASTOPEN), Comparison(4, 0), Comparison(4, 0, is_upper=True)]],
        "sendmsg": [[Comparison(2, *_NOT_FASTOPEN)]],
        "fcntl": [[Comparison(1, each, is_equal=False) for each in (_F_SETOWN, _F_SETOWN_EX)]],
        "ioctl": [[Comparison(1, each, is_equal=False) for each in _TO_OTHERS + _TO_ATTRIBUTES]],
        "socket": [unix, *tcp] if has_tcp else [unix],
        "socketpair": [unix],
        "clone": [[Comparison(0, 0, _CLONE_NEW)]],
        "prlimit64": [[Comparison(0, 0)], *own],
        **dict.fromkeys(("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"), own),
    }


def program(architecture: Architecture, pid: int, *, has_tcp: bool) -> list[Instruction]:
    """What the kernel runs at each call of the process `pid`. `has_tcp`: whether it may make TCP sockets."""
    refuse, unknown = _answer(errno.EPERM), _answer(errno.ENOSYS)
    numbers = _numbers(architecture)
    made = [(_LOAD, 0, 0, _ARCHITECTURE), (_IF_EQUAL, 1, 0, architecture.audit), refuse]
    made += [(_LOAD, 0, 0, _NUMBER), (_IF_ABOVE, 0, 1, NEWEST), unknown]
    for call, alternatives in _conditions(pid, has_tcp=has_tcp).items():
        body = [*(line for each in alternatives for line in _alternative(each)), refuse]
        made += [(_IF_EQUAL, 0, len(body), numbers.pop(call)), *body]
    made += [(_IF_EQUAL, 0, 1, numbers.pop("clone3")), unknown]
    for number in numbers.values():
        made += [(_IF_EQUAL, 0, 1, number), refuse]
    return [*made, _ALLOWED]


def _numbers(architecture: Architecture) -> dict[str, int]:
    """Of each of CALLS that the architecture has."""
    rows = (entry.split() for line in CALLS.split("\n") if line for entry in line.split(","))
    return {row[0]: int(row[architecture.column]) for row in rows if row[architecture.column] != "-"}


def _answer(number: int) -> Instruction:
    return _RETURN, 0, 0, _ERRNO | number


def _alternative(comparisons: Sequence[Comparison]) -> list[Instruction]:
    """Allows the call if all of it holds, else goes on behind itself."""
    made: list[Instruction] = [_ALLOWED]
    for each in reversed(comparisons):
        rest = len(made)
        skips = (0, rest) if each.is_equal else (rest, 0)
        offset = _ARGUMENTS + 8 * each.argument + 4 * each.is_upper
        made[:0] = [(_LOAD, 0, 0, offset), (_AND, 0, 0, each.mask), (_IF_EQUAL, *skips, each.value)]
    return made


def without_rings(make: Callable[[], T]) -> T:
    """What `make` makes, in a thread of its own that has no io_uring; where no thread can be had, or nothing be taken
    away from it, the same without that.
    """

    def run() -> T:
        with contextlib.suppress(OSError):
            set_process_option(PR_SET_NO_NEW_PRIVS, 1)
            architecture = _architecture()
            setup = _numbers(architecture)["io_uring_setup"]
            made = [(_LOAD, 0, 0, _NUMBER), (_IF_EQUAL, 0, 1, setup), _answer(errno.ENOSYS), _ALLOWED]
            _install(architecture, made)
        return make()

    with ThreadPoolExecutor(1) as thread:
        try:
            made = thread.submit(run)
        except RuntimeError:
            return make()
        return made.result()


def install(*, has_tcp: bool) -> None:
    """From now on and for good, for this thread and those that it starts, which must have given up new privileges.

    Raises: OSError: the kernel cannot, a ring is open, or the architecture's calls are not known; nothing is refused.
    """
    architecture = _architecture()
    # Where this is refused, `without_rings` could not help having one: that it is refused is the reason then.
    system_call(architecture.seccomp, _GET_ACTION_AVAILABLE, 0, _ERRNO.to_bytes(4, sys.byteorder))
    if any(_target(each) == _RING for each in os.listdir(_DESCRIPTORS)):
        raise OSError(errno.EBUSY, "io_uring is in use")
    _install(architecture, program(architecture, os.getpid(), has_tcp=has_tcp))


def _target(descriptor: str) -> str:
    """Nothing for that of the directory itself."""
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(f"{_DESCRIPTORS}/{descriptor}")
    return ""


def _architecture() -> Architecture:
    """Raises: OSError."""
    architecture = ARCHITECTURES.get(os.uname().machine)
    if architecture is None or calcsize("P") != 8:
        raise OSError(errno.ENOSYS, f"system calls of {os.uname().machine} are not known")
    return architecture


def _install(architecture: Architecture, lines: Sequence[Instruction]) -> None:
    """Raises: OSError."""
    code = ctypes.create_string_buffer(b"".join(_INSTRUCTION.pack(*each) for each in lines))
    described = _PROGRAM.pack(len(lines), ctypes.addressof(code))
    system_call(architecture.seccomp, _SET_MODE_FILTER, _SPEC_ALLOW, described)
