"""The compose file and the Dockerfile: read by docker-compose itself, and in agreement with the program."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nbdimg import __version__
from nbdimg.cli.healthcheck import DEFAULT_SOCKET
from tests.deploy.manifests import COMPOSE, DOCKERFILE, ROOT, SERVER_UID, containers, load, moved, parsed, pods
from tests.interop.samples import run, run_ok
from tests.support.peers import require_program

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"nbdimg:{__version__}"
CONFIG = COMPOSE.parent / "config/nbdimg.toml"


@pytest.fixture(scope="module")
def service() -> Any:
    (document,) = load(COMPOSE)
    return document["services"]["nbdimg"]


def instruction(name: str) -> str:
    """The arguments of the last such instruction of the Dockerfile."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    *_, last = re.findall(rf"^ *{name} (.*)$", text, re.MULTILINE)
    return str(last)


def test_compose_file_is_read_by_docker_compose() -> None:
    assert IMAGE in run_ok(require_program("docker-compose"), "-f", COMPOSE, "config")


def test_control_compose_file_with_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("read_only:", "readonly:"))
    done = run(require_program("docker-compose"), "-f", wrong, "config")
    assert done.returncode != 0
    assert "readonly" in done.stderr


def test_compose_service_is_hardened(service: Any) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == f"{SERVER_UID}:{SERVER_UID}"
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    volumes = [volume.split(":")[1:] for volume in service["volumes"]]
    assert volumes == [["/etc/nbdimg", "ro"], ["/var/lib/nbdimg"], ["/var/tmp"]]


def test_compose_ports_are_those_of_its_configuration_and_of_the_image(service: Any) -> None:
    text = CONFIG.read_text()
    published = [port.split(":")[1:] for port in service["ports"]]
    assert published == [["10809", "10809"], ["9809", "9809"]]
    assert all(f"0.0.0.0:{inside}" in text for _, inside in published)
    assert instruction("EXPOSE").split() == [inside for _, inside in published]


def test_compose_gives_more_time_to_stop_than_the_drain_takes(service: Any) -> None:
    drain_s = tomllib.loads(CONFIG.read_text())["limits"]["drain_timeout"]
    assert 0 < drain_s < int(service["stop_grace_period"].removesuffix("s"))


def test_compose_configuration_passes_the_programs_own_check(tmp_path: Path) -> None:
    file = tmp_path / "nbdimg.toml"
    file.write_text(moved(CONFIG.read_text(), {"/var/lib/nbdimg": tmp_path}))
    done = run(sys.executable, "-m", "nbdimg", "config", "check", file)
    assert done.returncode == 0, done.stderr


def test_image_name_and_version_are_the_same_everywhere(service: Any) -> None:
    names = [service["image"], *(each["image"] for pod in pods().values() for each in containers(pod))]
    assert sorted(set(names)) == [IMAGE, "registry.example/qemu:1"]
    assert f"-t {IMAGE} " in DOCKERFILE.read_text()
    assert f'image.version="{__version__}"' in DOCKERFILE.read_text()
    assert PROJECT["version"] == __version__


def test_dockerfile_installs_every_extra_but_that_for_tests() -> None:
    (extras,) = re.findall(r"'/src\[(.*)\]'", DOCKERFILE.read_text())
    assert set(extras.split(",")) == set(PROJECT["optional-dependencies"]) - {"test"}


def test_dockerfile_commands_are_the_programs() -> None:
    assert json.loads(instruction("ENTRYPOINT")) == ["nbdimg"]
    serve = parsed(json.loads(instruction("CMD")))
    program, *check = json.loads(instruction("HEALTHCHECK").partition("CMD")[2])
    assert (program, check[0], check[1:]) == ("nbdimg", "healthcheck", ["startup"])
    assert serve["admin_socket"] == DEFAULT_SOCKET
    assert instruction("USER") == f"{SERVER_UID}:{SERVER_UID}"
