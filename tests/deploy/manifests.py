"""What is shipped to deploy: manifests as data, their arguments as the command line reads them, and their paths moved
into a directory of the test's own.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from kubernetes_validate.utils import resources_from_file  # type: ignore[import-untyped]

from nbdimg.cli.main import app

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "conf/kubernetes"
SYSTEMD = ROOT / "conf/systemd"
COMPOSE = ROOT / "docker/compose.yaml"
DOCKERFILE = ROOT / "docker/Dockerfile"
SERVER_UID = 10809


def load(path: Path) -> list[Any]:
    """The documents of a YAML file."""
    return list(resources_from_file(str(path)))


def manifest(name: str) -> Any:
    """The one document of `conf/kubernetes/NAME.yaml`."""
    (document,) = load(KUBERNETES / f"{name}.yaml")
    return document


def pods() -> dict[str, Any]:
    """The specification of each Pod that is shipped, by its manifest's name."""
    return {"sidecar": manifest("sidecar")["spec"], "deployment": manifest("deployment")["spec"]["template"]["spec"]}


def server_container(pod: Mapping[str, Any]) -> Any:
    (found,) = (each for each in containers(pod) if each["name"] == "nbdimg")
    return found


def containers(pod: Mapping[str, Any]) -> list[Any]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """The values of a command's options and arguments, as nbdimg's own command line reads them; it does not run.

    Raises: click's UsageError: an option or a value is not allowed.
    """
    commands: Any = typer.main.get_command(app)
    name, *rest = arguments
    return dict(commands.commands[name].make_context(name, rest).params)


def moved(text: str, places: Mapping[str, Path | str]) -> str:
    """`text` with each place, a path or an address, exchanged for the one that stands for it here."""
    for place, other in places.items():
        text = text.replace(place, str(other))
    return text


def mounts(container: Mapping[str, Any], directory: Path) -> dict[str, Path]:
    """A new directory for each of the container's mounts, by where it is mounted; a volume has the same one for all."""
    found: dict[str, Path] = {}
    for each in container["volumeMounts"]:
        found[each["mountPath"]] = directory / each["name"]
        found[each["mountPath"]].mkdir(exist_ok=True)
    return found


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody has at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
