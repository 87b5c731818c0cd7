"""Landlock: what a process gives up for good, for itself and what it starts. Source: landlock(7), linux/landlock.h.

A rule names a file or a directory and allows what it names and everything beneath. It holds for the inode, not for the
name: renaming a directory takes its rule along, and what takes its place has none. Descriptors that are open already
keep what they could do; stat, readlink and O_PATH are never restricted.

    version 1 (Linux 5.13)   files; linking and renaming across directories is refused whatever the rules say
            2 (5.19)         which rules may allow
            3 (6.2)          truncation
            4 (6.7)          TCP: bind, connect
            5 (6.10)         ioctl of devices
            6 (6.12)         abstract Unix sockets and signals of processes outside
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from enum import IntFlag
from struct import Struct

from nbdimg.storage.system import PR_SET_NO_NEW_PRIVS, set_process_option, system_call

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""System calls; the same numbers on every architecture that Python runs on."""

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH, _RULE_NET_PORT = 1, 2
_PR_SET_DUMPABLE = 4

_RULESET = Struct("=QQQ")  # struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped
_PATH_BENEATH = Struct("=Qi")  # struct landlock_path_beneath_attr, packed: allowed_access, parent_fd
_NET_PORT = Struct("=QQ")  # struct landlock_net_port_attr: allowed_access, port
assert (_RULESET.size, _PATH_BENEATH.size, _NET_PORT.size) == (24, 12, 16)

_BIND_TCP, _CONNECT_TCP = 1, 2
_SCOPE_ABSTRACT_UNIX, _SCOPE_SIGNAL = 1, 2

VERSION_OF_TCP = 4
VERSION_OF_SCOPES = 6


class Access(IntFlag):
    """LANDLOCK_ACCESS_FS_*. Whoever has a right for a directory has it for all that is beneath."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


_OF_FILES = Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV
"""What a rule for anything else than a directory may allow."""

_ACCESS_COUNTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many of `Access` a version knows; all from 5 on."""


def version() -> int:
    """Of the kernel's Landlock; 0: it has none, it was switched off at boot, or a filter of system calls forbids it."""
    try:
        return system_call(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def handled(version: int) -> Access:
    """What a version restricts."""
    return Access((1 << _ACCESS_COUNTS.get(version, len(Access))) - 1)


def restrict(rules: Mapping[str, Access], ports: Iterable[int]) -> Mapping[str, Access]:
    """From now on this thread, and each that it starts, does with files what a rule allows, binds TCP sockets to
    `ports` (0: one that the kernel picks) and connects none. It does not hold for threads that exist already.

    Returns the rules that are in force: there is none for a path that does not exist.

    Raises: OSError: the kernel refused; nothing is restricted.
    """
    known = version()
    files, tcp, scopes = handled(known), 0, 0
    if known >= VERSION_OF_TCP:
        tcp = _BIND_TCP | _CONNECT_TCP
    if known >= VERSION_OF_SCOPES:
        scopes = _SCOPE_ABSTRACT_UNIX | _SCOPE_SIGNAL
    ruleset = system_call(_CREATE_RULESET, _RULESET.pack(files, tcp, scopes), _RULESET.size, 0)
    try:
        added = {path: access for path, access in rules.items() if _add_path(ruleset, path, access & files)}
        if tcp:
            _add_ports(ruleset, frozenset(ports))
        system_call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return added


def _add_path(ruleset: int, path: str, access: Access) -> bool:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    if not os.path.isdir(path):
        access &= _OF_FILES
    system_call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, _PATH_BENEATH.pack(access, descriptor), 0)
    # A directory of procfs that nobody holds open gets a new inode when memory is short, which would have no rule.
    if not path.startswith("/proc/"):
        os.close(descriptor)
    return True


def _add_ports(ruleset: int, ports: Collection[int]) -> None:
    for port in ports:
        system_call(_ADD_RULE, ruleset, _RULE_NET_PORT, _NET_PORT.pack(_BIND_TCP, port), 0)


def give_up_privileges() -> None:
    """No program that this process starts gains rights by its mode, which Landlock asks for; nobody but root may look
    into its memory, which holds keys. Raises: OSError.
    """
    set_process_option(PR_SET_NO_NEW_PRIVS, 1)
    set_process_option(_PR_SET_DUMPABLE, 0)
