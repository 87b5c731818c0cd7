"""A container without a daemon: its image built by buildah from the Dockerfile, run by runc as the compose file says.

The base image is not fetched. Debian's own packages of the same Python, extracted by mmdebstrap, stand for it under its
name. What pip would fetch while the image is built is fetched before by the pip that runs the tests, with whatever
settings it has, so that the build itself needs no network.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.deploy.debian import TRIXIE, NotPrepared, extract, pip, project
from tests.deploy.manifests import DOCKERFILE, ROOT, SERVER_UID
from tests.interop.samples import run_ok
from tests.support.peers import require_program

BUILD_LIMIT_S = 280.0
RELEASE = TRIXIE
"""Its Python is the one of the Dockerfile."""

PACKAGES = ("base-files", "coreutils", "dash", "libc-bin", "python3-venv")
SHELLS = ("/usr/bin/dash", "/usr/bin/bash", "/usr/bin/rbash")
BASE = re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE)[-1]
IMAGE = "nbdimg-test"
BUILD = ("bud", "--isolation=chroot", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
"""Where no limits are named, buildah 1.39 asks for 1048576 of each, which not every machine grants."""


class Builder:
    """buildah with a store of its own beneath `directory`. It needs root, and no daemon.

    `root` has the image's files once it is built; containers only read them.
    """

    root: Path

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._program = [
            *(require_program("buildah"), "--root", str(directory / "store"), "--runroot", str(directory / "run")),
            *("--storage-driver", "vfs"),
        ]

    def call(self, *arguments: str | os.PathLike[str]) -> str:
        return run_ok(*self._program, *arguments, timeout_s=BUILD_LIMIT_S).strip()

    def prepare(self) -> None:
        """The base image, and the wheels that pip will want. Raises: NotPrepared."""
        download_wheels = pip("download", f"--dest={self.directory}/wheels", _requirements(), RELEASE)
        with subprocess.Popen(download_wheels) as download:
            self._make_base()
        if download.returncode:
            raise NotPrepared(f"pip has no wheels for Python {RELEASE.python} here")

    def build(self) -> None:
        """The Dockerfile as it is, from the project's directory."""
        settings = self.directory / "pip.conf"
        settings.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        volumes = [f"--volume={self.directory}/wheels:/wheels:ro", f"--volume={settings}:/etc/pip.conf:ro"]
        options = ["--pull-never", "--layers=false", "--format=docker", f"--tag={IMAGE}"]
        self.call(*BUILD, *options, *volumes, f"--file={DOCKERFILE}", ROOT)
        self.root = self._mounted(IMAGE)

    def _make_base(self) -> None:
        container = self.call("from", "scratch")
        try:
            root = Path(self.call("mount", container))
        except AssertionError as error:
            raise NotPrepared(f"nothing can be mounted here: {error}") from None
        extract(root, RELEASE, PACKAGES)
        _finish_base(root)
        self.call("commit", "--quiet", "--disable-compression", "--rm", container, BASE)

    def context(self) -> Path:
        """What `COPY .` finds."""
        file = self.directory / "Context"
        file.write_text("FROM scratch\nCOPY . /\n")
        self.call(*BUILD, f"--tag={IMAGE}-context", f"--file={file}", ROOT)
        return self._mounted(f"{IMAGE}-context")

    def config(self) -> Any:
        """What the image says of how it is run."""
        return json.loads(self.call("inspect", "--type=image", IMAGE))["Docker"]["config"]

    def _mounted(self, image: str) -> Path:
        return Path(self.call("mount", self.call("from", "--pull-never", image)))


def _finish_base(root: Path) -> None:
    """What packages do when they are installed and not only extracted, as far as Python needs it."""
    (root / "usr/bin/python").symlink_to("python3")
    authorities = sorted((root / "usr/share/ca-certificates/mozilla").glob("*.crt"))
    certificates = root / "etc/ssl/certs"
    certificates.mkdir(parents=True, exist_ok=True)
    (certificates / "ca-certificates.crt").write_bytes(b"".join(each.read_bytes() for each in authorities))


def _requirements() -> list[str]:
    """What the Dockerfile's `pip install` wants, and what builds the project."""
    text = project()
    (extras,) = re.findall(r"'/src\[(.*)\]'", DOCKERFILE.read_text())
    optional = [each for extra in extras.split(",") for each in text["project"]["optional-dependencies"][extra]]
    return [*text["build-system"]["requires"], *text["project"]["dependencies"], *optional]


def specification(root: Path, image: Any, service: Any, volumes: dict[str, Path], environment: Sequence[str]) -> Any:
    """What runc needs to run the image as the compose service says: its own command and no privileges.

    Args:
        volumes: the host's directories, by where the service has them.
        environment: beside what the image has.
    """
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "noexec", "mode=755"]},
    ]
    for each in service["volumes"]:
        _, place, *mode = each.split(":")
        mounts.append({"destination": place, "type": "bind", "source": str(volumes[place]), "options": ["bind", *mode]})
    for each in service["tmpfs"]:
        place, _, options = each.partition(":")
        mounts.append({"destination": place, "type": "tmpfs", "source": "tmpfs", "options": options.split(",")})
    user, group = map(int, service["user"].split(":"))
    assert image["User"] == service["user"] == f"{SERVER_UID}:{SERVER_UID}"
    assert service["cap_drop"] == ["ALL"]
    kinds = ("bounding", "effective", "permitted", "inheritable", "ambient")
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": user, "gid": group},
            "args": [*image["Entrypoint"], *image["Cmd"]],
            "env": [*image["Env"], *environment],
            "cwd": "/",
            "capabilities": {kind: [] for kind in kinds},
            "noNewPrivileges": "no-new-privileges:true" in service["security_opt"],
        },
        "root": {"path": str(root), "readonly": service["read_only"]},
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
            "maskedPaths": [shell for shell in SHELLS if (root / shell.lstrip("/")).exists()],
        },
    }
