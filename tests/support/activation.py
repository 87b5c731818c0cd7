"""What a service manager does before it starts a service that has sockets."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

HAND_OVER = """
import os, sys
descriptors, names, pid = sys.argv[1], sys.argv[2], sys.argv[3]
given = [int(each) for each in descriptors.split(",") if each]
aside = 3 + max(len(given), *given, 0)
for index, each in enumerate(given):
    os.dup2(each, aside + index, inheritable=False)
for each in given:
    os.close(each)
for index in range(len(given)):
    os.dup2(aside + index, 3 + index)
os.environ["LISTEN_FDS"] = str(len(given))
os.environ["LISTEN_PID"] = pid or str(os.getpid())
if names:
    os.environ["LISTEN_FDNAMES"] = names
os.execv(sys.executable, [sys.executable, "-m", "nbdimg", *sys.argv[4:]])
"""
"""A program: DESCRIPTOR[,DESCRIPTOR...] NAMES PID ARGUMENT...; it becomes `nbdimg ARGUMENT...`. Without PID it is meant
for that process, as it should be."""


def listening(address: str | tuple[str, int]) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    sock.bind(address)
    sock.listen()
    return sock


def hand_over(
    sockets: Sequence[socket.socket],
    names: str,
    *arguments: str,
    pid: str = "",
    stderr: IO[str] | int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """`nbdimg ARGUMENTS` with the sockets as its descriptors from 3 on."""
    descriptors = [each.fileno() for each in sockets]
    return subprocess.Popen(
        activation_argv(descriptors, names, *arguments, pid=pid),
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        pass_fds=descriptors,
    )


def activation_argv(descriptors: Sequence[int], names: str, *arguments: str, pid: str = "") -> list[str]:
    """What runs `nbdimg ARGUMENTS` with the descriptors, which it must inherit, as those from 3 on."""
    return [sys.executable, "-c", HAND_OVER, ",".join(map(str, descriptors)), names, pid, *arguments]
