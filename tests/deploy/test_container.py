"""The Dockerfile is built, and its container run read-only, without privileges and without a shell."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.container import SHELLS, Builder, specification
from tests.deploy.debian import NotPrepared
from tests.deploy.manifests import COMPOSE, ROOT, SERVER_UID, load
from tests.interop.samples import run, run_ok
from tests.support.peers import require_program
from tests.support.rss import wait_until
from tests.support.server import ServerProcess

LIMIT_S = 60.0
SIZE = 8 << 20
TCP = "nbd://127.0.0.1/disk"
LISTEN = "nbd://0.0.0.0:10809 nbd+unix:///?socket=/var/lib/nbdimg/nbd.sock"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="a container is built and run by root"),
    pytest.mark.timeout(600),  # the first test builds it
]


class Container(ServerProcess):
    """The image as the compose file runs it, but in a network of its own, and with a socket beside its images."""

    def __init__(self, builder: Builder, directory: Path) -> None:
        (document,) = load(COMPOSE)
        images = directory / "images"
        images.mkdir()
        self.image = images / "disk.qcow2"
        self.socket = images / "nbd.sock"
        run_ok(require_program("qemu-img"), "create", "-q", "-f", "qcow2", self.image, str(SIZE))
        overlays = directory / "overlays"
        overlays.mkdir()
        for each in (images, self.image, overlays):
            os.chown(each, SERVER_UID, SERVER_UID)
        volumes = {"/etc/nbdimg": COMPOSE.parent / "config", "/var/lib/nbdimg": images, "/var/tmp": overlays}
        bundle = directory / "bundle"
        bundle.mkdir()
        service = document["services"]["nbdimg"]
        wanted = specification(builder.root, builder.config(), service, volumes, [f"NBDIMG_LISTEN={LISTEN}"])
        (bundle / "config.json").write_text(json.dumps(wanted))
        self.root = builder.root
        self._name = f"nbdimg-test-{uuid.uuid4().hex}"
        self._runc = [require_program("runc"), "--root", str(directory / "runc")]
        super().__init__([*self._runc, "run", "--bundle", str(bundle), self._name])

    def state(self) -> Any:
        return json.loads(run_ok(*self._runc, "state", self._name))

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """As `docker exec` does."""
        return run(*self._runc, "exec", self._name, *command)

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        return self.execute("/opt/nbdimg/bin/python", "-c", code)

    def beside(self, *command: str) -> str:
        """A program of this machine in the container's network."""
        return run_ok(require_program("nsenter"), f"--net=/proc/{self.state()['pid']}/ns/net", *command)

    def terminate(self) -> None:
        """To the container's first process, as `docker stop` does."""
        run(*self._runc, "kill", self._name, "TERM")

    def kill(self) -> None:
        run(*self._runc, "delete", "--force", self._name)
        super().kill()


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    builder = Builder(tmp_path_factory.mktemp("container"))
    try:
        builder.prepare()
    except NotPrepared as error:
        pytest.skip(str(error))
    builder.build()
    yield builder
    builder.call("rm", "--all")
    builder.call("rmi", "--all", "--force")


@pytest.fixture(scope="module")
def container(builder: Builder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    with Container(builder, tmp_path_factory.mktemp("bundle")) as container:
        ready = "nbd+unix:///disk?socket="
        assert wait_until(lambda: not container.is_running() or ready in container.stdout(), LIMIT_S)
        assert container.is_running(), container.stderr()
        yield container


def healthcheck(builder: Builder, container: Container) -> int:
    """The image's own."""
    kind, *command = builder.config()["Healthcheck"]["Test"]
    assert kind == "CMD"
    return container.execute(*command).returncode


def test_container_serves_over_tcp_and_a_mounted_socket(container: Container) -> None:
    assert container.beside(require_program("nbdinfo"), "--size", TCP).strip() == str(SIZE)
    uri = f"nbd+unix:///disk?socket={container.socket}"
    commands = ["-c", "write -P 0xcd 1M 1M", "-c", "flush", "-c", "read -P 0xcd 1M 1M"]
    output = run_ok(require_program("qemu-io"), "-f", "raw", *commands, uri)
    assert "read 1048576/1048576" in output
    assert "Pattern verification failed" not in output


def test_container_health_metrics_and_probes_answer(builder: Builder, container: Container) -> None:
    assert healthcheck(builder, container) == 0
    for probe in ("live", "ready", "startup"):
        check = ["nbdimg", "healthcheck", "--url", "http://127.0.0.1:9809", probe]
        assert container.execute(*check).returncode == 0
    nobody = ["nbdimg", "healthcheck", "--socket", "/run/nbdimg/nobody.sock", "live"]
    assert container.execute(*nobody).returncode != 0


def test_container_is_a_plain_user_without_capabilities(container: Container) -> None:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{container.state()['pid']}/status").read_text().splitlines()
    )
    assert status["Uid"].split() == status["Gid"].split() == [str(SERVER_UID)] * 4
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert status["Groups"].split() in ([], [str(SERVER_UID)])


def test_container_root_is_read_only_and_its_volumes_are_not(container: Container) -> None:
    for path in ("/x", "/tmp/x", "/etc/nbdimg/x", "/opt/nbdimg/x"):
        assert "Read-only file system" in container.python(f"open({path!r}, 'w')").stderr
    for path in ("/run/nbdimg/x", "/var/lib/nbdimg/x", "/var/tmp/x"):
        assert container.python(f"open({path!r}, 'w')").returncode == 0


def test_container_runs_where_no_shell_can_be_executed(container: Container) -> None:
    assert any((container.root / shell.lstrip("/")).exists() for shell in SHELLS)
    done = container.execute("/bin/sh", "-c", "true")
    assert done.returncode != 0
    assert "permission denied" in done.stderr


def test_build_is_given_the_sources_alone(builder: Builder) -> None:
    root = builder.context()
    assert {path.name for path in root.iterdir()} == {"nbdimg", "LICENSE", "README.md", "pyproject.toml"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "nbdimg").rglob("*.py")}
    assert {str(path.relative_to(root)) for path in (root / "nbdimg").rglob("*") if path.is_file()} == {
        *sources,
        "nbdimg/py.typed",
    }


def test_container_image_holds_the_program_and_nothing_for_tests(container: Container) -> None:
    packages = container.root / "opt/nbdimg/lib/python3.13/site-packages"
    assert {"nbdimg", "uvloop", "cryptography"} <= {path.name for path in packages.iterdir()}
    assert "pytest" not in {path.name for path in packages.iterdir()}
    assert not (container.root / "src").exists()
    assert "3.13" in container.python("import sys; print(sys.version)").stdout


def test_container_drains_at_sigterm_and_ends_with_status_zero(builder: Builder, tmp_path: Path) -> None:
    with Container(builder, tmp_path) as container:
        assert wait_until(lambda: not container.is_running() or container.socket.exists(), LIMIT_S)
        assert wait_until(lambda: not container.is_running() or healthcheck(builder, container) == 0, LIMIT_S)
        container.terminate()
        assert container.wait() == 0, container.stderr()
        assert not container.socket.exists()
    run_ok(require_program("qemu-img"), "check", "-q", container.image)
