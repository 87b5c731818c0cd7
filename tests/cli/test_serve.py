"""`nbdimg serve` as a process: exit statuses, one line for every error, URIs, signals."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nbdimg import __version__
from nbdimg.cli.main import run
from tests.support.certificates import Authority
from tests.support.rawclient import Client, try_connect
from tests.support.rawprotocol import Command, TransmissionFlag
from tests.support.rss import wait_until
from tests.support.server import NbdimgServer, ServerProcess, complaints

USAGE, IMAGE, LISTEN = 2, 3, 4
START_LIMIT_S = 3.0
"""From the command to the URI; it takes about 0.3 s on an idle machine."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xd1" * 65536)
    return path


@pytest.fixture
def socket_uri(tmp_path: Path) -> str:
    return f"nbd+unix:///?socket={tmp_path}/s"


def command(*arguments: str | os.PathLike[str] | bytes) -> list[str | bytes]:
    return [sys.executable, "-m", "nbdimg", *(os.fspath(argument) for argument in arguments)]


def execute(*arguments: str | os.PathLike[str] | bytes, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run to the end; a server that does start is a failure by the timeout."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONUTF8": "1"}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, errors="replace", timeout=20, cwd=cwd, env=environment
    )


def assert_one_line(stderr: str, pattern: str) -> None:
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert re.fullmatch(r"nbdimg: \S.*", lines[0]), stderr
    assert re.search(pattern, lines[0]), stderr
    assert "Traceback" not in stderr
    assert "internal error" not in stderr


def refuse(capfd: pytest.CaptureFixture[str], arguments: Sequence[str], status: int, pattern: str) -> None:
    """Run in this process, which takes milliseconds, and expect an exit status, one line, and no URI."""
    assert run(["serve", *arguments]) == status
    captured = capfd.readouterr()
    assert_one_line(captured.err, pattern)
    assert captured.out == ""


def size_of(address: str | tuple[str, int], name: str) -> int:
    with Client(address, 10) as client:
        client.greet()
        return client.negotiate(name).size


# Usage: exit status 2


@pytest.mark.parametrize(
    "arguments",
    [
        *(("serve", "--allow-references="), ("serve", "--image-directory=a", "--image-directory=")),
        *(("serve", "--config="), ("info", "--allow-references="), ("ctl", "add", "--allow-references=")),
        ("ctl", "status", "--socket="),
    ],
)
def test_option_that_names_a_file_takes_no_empty_name(
    capfd: pytest.CaptureFixture[str], image: Path, arguments: tuple[str, ...]
) -> None:
    """Which would stand for the current directory, of whoever has not set a variable."""
    option = arguments[-1].removesuffix("=")
    assert run([*arguments, *([] if "status" in arguments else [str(image)])]) == USAGE
    assert_one_line(capfd.readouterr().err, f"Invalid value for '{option}'.*: it is empty, expected a name; see nbdimg")


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["--frobnicate"], "No such option.*--frobnicate.*see nbdimg serve --help"),
        (["--format", "vmdk"], "unknown format 'vmdk', known are raw, qcow2, vhdx"),
        (["--format", ""], "unknown format ''"),
        (["--min-block-size", "0"], "minimum block size is 0"),
        (["--min-block-size", "3"], "minimum block size is 3"),
        (["--min-block-size", "128K"], "minimum block size is 131072"),
        (["--min-block-size", "big"], "'big' is not a size"),
        (["--min-block-size", "-1"], "is not a size"),
        (["--connections-max", "0"], "--connections-max"),
        (["--connections-max", "many"], "--connections-max"),
        (["--connections-max", "1048577"], "--connections-max: 1048577 is not allowed, expected .* 1 to 1048576"),
        (["--handshake-timeout", "0"], "--handshake-timeout"),
        (["--handshake-timeout", "inf"], "--handshake-timeout: inf is not allowed, expected seconds from 0.1 to"),
        (["--handshake-timeout", "nan"], "--handshake-timeout"),
        (["--request-timeout", "soon"], "--request-timeout"),
        (["--drain-timeout", "-1"], "--drain-timeout"),
        (["--drain-timeout", "nan"], "--drain-timeout"),
        (["--log-format", "xml"], "--log-format: 'xml' is not allowed, expected auto, text or json"),
        (["--min-block-size", "x"], "--min-block-size: 'x' is not a size"),
        (["--description", "x" * 4097], "description must be at most 4096"),
        (["--listen"], "--listen"),
        (["--listen", ""], "scheme must be"),
        (["--listen", "http://127.0.0.1"], "scheme must be"),
        (["--listen", "127.0.0.1:10809"], r"scheme must be .*, as in nbd://127\.0\.0\.1:10809 or nbd\+unix:///"),
        (["--listen", "nbd://127.0.0.1:99999"], "not an NBD URI"),
        (["--listen", "nbd://127.0.0.1:port"], "not an NBD URI"),
        (["--listen", "nbd://[::1"], "not an NBD URI"),
        (["--listen", "nbd:///"], "needs a host"),
        (["--listen", "nbd+unix:///"], "needs .socket=PATH"),
        (["--listen", "nbd+unix:///?socket="], "needs .socket=PATH"),
        (["--listen", "nbd+unix://host/?socket=/tmp/s"], "has no host"),
        (["--listen", "nbd+unix:///?socket=/tmp/a%00b"], "NUL|null"),
        (["--listen", "nbd+unix:///?sokcet=/tmp/s"], "unknown parameter 'sokcet'"),
        (["--listen", "nbd://127.0.0.1:0/disk"], "a listener has no export name"),
        (["--listen", "nbds://127.0.0.1:0"], "needs TLS"),
        (["--listen", "nbds+unix:///?socket=/tmp/s"], "needs TLS"),
        (
            ["--listen", "nbd://0.0.0.0:0"],
            r"reachable from other machines.* insecure_plaintext \(--insecure-plaintext\)",
        ),
        (["--listen", "nbd://[::]:0"], "reachable from other machines.*--insecure-plaintext"),
        (["--listen", "nbd://192.0.2.1:0"], "reachable from other machines.*--insecure-plaintext"),
        (["--listen", "nbd://example.com:0"], "reachable from other machines.*--insecure-plaintext"),
    ],
)
def test_serve_wrong_option_exits_2_with_one_line(
    capfd: pytest.CaptureFixture[str], image: Path, socket_uri: str, options: list[str], pattern: str
) -> None:
    listen = [] if "--listen" in options else ["--listen", socket_uri]
    arguments = [str(image), *options] if options == ["--listen"] else [*listen, *options, str(image)]
    refuse(capfd, arguments, USAGE, pattern)


@pytest.mark.parametrize("argument", ["=disk.img", "disk=", ""])
def test_serve_half_a_named_image_exits_2(capfd: pytest.CaptureFixture[str], socket_uri: str, argument: str) -> None:
    refuse(capfd, ["--listen", socket_uri, argument], USAGE, "expected IMAGE or NAME=IMAGE")


def test_serve_two_images_under_one_name_exits_2(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, image: Path, socket_uri: str
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(512))
    refuse(capfd, ["--listen", socket_uri, f"a={image}", f"a={other}"], USAGE, "two exports are named 'a'")


def test_serve_name_too_long_exits_2(capfd: pytest.CaptureFixture[str], image: Path, socket_uri: str) -> None:
    refuse(capfd, ["--listen", socket_uri, f"{'n' * 4097}={image}"], USAGE, "1 to 4096 bytes")


def test_serve_unresolvable_host_is_no_internal_error(capfd: pytest.CaptureFixture[str], image: Path) -> None:
    """A label of more than 63 characters cannot be put into a DNS query."""
    uri = f"nbd://{'a' * 70}:0"
    assert run(["serve", "--insecure-plaintext", "--listen", uri, str(image)]) in (USAGE, LISTEN)
    assert_one_line(capfd.readouterr().err, "a" * 70)


def test_unknown_verb_exits_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["serv"]) == USAGE
    assert_one_line(capfd.readouterr().err, "No such command")


# Images: exit status 3


def test_serve_missing_image_exits_3(capfd: pytest.CaptureFixture[str], tmp_path: Path, socket_uri: str) -> None:
    path = tmp_path / "missing.img"
    refuse(capfd, ["--listen", socket_uri, str(path)], IMAGE, f"{path}: No such file or directory")
    assert not path.exists()


@pytest.mark.parametrize("options", [[], ["--read-only"], ["--format", "raw"]])
def test_serve_directory_exits_3(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, socket_uri: str, options: list[str]
) -> None:
    refuse(capfd, ["--listen", socket_uri, *options, str(tmp_path)], IMAGE, f"{tmp_path}: ")


@pytest.mark.timeout(20)
def test_serve_fifo_exits_3_without_waiting(capfd: pytest.CaptureFixture[str], tmp_path: Path, socket_uri: str) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    refuse(capfd, ["--listen", socket_uri, str(path)], IMAGE, "neither a regular file nor a block device")


def test_serve_image_without_permission_exits_3(
    capfd: pytest.CaptureFixture[str], image: Path, socket_uri: str
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    image.chmod(0)
    refuse(capfd, ["--listen", socket_uri, str(image)], IMAGE, f"{image}: Permission denied")


def test_serve_image_of_a_format_without_driver_exits_3(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, socket_uri: str
) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_bytes(b"KDMV" + bytes(508))
    refuse(capfd, ["--listen", socket_uri, str(path)], IMAGE, "vmdk image, which is not supported; --format raw")


def test_serve_name_with_a_broken_image_names_the_path(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, image: Path, socket_uri: str
) -> None:
    """The first image is good: it is closed again, and the socket is never made."""
    refuse(capfd, ["--listen", socket_uri, str(image), f"b={tmp_path}/b.img"], IMAGE, r"/b\.img: No such file")
    assert not (tmp_path / "s").exists()
    with NbdimgServer(image):
        pass


@pytest.mark.parametrize(("first", "second"), [([], []), ([], ["--read-only"]), (["--read-only"], [])])
def test_serve_image_in_use_exits_3(
    capfd: pytest.CaptureFixture[str], image: Path, socket_uri: str, first: list[str], second: list[str]
) -> None:
    with NbdimgServer(image, options=first):
        refuse(capfd, ["--listen", socket_uri, *second, str(image)], IMAGE, f"{image}: cannot be locked")


@pytest.mark.parametrize("options", [["--read-only"], []])
def test_serve_an_image_twice_is_refused_unless_all_are_readers(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, image: Path, socket_uri: str, options: list[str]
) -> None:
    link = tmp_path / "link.img"
    link.symlink_to(image)
    if options:
        with NbdimgServer(image, f"b={link}", options=options):
            return
    refuse(capfd, ["--listen", socket_uri, f"a={image}", f"b={image}"], USAGE, f"{image} is exported twice, expected")
    refuse(
        capfd, ["--listen", socket_uri, str(image), str(link)], USAGE, f"{link}, which is {image}, is exported twice"
    )


def test_serve_image_directory_that_is_not_there_is_refused(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, image: Path, socket_uri: str
) -> None:
    directory = tmp_path / "absent"
    options = ["--listen", socket_uri, "--image-directory", str(directory), str(image)]
    refuse(capfd, options, USAGE, f"image directory {directory}: there is none, expected ")


def test_serve_two_readers_share_an_image(image: Path) -> None:
    with NbdimgServer(image, options=["-r"]), NbdimgServer(image, options=["-r"]) as second:
        assert size_of(second.socket_path, "disk") == 65536


# Listening: exit status 4


def test_serve_port_taken_exits_4(capfd: pytest.CaptureFixture[str], image: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        uri = f"nbd://127.0.0.1:{taken.getsockname()[1]}"
        refuse(capfd, ["--listen", uri, str(image)], LISTEN, "cannot listen on nbd://.*Address already in use")


def test_serve_socket_of_a_live_server_exits_4_and_leaves_it(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, image: Path
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(512))
    with NbdimgServer(image) as server:
        uri = f"nbd+unix:///?socket={server.socket_path}"
        refuse(capfd, ["--listen", uri, str(other)], LISTEN, "Address already in use")
        assert size_of(server.socket_path, "disk") == 65536


def test_serve_socket_path_that_is_a_file_exits_4_and_keeps_it(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, image: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    listen = ["--listen", f"nbd+unix:///?socket={precious}", str(image)]
    refuse(capfd, listen, LISTEN, f"cannot listen on .*{precious}: there is something else of that name, which is no ")
    assert precious.read_text() == "data"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/nonexistent/directory/s", r"there is no directory /nonexistent/directory$"),
        ("/tmp/" + "s" * 200, "the path has 205 bytes"),
    ],
)
def test_serve_socket_path_that_cannot_be_exits_4(
    capfd: pytest.CaptureFixture[str], image: Path, path: str, reason: str
) -> None:
    refuse(capfd, ["--listen", f"nbd+unix:///?socket={path}", str(image)], LISTEN, f"cannot listen on .*: {reason}")


def test_serve_default_port_that_cannot_be_had_is_named(capfd: pytest.CaptureFixture[str], image: Path) -> None:
    arguments = ["--insecure-plaintext", "--listen", "nbd://192.0.2.1", str(image)]
    refuse(capfd, arguments, LISTEN, r"cannot listen on nbd://192\.0\.2\.1/ \(port 10809\): Cannot assign")


def test_serve_second_listener_fails_and_the_first_ones_socket_is_removed(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, image: Path, socket_uri: str
) -> None:
    second = "nbd+unix:///?socket=/nonexistent/s"
    refuse(capfd, ["--listen", socket_uri, "--listen", second, str(image)], LISTEN, "/nonexistent/s")
    assert not (tmp_path / "s").exists()


def test_serve_stale_socket_is_replaced(tmp_path: Path, image: Path) -> None:
    path = str(tmp_path / "stale")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with NbdimgServer(image, listen=[f"nbd+unix:///?socket={path}"]):
        assert size_of(path, "disk") == 65536
    assert not os.path.exists(path)


# Names, listeners, URIs


def test_serve_prints_one_uri_for_each_export_and_listener_and_answers_at_each(tmp_path: Path, image: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(4096))
    paths = [str(tmp_path / "one"), str(tmp_path / "two")]
    listeners = [*(f"nbd+unix:///?socket={path}" for path in paths), "nbd://127.0.0.1:0"]
    with NbdimgServer(image, f"second={other}", listen=listeners) as server:
        assert len(server.uris) == 6
        for path in paths:
            assert f"nbd+unix:///disk?socket={path}" in server.uris
            assert f"nbd+unix:///second?socket={path}" in server.uris
            assert size_of(path, "disk") == 65536
            assert size_of(path, "/second") == 4096
        ports = {urlsplit(uri).port for uri in server.uris if uri.startswith("nbd://127.0.0.1:")}
        assert len(ports) == 1
        port = ports.pop()
        assert port
        assert size_of(("127.0.0.1", port), "second") == 4096
        assert server.stdout().splitlines() == server.uris
        assert complaints(server.stderr()) == []


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a/disk.img", "b/disk.raw", "c/disk"], ["disk", "disk-2", "disk-3"]),
        (["my disk.img"], ["my%20disk"]),
        (["backup.2024.img"], ["backup"]),
        (["größe.img"], ["gr%C3%B6%C3%9Fe"]),
        (["a=b.img"], ["a%3Db"]),
    ],
)
def test_serve_default_names_are_unique_stems(tmp_path: Path, files: list[str], names: list[str]) -> None:
    for file in files:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(512))
    with NbdimgServer(*(tmp_path / file for file in files)) as server:
        assert [urlsplit(uri).path.removeprefix("/") for uri in server.uris] == names


def test_serve_file_name_that_is_no_utf8_is_no_internal_error(tmp_path: Path) -> None:
    """Served under some name, or refused as usage; the name must be valid UTF-8 on the wire."""
    path = os.fsencode(tmp_path) + b"/disk\xff.img"
    with open(path, "wb") as file:
        file.truncate(4096)
    process = subprocess.Popen(
        command("serve", "--listen", f"nbd+unix:///?socket={tmp_path}/s", path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline():
        process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode in (0, USAGE), errors
    assert "internal error" not in errors


def test_serve_read_only_description_and_block_size_are_told(image: Path) -> None:
    options = ["--read-only", "--description", "a disk", "--min-block-size", "4K"]
    with NbdimgServer(image, options=options) as server, Client(server.socket_path) as client:
        client.greet()
        told = client.info("disk", [2, 3])
        assert told.flags & TransmissionFlag.READ_ONLY
        assert told.description == "a disk"
        assert told.block_size is not None
        assert told.block_size[:2] == (4096, 4096)


def test_serve_tail_that_fills_no_block_is_warned_about(tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(1000))
    with NbdimgServer(path, options=["--min-block-size", "512"]) as server:
        assert size_of(server.socket_path, "odd") == 512
        assert "the last 488 bytes are not served" in server.stderr()


def test_serve_connections_max_closes_the_next(image: Path) -> None:
    options = ["--connections-max", "1"]
    with NbdimgServer(image, options=options) as server, Client(server.socket_path, 10) as first:
        first.greet()
        with Client(server.socket_path, 10) as second:
            assert second.wait_closed(10) is not None
        first.negotiate("disk")
        assert first.read(0, 16).data == b"\xd1" * 16


@pytest.mark.parametrize("exists", [False, True])
def test_serve_without_images_serves_a_demo_image(tmp_path: Path, exists: bool) -> None:
    demo = tmp_path / "demo.img"
    if exists:
        demo.write_bytes(b"\xd1" * 4096)
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        server = NbdimgServer(env={"PYTHONPATH": before})
    finally:
        os.chdir(before)
    with server:
        size = 4096 if exists else 64 << 20
        assert size_of(server.socket_path, "demo") == size
        assert demo.stat().st_size == size


def test_serve_insecure_plaintext_lets_any_address_pass_the_check(
    capfd: pytest.CaptureFixture[str], image: Path
) -> None:
    """An address of no machine (RFC 5737) gets as far as the kernel, which cannot bind it."""
    arguments = ["--insecure-plaintext", "--listen", "nbd://192.0.2.1:0", str(image)]
    refuse(capfd, arguments, LISTEN, "cannot listen on nbd://192.0.2.1:0")


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serve_signal_exits_0_and_removes_the_socket(image: Path, number: signal.Signals) -> None:
    with NbdimgServer(image) as server:
        with Client(server.socket_path) as client:
            client.greet()
            client.negotiate("disk")
            assert client.write(0, b"written before the signal").error == 0
            server.process.send_signal(number)
            assert server.wait(10) == 0
            assert client.wait_closed(10) is not None
        assert not os.path.exists(server.socket_path)
        assert complaints(server.stderr()) == []
    assert image.read_bytes().startswith(b"written before the signal")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_serve_serves_on_at_a_signal_that_it_was_started_to_ignore(image: Path, number: signal.Signals) -> None:
    """As nohup has it ignore hangups, and a script's `&` Ctrl-C."""
    ignoring = ("sh", "-c", f'trap "" {number:d}; exec "$0" "$@"', sys.executable, "-m", "nbdimg")
    with NbdimgServer(image, program=ignoring) as server:
        server.process.send_signal(number)
        assert size_of(server.socket_path, "disk") == image.stat().st_size
        server.terminate()
        assert server.wait(10) == 0


@pytest.mark.parametrize("has_file", [False, True])
def test_serve_hangup_while_it_starts_is_answered_when_it_has(tmp_path: Path, image: Path, has_file: bool) -> None:
    """As who renews certificates sends it, while images are still opened: here the server waits for a key."""
    identity = Authority(tmp_path / "ca").issue("server", common_name="localhost")
    options = [f"--tls-certificate={identity.certificate_path}", f"--tls-key={identity.key_path}", "--log-format=text"]
    options += ["--listen", f"nbd+unix:///?socket={tmp_path}/s"]
    os.mkfifo(tmp_path / "key")
    if has_file:
        (tmp_path / "c.toml").write_text(f"[[exports]]\npath = '{image}'\nkey_file = 'key'\n")
        options.append(f"--config={tmp_path}/c.toml")
    else:
        options += [f"--key-file={tmp_path}/key", str(image)]
    with ServerProcess([sys.executable, "-m", "nbdimg", "serve", *options]) as server:
        with open(tmp_path / "key", "wb") as key:
            server.process.send_signal(signal.SIGHUP)
            key.write(b"key")
        assert wait_until(lambda: not server.is_running() or "reloaded" in server.stderr(), 20)
        server.terminate()
        assert server.wait(10) == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_serve_without_a_standard_stream_ends_in_order(tmp_path: Path, image: Path, closed: str) -> None:
    """What it would have taken in the stream's place is none of libuv's, which does not close the three."""
    path = tmp_path / "s"
    line = f"exec {sys.executable} -m nbdimg serve --listen 'nbd+unix:///?socket={path}' {image} {closed}"
    with ServerProcess(["sh", "-c", line]) as server:
        assert wait_until(lambda: not server.is_running() or try_connect(str(path)) is not None, 20)
        server.terminate()
        assert server.wait(10) == 0
        assert complaints(server.stderr()) == []


@pytest.mark.parametrize("closed", ["<&-", "2>&-"])
def test_command_without_a_standard_stream_works(image: Path, closed: str) -> None:
    line = f"exec {sys.executable} -m nbdimg resize --format raw {image} +1M {closed}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_serve_signal_leaves_a_socket_that_another_server_has_made_meanwhile(tmp_path: Path, image: Path) -> None:
    with NbdimgServer(image) as server:
        os.unlink(server.socket_path)
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(server.socket_path)
            server.terminate()
            assert server.wait(10) == 0
            assert os.path.exists(server.socket_path)


def test_serve_second_signal_forces_the_end(tmp_path: Path) -> None:
    """A client that takes no reply holds the drain up until its deadline, an hour here."""
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.write(b"\xd1" * (32 << 20))
    options = ["--drain-timeout", "3600", "--stall-timeout", "3600"]
    with NbdimgServer(path, options=options) as server, Client(server.socket_path) as client:
        client.greet()
        client.negotiate("disk")
        client.send_requests([client.new_request(Command.READ, 0, 32 << 20)])
        assert select.select([client.sock], [], [], 10)[0]
        server.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(2)
        server.terminate()
        assert server.wait(5) == 0
        assert "Traceback" not in server.stderr()


# The program


def test_serve_listens_soon(image: Path) -> None:
    started = time.monotonic()
    with NbdimgServer(image):
        assert time.monotonic() - started < START_LIMIT_S


def test_module_version_is_printed() -> None:
    done = execute("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"nbdimg {__version__}\n", "")


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("serve", "--help")])
def test_help_exits_0_and_names_the_options(arguments: tuple[str, ...]) -> None:
    done = execute(*arguments)
    assert done.returncode == 0
    assert "serve" in done.stdout
    assert done.stderr == ""
    if "serve" in arguments:
        for option in ("--listen", "--format", "--read-only", "--min-block-size", "--insecure-plaintext"):
            assert option in done.stdout


def test_no_arguments_print_the_help() -> None:
    """On one of the streams, in lines, with the exit status of wrong usage at most."""
    done = execute()
    assert done.returncode in (0, USAGE)
    assert "Traceback" not in done.stderr
    help_text = done.stdout + done.stderr
    assert "Usage" in help_text
    assert len(help_text.splitlines()) > 3


def test_serve_missing_image_as_a_process_exits_3(tmp_path: Path) -> None:
    """`refuse` runs in this process; the console's way out is the same."""
    done = execute("serve", "missing.img", cwd=tmp_path)
    assert done.returncode == IMAGE
    assert done.stdout == ""
    assert_one_line(done.stderr, "missing.img: No such file or directory")
