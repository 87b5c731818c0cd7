"""`connect-help`: each line is given to the program that it is for, or compared with what its manual says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest

from nbdimg.cli.main import run
from nbdimg.uri import NbdUri
from tests.support.certificates import LOOPBACK_NAMES, Authority
from tests.support.peers import peer_unavailable, require_program
from tests.support.server import NbdimgServer

USAGE = 2
PEER_LIMIT_S = 120
INITRAMFS_SCRIPT = Path("/usr/share/initramfs-tools/scripts/local-top/nbd")
CONTENT = b"boot me!" * 128 * 1024  # 1 MiB
QEMU, DRIVE, LIBVIRT, CLIENT, NBDTAB, INITRAMFS, DRACUT, LIBNBD = range(8)

Entries = list[dict[str, Any]]


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> Entries:
    assert run(["connect-help", "--json", *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["version"] == 1
    found: Entries = answer["entries"]
    return found


def words(entry: dict[str, Any]) -> list[str]:
    (line,) = entry["lines"]
    return shlex.split(line)


AWKWARD, PLAIN = "vm, one/é%", "vm1"
"""Names of exports."""

OWN = [f"127.{first}.{os.getpid() >> 8 & 255}.{os.getpid() & 255 or 1}" for first in (77, 78)]
"""Addresses of this machine at which nobody else has the default port, which not every tool can change."""


class Site:
    """One image under both names, at two Unix sockets, over TCP, and over TCP with TLS and client certificates."""

    def __init__(self, directory: Path) -> None:
        image = directory / "disk.img"
        image.write_bytes(CONTENT)
        authority = Authority(directory / "ca")
        server = authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES)
        client = authority.issue("client", common_name="alice")
        images = [f"{name}={image}" for name in (AWKWARD, PLAIN)]
        options = ["--format=raw", "--read-only"]
        sockets = [f"{directory}/a, socket", f"{directory}/s"]
        listen = ["nbd://127.0.0.1:0", f"nbd://{OWN[0]}", *(str(NbdUri(socket=each)) for each in sockets)]
        self.plain = NbdimgServer(*images, options=options, listen=listen)
        tls = [f"--tls-certificate={server.certificate_path}", f"--tls-key={server.key_path}"]
        tls += [f"--tls-client-ca={authority.path}", "--tls-min-version=1.2"]
        self.tls = NbdimgServer(*images, options=[*options, *tls], listen=["nbds://127.0.0.1:0", f"nbds://{OWN[1]}"])
        ports = [NbdUri.parse(each.uri).port for each in (self.plain, self.tls)]
        certificates = f"--tls-certificates={client.directory}"
        self.places = {
            "unix": [f"--uri={listen[2]}"],
            "unix, plain": [f"--uri={listen[3]}"],
            "tcp": [f"--uri=nbd://127.0.0.1:{ports[0]}"],
            "tcp, default port": [f"--uri=nbd://{OWN[0]}"],
            "tls": [f"--uri=nbds://127.0.0.1:{ports[1]}", certificates],
            "tls, default port": [f"--uri=nbds://{OWN[1]}", certificates, "--tls-hostname=localhost"],
        }
        """Options of connect-help."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.tls.stop()
    site.plain.stop()


KINDS = ("unix", "tcp", "tls")


def peer(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    program, *arguments = argv
    return subprocess.run(
        [require_program(program), *arguments], capture_output=True, text=True, timeout=PEER_LIMIT_S, **options
    )


# The programs


def machine(line: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A virtual machine that is built and not started; the monitor says what its disk is. The export is read-only."""
    disk = [f"{each},read-only=on" if each.startswith(("driver=nbd", "file=nbd")) else each for each in line]
    kind = ["-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"]
    return peer("qemu-system-x86_64", *kind, *disk, input="info block -v\nquit\n")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tool", [QEMU, DRIVE])
def test_qemu_builds_a_machine_from_the_line(
    site: Site, capsys: pytest.CaptureFixture[str], kind: str, tool: int
) -> None:
    done = machine(words(ask(capsys, AWKWARD, *site.places[kind])[tool]))
    assert done.returncode == 0, done.stderr
    assert "virtual size: 1 MiB (1048576 bytes)" in done.stdout, (done.stdout, done.stderr)


def test_control_qemu_builds_no_machine_from_the_line_of_an_unknown_export(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(ask(capsys, "other", *site.places["tcp"])[QEMU])
    impatient = [each.replace("open-timeout=30", "open-timeout=1") for each in line]
    assert impatient != line
    done = machine(impatient)
    assert done.returncode == 1
    assert "other" in done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_libnbd_reads_the_export_with_the_lines(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    info, copy = (shlex.split(line) for line in ask(capsys, AWKWARD, *site.places[kind])[LIBNBD]["lines"])
    done = peer(*info)
    assert done.returncode == 0, done.stderr
    assert "export-size: 1048576" in done.stdout
    done = peer(*copy, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / copy[-1]).read_bytes() == CONTENT


def negotiated(done: subprocess.CompletedProcess[str]) -> bool:
    """nbd-client says the size before it asks the kernel, which has no device here."""
    return "size = 1MB" in done.stdout


needs_no_kernel = pytest.mark.skipif(
    Path("/sys/module/nbd").exists(), reason="the kernel module nbd is loaded: nbd-client would attach a device"
)


@needs_no_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_nbd_client_negotiates_with_the_line(site: Site, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    line = words(ask(capsys, AWKWARD, *site.places[kind])[CLIENT])
    done = peer(*line)
    assert negotiated(done), (line, done.stdout, done.stderr)
    line[line.index("-name") + 1] = "other"
    assert not negotiated(peer(*line)), "control"


@needs_no_kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can put another file in the place of /etc/nbdtab")
@pytest.mark.parametrize("kind", ["unix, plain", "tcp, default port", "tls, default port"])
def test_nbd_client_negotiates_with_the_line_in_nbdtab(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (line,) = ask(capsys, PLAIN, *site.places[kind])[NBDTAB]["lines"]
    table = tmp_path / "nbdtab"
    script = 'mount --bind "$1" /etc/nbdtab && exec "$2" nbd0'

    def attach(text: str) -> subprocess.CompletedProcess[str]:
        table.write_text(f"# a comment\n{text}\n")
        return peer("unshare", "--mount", "sh", "-c", script, "sh", str(table), require_program("nbd-client"))

    done = attach(line)
    assert negotiated(done), (line, done.stdout, done.stderr)
    assert "unknown" not in (done.stdout + done.stderr).lower()
    assert not negotiated(attach(line.replace(PLAIN, "other"))), "control"


@pytest.mark.parametrize(
    ("name", "server", "arguments"),
    [
        ("vm1", "nbd://192.0.2.1", "192.0.2.1 -N vm1 10809 /dev/nbd0"),
        ("/a/b", "nbd://boot.example:99", "boot.example -N /a/b 99 /dev/nbd0"),
        ("1", "nbd://[2001:db8::1]", "2001:db8::1 -N 1 10809 /dev/nbd0"),
    ],
)
def test_initramfs_script_understands_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, server: str, arguments: str
) -> None:
    """Debian's own script, with the kernel's command line in a file and a client that shows what it was given."""
    if not INITRAMFS_SCRIPT.exists():
        peer_unavailable(f"{INITRAMFS_SCRIPT} is not installed")
    (line,) = ask(capsys, name, f"--uri={server}")[INITRAMFS]["lines"]
    command_line = tmp_path / "cmdline"
    command_line.write_text(f"quiet {line} ro\n")
    stubs = "log_begin_msg() { :; }; wait_for_udev() { :; }; configure_networking() { :; }; modprobe() { :; }"
    script = INITRAMFS_SCRIPT.read_text()
    script = script.replace("/proc/cmdline", str(command_line)).replace(". /scripts/functions", stubs)
    done = peer("sh", "-c", script, env={**os.environ, "NBDCLIENT": "echo"})
    shown = f"{arguments} -swap -persist -systemd-mark"
    assert done.stdout in (f"{shown}\n", f"{shown} -b 512\n"), done.stderr  # Debian 12's script, and 13's


@pytest.mark.parametrize("kind", KINDS)
def test_libvirt_disk_is_xml_with_the_name_the_place_and_a_delay(
    site: Site, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms"""
    name = AWKWARD + '<&">'
    entry = ask(capsys, name, *site.places[kind])[LIBVIRT]
    disk = Xml.fromstring("\n".join(entry["lines"]))
    assert (disk.tag, disk.attrib) == ("disk", {"type": "network", "device": "disk"})
    source = disk.find("source")
    assert source is not None
    assert source.attrib == {"protocol": "nbd", "name": name, **({"tls": "yes"} if kind == "tls" else {})}
    hosts = [each.attrib for each in source.findall("host")]
    uri = NbdUri.parse(site.places[kind][0].removeprefix("--uri="))
    if kind == "unix":
        assert hosts == [{"transport": "unix", "socket": uri.socket}]
    else:
        assert hosts == [{"name": "127.0.0.1", "port": str(uri.port)}]
    assert [each.attrib for each in source.findall("reconnect")] == [{"delay": "60"}]
    assert [each.attrib for each in disk.findall("driver")] == [{"name": "qemu", "type": "raw"}]
    assert disk.find("target") is not None


# What stands in the lines


def test_lines_of_a_plain_export_are_these(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["connect-help", "vm1"]) == 0
    text = capsys.readouterr().out
    assert text.split("\n\n")[0] == (
        "# qemu\n-blockdev driver=nbd,node-name=nbd0,server.type=inet,server.host=127.0.0.1,server.port=10809,"
        "export=vm1,reconnect-delay=60,open-timeout=30 -device virtio-blk-pci,drive=nbd0"
    )
    assert all(
        "a restart of the server is an I/O error" in line for line in text.splitlines() if "# nbd-client" in line
    )
    for line in (
        "nbd-client 127.0.0.1 10809 /dev/nbd0 -name vm1 -block-size 4096 -connections 4 -persist",
        "nbd0 127.0.0.1 vm1 bs=4096,conns=4,persist",
        "root=/dev/nbd0 nbdroot=127.0.0.1:10809/vm1 ip=dhcp",
        "root=nbd:127.0.0.1:vm1 ip=dhcp",
        "nbdinfo nbd://127.0.0.1/vm1",
        "nbdcopy nbd://127.0.0.1/vm1 nbd0.img",
    ):
        assert line in text.splitlines()


def test_tls_names_the_client_certificate_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["vm1", "--uri=nbds://h", f"--tls-certificates={tmp_path}", "--tls-hostname=server.example"]
    before = ask(capsys, *arguments)
    (tmp_path / "client-cert.pem").touch()
    after = ask(capsys, *arguments)
    authority = f"{tmp_path}/ca-cert.pem"
    both = f"-certfile {tmp_path}/client-cert.pem -keyfile {tmp_path}/client-key.pem"
    assert before[CLIENT]["lines"][0].endswith(f" -cacertfile {authority} -tlshostname server.example")
    assert after[CLIENT]["lines"][0].endswith(f" -cacertfile {authority} {both} -tlshostname server.example")
    assert after[NBDTAB]["lines"][0].endswith(
        f",cacertfile={authority},certfile={tmp_path}/client-cert.pem,keyfile={tmp_path}/client-key.pem,"
        "tlshostname=server.example"
    )
    for tool in (QEMU, DRIVE):
        assert "tls-hostname=server.example" in after[tool]["lines"][0]
        assert f"tls-creds-x509,id=tls0,endpoint=client,dir={tmp_path}" in words(after[tool])
    assert 'tlsHostname="server.example"' in "".join(after[LIBVIRT]["lines"])
    assert str(tmp_path) in after[LIBVIRT]["tool"]
    assert (
        after[LIBNBD]["lines"][0] == f"nbdinfo 'nbds://h/vm1?tls-certificates={tmp_path}&tls-hostname=server.example'"
    )


def test_pre_shared_key_is_named_to_the_tools_that_know_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"--tls-psk={tmp_path}", "--tls-psk-name=a b"]
    entries = ask(capsys, "vm1", "--uri=nbds://h", *keys)
    for tool in (QEMU, DRIVE):
        assert f"tls-creds-psk,id=tls0,endpoint=client,dir={tmp_path},username=a b" in words(entries[tool])
        assert "tls-creds=tls0" in entries[tool]["lines"][0]
    assert words({"lines": entries[LIBNBD]["lines"][:1]}) == [
        "nbdinfo",
        f"nbds://a%20b@h/vm1?tls-psk-file={tmp_path}/keys.psk",
    ]
    (tmp_path / "keys.psk").write_text("a b:00112233445566778899aabbccddeeff\n")
    done = machine([*words(entries[QEMU])[:2]])
    assert done.returncode == 0, done.stderr
    on_unix = ask(capsys, "vm1", "--uri=nbds+unix:///?socket=/s", *keys)[LIBNBD]["lines"][0]
    assert on_unix == f"nbdinfo 'nbds+unix://a%20b@/vm1?socket=/s&tls-psk-file={tmp_path}/keys.psk'"


@pytest.mark.parametrize(
    ("arguments", "tool", "reason"),
    [
        (("a b",), NBDTAB, "'a b' cannot be written there"),
        (("a#b",), NBDTAB, "'a#b' cannot be written there"),
        (("a", "--uri=nbd://h:99"), NBDTAB, "nbd-client takes no other port than 10809 from there"),
        (("a,b",), INITRAMFS, "'a,b' cannot be written there"),
        (("a*",), INITRAMFS, "'a*' cannot be written there"),
        (("a:b",), DRACUT, "'a:b' cannot be written there"),
        (("42",), DRACUT, "it takes 42 for a port, give the export another name"),
        (("a", "--uri=nbd://h:99"), DRACUT, "it knows names only at port 10809"),
        (("a", "--uri=nbd+unix:///?socket=/s"), DRACUT, "early boot reaches no Unix socket"),
        (("a", "--uri=nbd+unix:///?socket=/s"), INITRAMFS, "early boot reaches no Unix socket"),
        *(
            (
                ("a", "--uri=nbds://h", "--tls-psk=/c", "--tls-psk-name=n"),
                tool,
                "it knows certificates and no pre-shared keys",
            )
            for tool in (LIBVIRT, CLIENT, NBDTAB)
        ),
        (("a", "--uri=nbds://h", "--tls-certificates=/c"), DRACUT, "early boot has no TLS"),
        (("a", "--uri=nbds://h", "--tls-certificates=/c"), INITRAMFS, "early boot has no TLS"),
    ],
)
def test_tool_that_cannot_be_told_has_a_reason_and_no_lines(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], tool: int, reason: str
) -> None:
    entry = ask(capsys, *arguments)[tool]
    assert entry["lines"] == []
    assert entry["reason"] == reason
    assert run(["connect-help", *arguments]) == 0
    assert f"# {entry['tool']}: {reason}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "'' is not allowed, expected 1 to 4096 bytes without NUL"),
        (("a\nb",), "has characters that do not print"),
        (("\udcff",), "has characters that do not print"),
        (("a" * 5000,), "expected at most 4096 bytes"),
        (("a", "--uri=http://h"), "the scheme must be nbd, nbds, nbd\\+unix or nbds\\+unix"),
        (("a", "--uri=nbd://h/b"), "a listener has no export name"),
        (("a", "--uri=nbd://0.0.0.0"), "is where a server listens, expected the address and port that clients reach"),
        (("a", "--uri=nbd://[::]:99"), "is where a server listens"),
        (("a", "--uri=nbd://h:0"), "is where a server listens"),
        (("a", "--uri=nbd+unix:///?socket=s"), "expected the whole name of the socket, from / on"),
        (("a", "--uri=nbds://h"), "needs --tls-certificates DIR with ca-cert.pem"),
        (("a", "--uri=nbds://h", "--tls-certificates=c"), "c: expected the whole name of the directory, from / on"),
        (("a", "--tls-certificates=/c"), "is without TLS, expected nbds: for --tls-certificates"),
        (("a", "--uri=nbds://h", "--tls-psk=/c"), "a pre-shared key takes --tls-psk DIR and --tls-psk-name NAME"),
        (("a", "--uri=nbds://h", "--tls-psk=/c", "--tls-psk-name=a:b"), "'a:b' is not allowed, expected the name of"),
        (("a", "--tls-psk=/c", "--tls-psk-name=n"), "is without TLS, expected nbds: for --tls-psk"),
        (
            ("a", "--uri=nbds://h", "--tls-psk=/c", "--tls-psk-name=n", "--tls-hostname=h"),
            "--tls-psk takes the place of certificates",
        ),
        (("a", "--tls-hostname=h"), "is without TLS, expected nbds: for --tls-certificates"),
    ],
)
def test_target_that_cannot_be_reached_is_refused_with_a_sentence(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run(["connect-help", *arguments]) == USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert re.fullmatch(rf"nbdimg: .*{message}.*", line)
