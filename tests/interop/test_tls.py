"""The peers' clients over TLS: libnbd (GnuTLS) and QEMU (GnuTLS), with certificates both ways, 64 MiB compared.

The controls: a client without its certificate, one that does not trust the server's authority, and one that expects
another host name, which must all fail.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdimg.uri import NbdUri
from tests.support.certificates import LOOPBACK_NAMES, Authority, Identity
from tests.support.rawprotocol import MIB
from tests.support.server import NbdimgServer

SIZE = 64 * MIB
SEED = 1809
TIMEOUT_S = 120


class Site:
    """An authority, the server's and a client's certificate, and 64 MiB of random bytes with a hole in their middle."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory / "ca")
        self.server = self.authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES)
        self.client = self.authority.issue("client", common_name="alice")
        content = bytearray(random.Random(SEED).randbytes(SIZE))
        content[20 * MIB : 30 * MIB] = bytes(10 * MIB)
        self.source = directory / "source.raw"
        self.source.write_bytes(content)

    def options(self, *more: str) -> list[str]:
        return [
            "--format=raw",
            f"--tls-certificate={self.server.certificate_path}",
            f"--tls-key={self.server.key_path}",
            f"--tls-client-ca={self.authority.path}",
            *more,
        ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server(site: Site, tmp_path: Path) -> Iterator[NbdimgServer]:
    """A server of `source.raw` as "source" and of an empty image of the same size as "target"."""
    target = tmp_path / "target.raw"
    target.touch()
    with open(target, "r+b") as file:
        file.truncate(SIZE)
    images = (f"source={site.source}", f"target={target}")
    with NbdimgServer(*images, options=site.options(), listen=["nbds://127.0.0.1:0"]) as running:
        yield running


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S)


def checked(*argv: str) -> str:
    done = run(*argv)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def uri(server: NbdimgServer, name: str, identity: Identity) -> str:
    """As libnbd wants it: where the certificates are stands in the URI."""
    port = NbdUri.parse(server.uri).port
    return f"nbds://127.0.0.1:{port}/{name}?tls-certificates={identity.directory}"


def qemu_options(server: NbdimgServer, name: str, identity: Identity, more: str = "") -> list[str]:
    port = NbdUri.parse(server.uri).port
    credentials = f"tls-creds-x509,id=tls0,dir={identity.directory},endpoint=client{more}"
    return [
        "--object",
        credentials,
        "--image-opts",
        f"driver=nbd,host=127.0.0.1,port={port},export={name},tls-creds=tls0",
    ]


def test_nbdinfo_lists_and_describes_over_tls(server: NbdimgServer, site: Site) -> None:
    assert server.uri.startswith("nbds://127.0.0.1:")
    listing = checked("nbdinfo", "--list", uri(server, "", site.client))
    assert 'export="source"' in listing
    assert 'export="target"' in listing
    assert "newstyle-fixed with TLS" in listing
    assert checked("nbdinfo", "--size", uri(server, "source", site.client)).strip() == str(SIZE)


def test_nbdcopy_carries_64_mib_in_both_directions(server: NbdimgServer, site: Site, tmp_path: Path) -> None:
    received = tmp_path / "received.raw"
    checked("nbdcopy", uri(server, "source", site.client), str(received))
    checked("cmp", str(received), str(site.source))
    checked("nbdcopy", "--flush", str(site.source), uri(server, "target", site.client))
    checked("cmp", str(tmp_path / "target.raw"), str(site.source))


def test_nbdcopy_from_export_to_export_over_four_connections(server: NbdimgServer, site: Site, tmp_path: Path) -> None:
    source, target = (uri(server, name, site.client) for name in ("source", "target"))
    checked("nbdcopy", "--flush", "--connections=4", source, target)
    checked("cmp", str(tmp_path / "target.raw"), str(site.source))


def test_qemu_img_carries_64_mib_in_both_directions(server: NbdimgServer, site: Site, tmp_path: Path) -> None:
    received = tmp_path / "received.raw"
    checked("qemu-img", "convert", *qemu_options(server, "source", site.client), "-O", "raw", str(received))
    checked("cmp", str(received), str(site.source))
    target = qemu_options(server, "target", site.client)
    checked("qemu-img", "convert", "-n", "-f", "raw", *target[:2], "--target-image-opts", str(received), target[3])
    checked("cmp", str(tmp_path / "target.raw"), str(site.source))


def test_qemu_io_writes_zeroes_and_reads_over_tls(server: NbdimgServer, site: Site) -> None:
    commands = ("write -P 7 4096 1M", "write -z 8192 64k", "read -P 7 4096 4096", "read -P 0 8192 64k", "flush")
    arguments = [part for command in commands for part in ("-c", command)]
    output = checked("qemu-io", *qemu_options(server, "target", site.client), *arguments)
    assert "failed" not in output


def test_qemu_with_tls_1_2_is_served_where_that_is_allowed_and_refused_elsewhere(
    server: NbdimgServer, site: Site, tmp_path: Path
) -> None:
    only_1_2 = ",priority=NORMAL:-VERS-ALL:+VERS-TLS1.2"
    assert run("qemu-img", "info", *qemu_options(server, "source", site.client, only_1_2)).returncode != 0
    received = tmp_path / "received.raw"
    copied = shutil.copy(site.source, tmp_path / "copied.raw")
    options = site.options("--tls-min-version=1.2", "--read-only")
    with NbdimgServer(f"source={copied}", options=options, listen=["nbds://127.0.0.1:0"]) as older:
        arguments = qemu_options(older, "source", site.client, only_1_2)
        checked("qemu-img", "convert", *arguments, "-O", "raw", str(received))
    checked("cmp", str(received), str(site.source))


def test_libnbd_over_a_unix_socket(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = f"nbds+unix:///?socket={path}"
    with NbdimgServer(f"source={site.source}", options=site.options("--read-only"), listen=[listener]):
        where = f"nbds+unix://localhost/source?socket={path}&tls-certificates={site.client.directory}"
        described = checked("nbdinfo", where)
        assert "newstyle-fixed with TLS" in described
        assert "is_read_only: true" in described


def test_control_client_of_a_stranger_is_refused_and_logged(server: NbdimgServer, site: Site, tmp_path: Path) -> None:
    """It trusts the server; the server does not know who issued its certificate."""
    stranger = Authority(tmp_path / "stranger", "somebody else").issue("client")
    (stranger.directory / "ca-cert.pem").write_bytes(Path(site.authority.path).read_bytes())
    assert run("nbdinfo", uri(server, "source", stranger)).returncode != 0
    assert run("qemu-img", "info", *qemu_options(server, "source", stranger)).returncode != 0
    assert server.is_running()
    assert checked("nbdinfo", "--size", uri(server, "source", site.client)).strip() == str(SIZE)


def test_control_client_that_does_not_trust_the_server_leaves(server: NbdimgServer, site: Site, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "stranger", "somebody else").issue("client")
    assert run("nbdinfo", uri(server, "source", stranger)).returncode != 0
    assert checked("nbdinfo", "--size", uri(server, "source", site.client)).strip() == str(SIZE)


def test_control_client_without_tls_is_told_that_it_is_required(server: NbdimgServer) -> None:
    plain = server.uri.replace("nbds://", "nbd://", 1)
    done = run("nbdcopy", plain, "null:")
    assert done.returncode != 0
    assert "TLS" in done.stderr
    port = NbdUri.parse(server.uri).port
    assert "TLS" in run("qemu-img", "info", f"nbd://127.0.0.1:{port}/source").stderr


def test_control_server_certificate_for_another_host_is_refused_by_the_client(site: Site) -> None:
    other = site.authority.issue("server", common_name="elsewhere.example")
    options = [*site.options(), f"--tls-certificate={other.certificate_path}", f"--tls-key={other.key_path}"]
    with NbdimgServer(f"source={site.source}", options=options, listen=["nbds://127.0.0.1:0"]) as running:
        assert run("nbdinfo", uri(running, "source", site.client)).returncode != 0
