"""A real server with the API at a Unix socket and two exports, and a client that judges its answers."""

from __future__ import annotations

import subprocess
from pathlib import Path
from urllib.parse import quote

from tests.admin.contract import Client
from tests.support.configured import ConfiguredServer, export
from tests.support.peers import require_program
from tests.support.rawprotocol import MIB

ADMIN = '[admin]\nsocket = "admin.sock"\n'


class Served(ConfiguredServer):
    """With an API, and the exports "disk" (raw) and "vm" (qcow2), each of 1 MiB."""

    def __init__(self, directory: Path) -> None:
        self.images = directory
        self.image("disk.img")
        make_qcow2(directory / "vm.qcow2")
        self.text = ADMIN + export("disk", "disk.img") + '[[exports]]\nname = "vm"\npath = "vm.qcow2"\n'
        super().__init__(directory, self.text)
        self.admin = str(directory / "admin.sock")
        self.api = Client(self.admin)

    def image(self, name: str) -> Path:
        path = self.images / name
        path.write_bytes(b"\xa5" * MIB)
        return path

    def added(self, name: str, **keys: object) -> Path:
        """Exports a new raw image, and returns its path."""
        path = self.image(quote(f"{name}.img", safe=""))
        answer = self.api.ask("POST", "/v1/exports", {"name": name, "path": str(path), "format": "raw", **keys})
        assert answer.status == 201, answer
        return path

    def names(self) -> list[str]:
        return [each["name"] for each in self.api.ask("GET", "/v1/exports").json()["exports"]]


def make_qcow2(path: Path) -> None:
    subprocess.run([require_program("qemu-img"), "create", "-q", "-f", "qcow2", path, "1M"], check=True)
