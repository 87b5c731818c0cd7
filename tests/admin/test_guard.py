"""Who may ask: tokens, and requests that a web page could make its visitor's browser send."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nbdimg.admin.guard import TokenFile
from nbdimg.cli.main import run
from nbdimg.config import AdminConfig, ServerConfig, TcpAddress
from nbdimg.errors import ConfigError
from nbdimg.server.checks import check_admin
from nbdimg.server.log import LINES_MAX
from tests.admin.fake import FakeServer
from tests.support.httpclient import Answer, ask, http_address

TOKEN = "s3cret-token.0123456789"
FREE = TcpAddress("127.0.0.1", 0)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    write_token(path, TOKEN + "\n")
    return path


def write_token(path: Path, text: str, mode: int = 0o600) -> None:
    """Exchange the file, as who renews a token does."""
    new = path.with_suffix(".new")
    new.write_text(text, errors="surrogateescape")
    new.chmod(mode)
    new.replace(path)


@pytest.fixture
def server(tmp_path: Path, token_file: Path) -> Iterator[FakeServer]:
    """With the API at a socket and at TCP, and metrics."""
    admin = AdminConfig(str(tmp_path / "a"), FREE, str(token_file))
    with FakeServer(ServerConfig((), admin=admin, metrics_address=FREE)) as running:
        running.attach()
        yield running


def authorized(server: FakeServer, header: str | None, path: str = "/v1/exports") -> Answer:
    (admin, _) = http_address(server.log)
    return ask(admin, "GET", path, headers={} if header is None else {"Authorization": header})


@pytest.mark.parametrize("header", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Bearer  {TOKEN} "])
def test_token_right_is_let_in(server: FakeServer, header: str) -> None:
    assert authorized(server, header).status == 200


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        TOKEN,
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
        f"Bearer x{TOKEN}",
        f"Bearer {TOKEN} {TOKEN}",
        "Bearer ünïcode-0123456789",
        "Bearer no-utf-8-\udcff-0123456789",
        f"Bearer {'x' * 4000}",
    ],
)
@pytest.mark.parametrize("path", ["/v1/exports", "/livez", "/metrics", "/nowhere"])
def test_token_wrong_or_none_is_401_whatever_was_asked(server: FakeServer, header: str | None, path: str) -> None:
    answer = authorized(server, header, path)
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert TOKEN not in answer.detail + server.log


def test_token_wrong_is_logged_and_none_is_not(server: FakeServer) -> None:
    authorized(server, None)
    assert "wrong token" not in server.log
    authorized(server, f"Bearer {TOKEN}x")
    assert server.log.count("127.0.0.1: a wrong token for the admin API") == 1


def test_token_is_not_needed_at_the_socket_nor_for_metrics(server: FakeServer, tmp_path: Path) -> None:
    (_, metrics) = http_address(server.log)
    assert ask(str(tmp_path / "a"), "GET", "/v1/exports").status == 200
    assert ask(metrics, "GET", "/livez").status == 200


def test_token_renewed_is_taken_at_once_and_the_old_one_is_not(server: FakeServer, token_file: Path) -> None:
    write_token(token_file, "another-token-of-this-server")
    assert authorized(server, f"Bearer {TOKEN}").status == 401
    assert authorized(server, "Bearer another-token-of-this-server").status == 200


@pytest.mark.parametrize(
    "text", ["", "short", "two tokens-in-one-line", "ünïcode-0123456789", "no-utf-8-\udcff-0123456789", "x" * 5000]
)
def test_token_file_that_went_wrong_lets_nobody_in_until_it_is_right(
    server: FakeServer, token_file: Path, text: str
) -> None:
    write_token(token_file, text)
    for header in (f"Bearer {TOKEN}", f"Bearer {text}", "Bearer "):
        assert authorized(server, header).status == 401
    assert server.log.count("no token is accepted any more: token file") == 1
    write_token(token_file, TOKEN)
    assert authorized(server, f"Bearer {TOKEN}").status == 200


def test_token_file_removed_or_opened_to_the_world_lets_nobody_in(server: FakeServer, token_file: Path) -> None:
    write_token(token_file, TOKEN + "\n\n", mode=0o604)
    assert authorized(server, f"Bearer {TOKEN}").status == 401
    assert "can be read by everybody on this machine" in server.log
    token_file.unlink()
    assert authorized(server, f"Bearer {TOKEN}").status == 401


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        ("", 0o600, "expected one line of 16 to 4096 letters"),
        ("0123456789abcde", 0o600, "expected one line of 16 to 4096 letters"),
        (f"{TOKEN}\n{TOKEN}\n", 0o600, "expected one line of 16 to 4096 letters"),
        (TOKEN, 0o644, "can be read by everybody on this machine: chmod 0600"),
    ],
)
def test_token_file_that_is_wrong_at_the_start_is_refused(token_file: Path, text: str, mode: int, reason: str) -> None:
    write_token(token_file, text, mode)
    with pytest.raises(ConfigError, match=f"token file {token_file}.*{reason}"):
        TokenFile(str(token_file))


def test_token_file_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        TokenFile(str(tmp_path / "nope"))


def test_token_at_the_limits_is_accepted(token_file: Path) -> None:
    for token in ("0123456789abcdef", "x" * 4096):
        write_token(token_file, token)
        assert TokenFile(str(token_file)).accepts(token)


# Browsers


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "127.0.0.1:9808", "[::1]:1", "10.0.0.1"])
def test_host_that_no_stranger_can_own_is_let_in(server: FakeServer, host: str) -> None:
    (_, metrics) = http_address(server.log)
    assert ask(metrics, "GET", "/livez", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "evil.example:9809", "127.0.0.1.evil", "", "["]
)
def test_host_of_a_page_that_rebinds_its_name_is_403(server: FakeServer, host: str) -> None:
    admin, metrics = http_address(server.log)
    for address in (admin, metrics):
        answer = ask(address, "GET", "/livez", headers={"Host": host, "Authorization": f"Bearer {TOKEN}"})
        assert (answer.status, answer.detail.partition(" header")[0]) == (403, "the Host")


def test_preflight_of_a_browser_is_not_granted(server: FakeServer, tmp_path: Path) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "DELETE"}
    answer = ask(str(tmp_path / "a"), "OPTIONS", "/v1/exports/a", headers=headers)
    assert answer.status == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


# What may not be listened on


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--admin-listen=127.0.0.1:0"], "the admin API at 127.0.0.1:0 needs a token file"),
        (["--admin-token-file=TOKEN"], "a token file is for an admin API that listens on TCP"),
        (
            ["--admin-listen=9808", "--admin-token-file=TOKEN"],
            "--admin-listen: '9808' is not allowed, expected HOST",
        ),
        (["--metrics-listen=[::1]"], "--metrics-listen: '[::1]' is not allowed, expected HOST:PORT"),
        (["--metrics-listen=::1:9809"], "--metrics-listen: '::1:9809' is not allowed, expected HOST:PORT"),
        (
            ["--metrics-listen=127.0.0.1:65536"],
            "--metrics-listen: '127.0.0.1:65536' is not allowed, expected HOST:PORT",
        ),
        (["--admin-listen=127.0.0.1:0", "--admin-token-file=/nope"], "token file /nope: No such file or directory"),
        (
            ["--admin-listen=0.0.0.0:0", "--admin-token-file=TOKEN"],
            "the admin API at 0.0.0.0:0 is reachable from other machines and HTTP is plain text: listen on 127.0.0.1,",
        ),
    ],
)
def test_serve_refuses_an_unsafe_listener_and_exits_2(
    tmp_path: Path,
    token_file: Path,
    options: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk.img").write_bytes(bytes(4096))
    given = [each.replace("TOKEN", str(token_file)) for each in options]
    assert run(["serve", "--listen=nbd+unix:///?socket=s", "--format=raw", *given, "disk.img"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"nbdimg: {reason}")
    assert not Path("s").exists()


def test_address_that_other_machines_reach_takes_leave() -> None:
    for address in (TcpAddress("0.0.0.0", 9808), TcpAddress("::", 9808), TcpAddress("192.0.2.1", 9808)):
        config = ServerConfig((), admin=AdminConfig(None, address, "token"))
        with pytest.raises(ConfigError, match="is reachable from other machines"):
            check_admin(config)
        check_admin(replace(config, allows_plaintext=True))


def test_log_takes_no_line_of_each_request_that_anybody_may_send(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes each of those that were let in."""
    monkeypatch.setattr("nbdimg.server.log.monotonic", lambda: 0.0)
    admin, metrics = http_address(server.log)
    for _ in range(2 * LINES_MAX):
        assert ask(admin, "DELETE", "/v1/exports/guess").status == 401
        assert ask(metrics, "DELETE", "/livez").status == 405
    assert server.log.count("admin: DELETE '/v1/exports/guess': 401") <= LINES_MAX
    assert "405" not in server.log, "at the metrics' listener there is nothing to change"
    token = {"Authorization": f"Bearer {TOKEN}"}
    for _ in range(2 * LINES_MAX):
        assert ask(admin, "DELETE", "/v1/exports/mine", headers=token).status == 404
    assert server.log.count("admin: DELETE '/v1/exports/mine': 404") == 2 * LINES_MAX
