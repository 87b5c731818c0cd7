"""`nbdimg config check`, and `nbdimg serve --config` as a command."""

from __future__ import annotations

import json
import ssl
from pathlib import Path

import pytest

from nbdimg.cli.main import run
from tests.support.configured import ConfiguredServer, export
from tests.support.rawclient import connect_negotiated

USAGE, IMAGE, LISTEN = 2, 3, 4


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("NBDIMG_LISTEN", raising=False)
    return tmp_path / "nbdimg.toml"


def test_check_sound_file_exits_0_and_says_what_it_serves(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(export("a", "a.img") + export("b", "b.img"))
    assert run(["config", "check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: 2 exports at nbd://127.0.0.1/\n"


def test_check_file_of_a_plain_listener_for_others_logs_nothing(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server does, at its start."""
    admin = f'[admin]\nlisten = "0.0.0.0:9808"\ntoken_file = "{file}.token"\n'
    file.write_text('listen = ["nbd://0.0.0.0"]\ninsecure_plaintext = true\n' + admin + export("a", "a.img"))
    assert run(["config", "check", str(file)]) == 0
    assert caplog.records == []


def test_check_sound_file_as_json_shows_the_configuration(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text('reload = "watch"\n' + export("a", "a.img") + "[limits]\nconnections = 3\n")
    assert run(["config", "check", "--json", str(file)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["version"], answer["path"], answer["problems"]) == (1, str(file), [])
    assert answer["config"]["reload"] == "watch"
    assert answer["config"]["limits"]["connections"] == 3
    assert answer["config"]["listeners"] == ["nbd://127.0.0.1/"]
    assert [each["path"] for each in answer["config"]["exports"]] == [str(file.parent / "a.img")]


def test_check_wrong_file_exits_2_with_a_line_for_each_problem(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("lisen = 3\n[limits]\nconnections = 0\n")
    assert run(["config", "check", str(file)]) == USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = captured.err.splitlines()
    assert first.startswith(f"nbdimg: {file}:1: lisen: unknown key, did you mean listen; known are ")
    assert second.startswith(f"nbdimg: {file}:3: limits.connections: 0 is not allowed, expected a whole number from 1")


def test_check_wrong_file_as_json_lists_the_problems(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("lisen = 3\nzzz = 3\n")
    assert run(["config", "check", str(file), "--json"]) == USAGE
    answer = json.loads(capsys.readouterr().out)
    assert [problem.removeprefix(f"{file}:")[:8] for problem in answer["problems"]] == ["1: lisen", "2: zzz: "]
    assert "config" not in answer


def test_check_knows_what_only_the_server_refuses(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text('listen = ["nbd://0.0.0.0"]\n')
    assert run(["config", "check", str(file)]) == USAGE
    assert f"nbdimg: {file}: nbd://0.0.0.0/ is reachable from other machines" in capsys.readouterr().err


def test_check_tells_all_that_contradicts_itself_at_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = '[[exports.access]]\nidentities = ["dns:x"]\n'
    admin = '[admin]\nlisten = "0.0.0.0:1"\ntoken_file = "t"\n'
    file.write_text('listen = ["nbd://0.0.0.0", "nbd://[::]"]\n' + admin + export("a", "a.img") + rule)
    assert run(["config", "check", str(file)]) == USAGE
    found = [line.removeprefix(f"nbdimg: {file}: ") for line in capsys.readouterr().err.splitlines()]
    expected = ("nbd://0.0.0.0/ is", "nbd://[::]/ is", "a: the rule for dns:x needs", "the admin API at 0.0.0.0:1 is")
    assert [line[: len(begin)] for line, begin in zip(found, expected, strict=True)] == list(expected)


LONG = "/" + "s" * 107
TOO_LONG = f"cannot listen on {LONG}: the path has 108 bytes, expected at most 107"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"listen = ['nbd+unix:///?socket={LONG}']", TOO_LONG),
        (f"[admin]\nsocket = '{LONG}'", TOO_LONG),
        (
            "listen = ['nbd+unix:///?socket=/s']\n[admin]\nsocket = '/s'",
            "listener nbd+unix:///?socket=/s has the address of the admin API at /s, expected one for each",
        ),
        (
            "listen = ['nbd://[::1]:1', 'nbds://[::1]:1']\n[tls]\ncertificate_file = 'c'",
            "listener nbd://[::1]:1/ has the address of listener nbds://[::1]:1/, expected one for each",
        ),
        (
            "[admin]\nlisten = '[::1]:1'\ntoken_file = 't'\n[metrics]\nlisten = '[::1]:1'",
            "the admin API at [::1]:1 has the address of metrics at [::1]:1, expected one for each",
        ),
        pytest.param(
            "[tls]\npsk_file = 'keys'",
            "TLS with pre-shared keys needs Python 3.13 or later and an OpenSSL that has them",
            marks=pytest.mark.skipif(getattr(ssl, "HAS_PSK", False), reason="this Python has pre-shared keys"),
        ),
    ],
)
def test_check_and_serve_refuse_what_cannot_be_in_the_same_words(
    file: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    file.write_text(text)
    assert run(["config", "check", str(file)]) == USAGE
    assert capsys.readouterr().err == f"nbdimg: {file}: {said}\n"
    assert run(["serve", "--sandbox=off", "--config", str(file)]) == (USAGE if "TLS" in said else LISTEN)
    assert capsys.readouterr().err == f"nbdimg: {said}\n"


def test_check_takes_the_longest_path_of_a_socket_and_any_number_of_free_ports(file: Path) -> None:
    file.write_text(f"listen = ['nbd+unix:///?socket={LONG[:-1]}', 'nbd://[::1]:0']\n[metrics]\nlisten = '[::1]:0'")
    assert run(["config", "check", str(file)]) == 0


def test_check_missing_file_exits_2(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "check", str(file)]) == USAGE
    assert capsys.readouterr().err == f"nbdimg: {file}: No such file or directory\n"


def test_check_takes_the_environment_into_account(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("")
    monkeypatch.setenv("NBDIMG_LIMIT_CONNECTIONS", "none")
    assert run(["config", "check", str(file)]) == USAGE
    assert "environment variable NBDIMG_LIMIT_CONNECTIONS: 'none' is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        *(["disk.img"], ["--read-only"], ["--format", "raw"], ["--key-file", "x"], ["--min-block-size", "512"]),
        *(["--parent", "x"], ["--accept-lost-log"], ["--backing-key-file", "x=y"]),
    ],
)
def test_serve_config_with_an_image_or_its_options_exits_2(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    file.write_text("")
    assert run(["serve", "--config", str(file), *arguments]) == USAGE
    assert "with --config images and their options stand in" in capsys.readouterr().err


def test_serve_wrong_config_exits_2_and_a_missing_image_3(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("zzz = 1\nyyy = 1")
    assert run(["serve", "--config", str(file)]) == USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nbdimg: {file}:1: zzz: unknown key")
    assert line.endswith("(and 1 more: nbdimg config check FILE)")
    file.write_text(export("a", "missing.img"))
    assert run(["serve", "--config", str(file)]) == IMAGE
    assert "missing.img: No such file or directory" in capsys.readouterr().err


def test_serve_config_serves_it_and_options_go_before_it(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(b"a" * 65536)
    text = 'listen = ["nbd+unix:///?socket=t"]\n' + export("disk", "a.img")
    options = [f"--listen=nbd+unix:///?socket={tmp_path}/s", "--drain-timeout=1"]
    with ConfiguredServer(tmp_path, text, options=options) as server:
        with connect_negotiated(server.socket_path, "disk") as client:
            assert client.read(0, 512).data == b"a" * 512
            assert server.stdout() == f"nbd+unix:///disk?socket={tmp_path}/s\n"
            assert not (tmp_path / "t").exists()
            assert server.reload(text + 'description = "x"\n').endswith("reloaded: 1 adjusted")
            assert not (tmp_path / "t").exists()
        server.terminate()
        assert server.wait() == 0
