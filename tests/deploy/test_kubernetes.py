"""The manifests: valid for Kubernetes, in agreement with each other and the program, and served from as written."""

from __future__ import annotations

import copy
import http.client
import json
import os
import socket
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
from cryptography import x509

from nbdimg.cli.main import run as run_command
from nbdimg.configfile.environment import from_environment
from nbdimg.limits import Limits
from nbdimg.units import MiB, parse_size
from tests.deploy.manifests import (
    KUBERNETES,
    SERVER_UID,
    containers,
    free_port,
    load,
    manifest,
    mounts,
    moved,
    parsed,
    pods,
    server_container,
)
from tests.interop.samples import run, run_ok
from tests.support.certificates import LOOPBACK_NAMES, Authority, Identity
from tests.support.peers import require_program
from tests.support.rss import wait_until
from tests.support.server import ServerProcess

KUBERNETES_VERSIONS = ("1.29", kubernetes_validate.latest_version())
"""Native sidecars are on by default from the first."""

OTHERS = {"PodMonitor", "Kustomization"}
"""Not Kubernetes' own: no schema is at hand, their shape is looked at below."""

DOCUMENTS = [(path.name, document) for path in sorted(KUBERNETES.glob("*.yaml")) for document in load(path)]
OWN = [pytest.param(document, id=name) for name, document in DOCUMENTS if document["kind"] not in OTHERS]

POD_MONITOR_SPEC = {
    "selector",
    "namespaceSelector",
    "jobLabel",
    "podTargetLabels",
    "podMetricsEndpoints",
    "sampleLimit",
}
POD_METRICS_ENDPOINT = {"port", "path", "scheme", "interval", "scrapeTimeout", "relabelings", "metricRelabelings"}
"""Of monitoring.coreos.com/v1, those that a manifest as simple as this one may have."""

LIMIT_S = 30.0
SIZE = 8 * MiB
PODS = pods()


@pytest.fixture(params=PODS)
def pod(request: pytest.FixtureRequest) -> Any:
    return PODS[request.param]


# Validity


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("document", OWN)
def test_manifest_is_valid(document: Any, version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_control_misspelt_field_and_wrong_type_are_refused(version: str) -> None:
    sidecar = manifest("sidecar")
    misspelt, wrong = copy.deepcopy(sidecar), copy.deepcopy(sidecar)
    server_container(misspelt["spec"])["restartPolice"] = "Always"
    server_container(wrong["spec"])["ports"][0]["containerPort"] = "metrics"
    for document, found in ((misspelt, "'restartPolice' was unexpected"), (wrong, "'metrics' is not of type")):
        with pytest.raises(kubernetes_validate.ValidationError, match=found):
            kubernetes_validate.validate(document, version, strict=True)


def test_pod_monitor_has_its_documented_shape() -> None:
    monitor = manifest("podmonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert {"apiVersion", "kind", "metadata", "spec"} == set(monitor)
    assert set(monitor["spec"]) <= POD_MONITOR_SPEC
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert set(endpoint) <= POD_METRICS_ENDPOINT


def test_kustomization_names_files_that_are_there() -> None:
    kustomization = manifest("kustomization")
    assert set(kustomization) == {"apiVersion", "kind", "resources"}
    assert kustomization["apiVersion"] == "kustomize.config.k8s.io/v1beta1"
    assert {manifest(name.removesuffix(".yaml"))["kind"] for name in kustomization["resources"]} == {
        *("ConfigMap", "PersistentVolumeClaim", "Deployment", "Service")
    }


# Agreement


def test_pod_arguments_and_environment_are_the_programs(pod: Any) -> None:
    container = server_container(pod)
    arguments = parsed(container["args"])
    problems: list[str] = []
    environment = {each["name"]: each["value"] for each in container.get("env", ())}
    found = from_environment(environment, problems)
    given = [found.listeners, found.allows_plaintext, found.reload, *found.limits.values()]
    assert problems == []
    assert len([each for each in given if each is not None]) == len(environment)
    assert arguments["config"] or arguments["images"]


def test_control_misspelt_argument_is_refused() -> None:
    with pytest.raises(Exception, match="No such option: --metrics-lisen"):
        parsed(["serve", "--metrics-lisen=0.0.0.0:9809"])


def test_config_map_names_files_that_are_mounted() -> None:
    """What it says is proved below, by serving it."""
    container = server_container(PODS["deployment"])
    volumes = {each["name"]: each for each in PODS["deployment"]["volumes"]}
    config = parsed(container["args"])["config"]
    directories = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
    mounted = directories[os.path.dirname(config)]
    assert mounted["configMap"]["name"] == manifest("configmap")["metadata"]["name"]
    assert list(manifest("configmap")["data"]) == [os.path.basename(config)]
    assert volumes["tls"]["secret"]["defaultMode"] & 0o007 == 0


def test_pod_ports_and_probes_agree_with_what_is_listened_to(pod: Any) -> None:
    container = server_container(pod)
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    arguments = parsed(container["args"])
    text = manifest("configmap")["data"]["nbdimg.toml"] if arguments["config"] else "\n".join(container["args"])
    for port in ports.values():
        assert f"0.0.0.0:{port}" in text
    assert ports["metrics"] == 9809
    paths = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert paths == {
        "startup": {"path": "/startupz", "port": "metrics"},
        "liveness": {"path": "/livez", "port": "metrics"},
        "readiness": {"path": "/readyz", "port": "metrics"},
    }


def test_service_and_pod_monitor_select_ports_of_the_pods() -> None:
    sidecar, template = manifest("sidecar"), manifest("deployment")["spec"]["template"]
    service, monitor = manifest("service")["spec"], manifest("podmonitor")["spec"]
    labels = [each["metadata"]["labels"].items() for each in (sidecar, template)]
    assert [service["selector"].items() <= each for each in labels] == [False, True]
    assert [monitor["selector"]["matchLabels"].items() <= each for each in labels] == [True, True]
    assert manifest("deployment")["spec"]["selector"]["matchLabels"].items() <= labels[1]
    (port,) = service["ports"]
    names = [{each["name"] for each in server_container(pod)["ports"]} for pod in PODS.values()]
    assert port["targetPort"] in names[1]
    assert port["port"] == 10809
    for endpoint in monitor["podMetricsEndpoints"]:
        assert all(endpoint["port"] in each for each in names)
    for each in (sidecar, template):
        assert each["metadata"]["annotations"]["prometheus.io/port"] == "9809"


def test_pod_runs_as_a_plain_user_and_writes_only_to_its_volumes(pod: Any) -> None:
    security = pod["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (SERVER_UID,) * 3
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(pod):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    volumes = {each["name"] for each in pod["volumes"]}
    assert {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]} == volumes


def test_pod_gives_more_time_to_stop_than_the_drain_takes(pod: Any) -> None:
    arguments = parsed(server_container(pod)["args"])
    drain_s = float(arguments["drain_timeout"] or 0)
    if arguments["config"]:
        drain_s = tomllib.loads(manifest("configmap")["data"]["nbdimg.toml"])["limits"]["drain_timeout"]
    assert 0 < drain_s <= pod["terminationGracePeriodSeconds"] / 2


def test_pod_memory_holds_what_may_be_in_flight(pod: Any) -> None:
    container = server_container(pod)
    limit = parse_size(container["resources"]["limits"]["memory"].replace("Mi", "MiB"))
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    environment = {each["name"]: each["value"] for each in container.get("env", ())}
    in_flight = parse_size(environment.get("NBDIMG_LIMIT_TOTAL_BYTES", str(Limits().total_bytes)))
    assert in_flight + 100 * MiB < limit


def test_sidecar_is_a_native_one_that_shares_its_socket() -> None:
    pod = PODS["sidecar"]
    (sidecar,), (main,) = pod["initContainers"], pod["containers"]
    assert sidecar["restartPolicy"] == "Always"
    listener = parsed(sidecar["args"])["listen"][0]
    directory = os.path.dirname(listener.partition("socket=")[2])
    shared = [
        each["name"] for each in (*sidecar["volumeMounts"], *main["volumeMounts"]) if each["mountPath"] == directory
    ]
    assert len(shared) == 2
    (volume,) = (each for each in pod["volumes"] if {each["name"]} == set(shared))
    assert "emptyDir" in volume


# As written


class Site:
    """The Deployment's volumes: the secret as files, the ConfigMap as the kubelet mounts it, an image."""

    def __init__(self, directory: Path) -> None:
        container = server_container(PODS["deployment"])
        self.mounts = mounts(container, directory)
        self.ports = {each["name"]: free_port() for each in container["ports"]}
        self.places: dict[str, Path | str] = {
            **self.mounts,
            **{
                f"0.0.0.0:{each['containerPort']}": f"127.0.0.1:{self.ports[each['name']]}"
                for each in container["ports"]
            },
        }
        self.text = moved(manifest("configmap")["data"]["nbdimg.toml"], self.places)
        self._revision = 0
        self.update_config(self.text)
        self.authority = Authority(directory / "authority")
        self._store_secret(self.authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES))
        self.images = self.mounts["/var/lib/nbdimg"]
        run_ok(require_program("qemu-img"), "create", "-q", "-f", "qcow2", self.images / "vm1.qcow2", str(SIZE))
        self.argv = [sys.executable, "-m", "nbdimg", *(moved(each, self.places) for each in container["args"])]

    @property
    def config_path(self) -> Path:
        return self.mounts["/etc/nbdimg"] / "nbdimg.toml"

    def update_config(self, text: str) -> None:
        """A new directory, and then the link to it exchanged."""
        self._revision += 1
        directory = self.config_path.parent
        version = directory / f"..{self._revision}"
        version.mkdir()
        (version / "nbdimg.toml").write_text(text)
        (directory / "..new").symlink_to(version.name)
        (directory / "..new").rename(directory / "..data")
        if not self.config_path.is_symlink():
            self.config_path.symlink_to("..data/nbdimg.toml")

    def _store_secret(self, server: Identity) -> None:
        secret = self.mounts["/run/secrets/nbdimg-tls"]
        for name, source in (
            ("tls.crt", server.certificate_path),
            ("tls.key", server.key_path),
            ("ca.crt", self.authority.path),
        ):
            (secret / name).write_bytes(Path(source).read_bytes())
            (secret / name).chmod(PODS["deployment"]["volumes"][1]["secret"]["defaultMode"])

    def size(self, name: str, client: Identity) -> str:
        """What nbdinfo says of the export; nothing when it may not open it."""
        uri = f"nbds://localhost:{self.ports['nbd']}/{name}?tls-certificates={client.directory}"
        return run(require_program("nbdinfo"), "--size", uri).stdout.strip()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def status(port: int, path: str) -> int:
    """Of GET; 0 while nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def probe(server: ServerProcess, container: Mapping[str, Any], port: int) -> None:
    """As the kubelet does it: startup until it succeeds, then the others."""
    path = container["startupProbe"]["httpGet"]["path"]
    wait_until(lambda: not server.is_running() or status(port, path) == 200, LIMIT_S)
    assert status(port, path) == 200
    for kind in ("liveness", "readiness"):
        assert status(port, container[f"{kind}Probe"]["httpGet"]["path"]) == 200
    assert status(port, manifest("podmonitor")["spec"]["podMetricsEndpoints"][0]["path"]) == 200
    assert status(port, "/nosuch") == 404


def test_config_map_passes_the_programs_own_check(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["config", "check", str(site.config_path)]) == 0
    assert "1 export at nbds://127.0.0.1" in capfd.readouterr().out
    site.config_path.write_text(site.text.replace("drain_timeout", "drain_timeot"))
    assert run_command(["config", "check", str(site.config_path)]) == 2
    assert "limits.drain_timeot: unknown key" in capfd.readouterr().err


def test_deployment_serves_its_config_map_over_tls_and_takes_up_a_change(site: Site) -> None:
    vm1, other = (
        site.authority.issue("client", common_name=name, names=[x509.DNSName(f"{name}.example")])
        for name in ("vm1", "other")
    )
    with ServerProcess(site.argv) as server:
        probe(server, server_container(PODS["deployment"]), site.ports["metrics"])
        assert site.size("vm1", vm1) == str(SIZE)
        assert site.size("vm1", other) == ""
        (site.images / "second.img").write_bytes(bytes(MiB))
        export = f'[[exports]]\nname = "second"\npath = "{site.images}/second.img"\nformat = "raw"\n'
        site.update_config(f"{site.text}\n{export}")
        assert wait_until(lambda: site.size("second", other) == str(MiB), LIMIT_S, 0.5), server.stderr()
        server.terminate()
        assert server.wait() == 0


class Machine:
    """The sidecar's main container: qemu as its manifest says, but for the places and that no processor runs."""

    def __init__(self, places: Mapping[str, Path | str], directory: Path) -> None:
        (container,) = PODS["sidecar"]["containers"]
        path = str(directory / "qmp")
        argv = [*container["command"], *(moved(each, places) for each in container["args"])]
        argv[0] = require_program(argv[0])
        self.process = subprocess.Popen(
            [*argv, "-S", "-qmp", f"unix:{path},server=on,wait=off"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(LIMIT_S)
        assert wait_until(lambda: self.process.poll() is not None or self.socket.connect_ex(path) == 0, LIMIT_S)
        self.answers = self.socket.makefile()
        self.answers.readline()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: str) -> Any:
        self.socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
        while "event" in (answer := json.loads(self.answers.readline())):
            pass
        return answer["return"]

    def qemu_io(self, command: str) -> None:
        """What the guest's driver could ask of the disk; qemu prints what comes of it on its own standard output."""
        line = f'qemu-io -d /machine/peripheral-anon/device[0]/virtio-backend "{command}"'
        assert self.command("human-monitor-command", **{"command-line": line}) == ""

    def close(self) -> int:
        self.socket.close()
        self.process.terminate()
        return self.process.wait(LIMIT_S)


@pytest.fixture
def sidecar_places(tmp_path: Path) -> dict[str, Path | str]:
    return {**mounts(server_container(PODS["sidecar"]), tmp_path), "0.0.0.0:9809": f"127.0.0.1:{free_port()}"}


def test_sidecar_starts_and_its_machine_writes_to_the_image(
    sidecar_places: dict[str, Path | str], tmp_path: Path
) -> None:
    container = server_container(PODS["sidecar"])
    image = Path(sidecar_places["/var/lib/nbdimg"], "vm1.qcow2")
    run_ok(require_program("qemu-img"), "create", "-q", "-f", "qcow2", image, str(SIZE))
    arguments = [moved(each, sidecar_places) for each in container["args"]]
    environment = {each["name"]: each["value"] for each in container["env"]}
    with ServerProcess([sys.executable, "-m", "nbdimg", *arguments], environment) as server:
        probe(server, container, int(str(sidecar_places["0.0.0.0:9809"]).rpartition(":")[2]))
        machine = Machine(sidecar_places, tmp_path)
        try:
            (node,) = (each for each in machine.command("query-named-block-nodes") if each["node-name"] == "disk")
            assert (node["drv"], node["image"]["virtual-size"]) == ("nbd", SIZE)
            machine.qemu_io("write -P 0xab 64k 64k")
        finally:
            machine.close()
        server.terminate()
        assert server.wait() == 0
    found = run_ok(require_program("qemu-io"), "-r", "-f", "qcow2", "-c", "read -P 0xab 64k 64k", image)
    assert "read 65536/65536" in found
    assert "Pattern verification failed" not in found
