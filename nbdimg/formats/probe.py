"""What a file's first bytes say that it is.

Only magic numbers count, and the first line of a VMDK's text; a file without is raw. A guest owns the bytes of a raw
image, so a raw image that was *probed* must not be allowed to grow a magic (CVE-2008-2004 and its many sisters): the
next open would follow it.
"""

from __future__ import annotations

import re

HEAD_SIZE = 512
"""Bytes from the start that probing looks at, and that a guarded write must leave without a magic."""

_MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"QED\0", "qed"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
)
"""(offset, magic, format): those that QEMU or nbdimg would recognize."""

_VMDK_DESCRIPTOR = re.compile(rb"(?:#[^\n]*\n|[ \t]*\r?\n)*version=[0-9]")
"""A text that names the files of a disk. QEMU needs no more than its version, behind comments and blank lines."""


def probe(head: bytes) -> str | None:
    """The format whose magic stands in a file's first HEAD_SIZE bytes; None: none has it, so raw."""
    for offset, magic, name in _MAGICS:
        if head.startswith(magic, offset):
            return name
    return "vmdk" if _VMDK_DESCRIPTOR.match(head) else None


def planted(head: bytes) -> str | None:
    """Why a guarded raw image must not begin with these bytes; None: it may."""
    name = probe(head)
    if name is None:
        return None
    return f"the write would make this probed raw image look like {name}; serve it with an explicit format to allow it"
