"""nbd-client, the program that hands a negotiated connection to the kernel: its part in user space only.

It negotiates first and asks the kernel afterwards, so without the kernel module it still shows the server's answers
before it fails. With the module it would attach a device: those tests then leave it alone (the guest test covers it).
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.interop.samples import MIB, run, write_sparse
from tests.support.peers import require_program
from tests.support.server import NbdimgServer

KERNEL_MODULE = Path("/sys/module/nbd")
FREE_PORT = "nbd://127.0.0.1:0"


def two_images(directory: Path) -> list[str]:
    for index, name in enumerate(("alpha", "beta")):
        write_sparse(directory / f"{name}.img", size=(index + 1) * 8 * MIB, data=())
    return [str(directory / "alpha.img"), str(directory / "beta.img")]


def listed(output: str) -> list[str]:
    """The names that `nbd-client -l` printed after its progress line, without their descriptions."""
    lines = [line.removeprefix("Negotiation: ..").strip() for line in output.splitlines()]
    return sorted(line for line in lines if line)


def attach(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Negotiate as for a device; without the kernel module this ends with exit status 1 at the latest."""
    if KERNEL_MODULE.exists():
        pytest.skip("the kernel module nbd is loaded: nbd-client would attach a device")
    return run(require_program("nbd-client"), *arguments)


def test_nbd_client_lists_every_export_over_a_unix_socket(tmp_path: Path) -> None:
    nbd_client = require_program("nbd-client")
    with NbdimgServer(*two_images(tmp_path)) as server:
        completed = run(nbd_client, "-l", "-unix", server.socket_path)
    assert completed.returncode == 0, completed.stderr
    assert listed(completed.stdout) == ["alpha", "beta"]


def test_nbd_client_lists_every_export_over_tcp(tmp_path: Path) -> None:
    nbd_client = require_program("nbd-client")
    with NbdimgServer(*two_images(tmp_path), listen=[FREE_PORT]) as server:
        port = urlsplit(server.uri).port
        assert port
        completed = run(nbd_client, "-l", "127.0.0.1", str(port))
    assert completed.returncode == 0, completed.stderr
    assert listed(completed.stdout) == ["alpha", "beta"]


@pytest.mark.parametrize(("name", "size_mib"), [("alpha", 8), ("beta", 16)])
def test_nbd_client_negotiates_the_size_of_the_export_it_names(tmp_path: Path, name: str, size_mib: int) -> None:
    with NbdimgServer(*two_images(tmp_path)) as server:
        completed = attach("-unix", server.socket_path, "-N", name, "/dev/nbd0")
    assert re.search(rf"\bsize = {size_mib}MB", completed.stdout), completed.stdout + completed.stderr
    assert "Server said" not in completed.stderr


def test_nbd_client_shows_the_reason_why_an_export_is_refused(tmp_path: Path) -> None:
    with NbdimgServer(*two_images(tmp_path)) as server:
        completed = attach("-unix", server.socket_path, "-N", "absent", "/dev/nbd0")
        assert completed.returncode != 0
        assert "size =" not in completed.stdout
        assert re.search(r"Server said: .*absent", completed.stderr), completed.stderr
        assert listed(run(require_program("nbd-client"), "-l", "-unix", server.socket_path).stdout) == ["alpha", "beta"]
