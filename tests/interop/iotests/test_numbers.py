"""Every case at once: images made by qemu-img, one server for all of them, qemu-io through it; then, with the server
stopped, qemu-img's check and qemu-io on each file.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.interop.iotests.cases import CASES, Case
from tests.support.peers import require_program
from tests.support.qcow2edit import qemu_check, qemu_img, qemu_io
from tests.support.server import NbdimgServer

OVERLAYS_COMMITTED = {"020"}


@dataclass
class Played:
    """What was seen while the server ran."""

    path: Path
    errors: list[str] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)


def _make(case: Case, path: Path) -> None:
    options = ("-o", case.options) if case.options else ()
    backing: tuple[str | Path, ...] = ()
    if case.base is not None:
        base = path.parent / f"{path.stem}-base.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", base, str(case.base_size))
        qemu_io(base, *case.base, options=("-f", "qcow2"))
        backing = ("-b", base.name, "-F", "qcow2")
    if case.is_compressed:
        source = path.with_suffix(".source")
        source.write_bytes(b"".join(bytes([n % 251]) * 900 + bytes(range(124)) for n in range(2048)))
        qemu_img("resize", "-q", "-f", "raw", source, str(case.size))
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", *options, source, path)
        source.unlink()
    else:
        qemu_img("create", "-q", "-f", "qcow2", *options, *backing, path, str(case.size))
    if case.before:
        qemu_io(path, *case.before, options=("-f", "qcow2"))
    if case.has_snapshot:
        qemu_img("snapshot", "-c", "before", path)


def _qemu_io(uri: str, commands: list[str] | tuple[str, ...]) -> subprocess.Popen[str]:
    arguments = [word for command in commands for word in ("-c", command)]
    program = require_program("qemu-io")
    return subprocess.Popen(
        [program, "-f", "raw", "-d", "unmap", *arguments, uri],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _play(case: Case, uri: str, played: Played) -> None:
    sessions = [_qemu_io(uri, list(session)) for session in case.sessions]
    for session in sessions:
        said, _ = session.communicate(timeout=60)
        if session.returncode or said.strip():
            played.errors.append(said)
    for command in case.refused:
        one = _qemu_io(uri, [command])
        said, _ = one.communicate(timeout=60)
        played.refusals[command] = f"{one.returncode} {said}"
    if case.reads:
        reading = _qemu_io(uri, list(case.reads))
        said, _ = reading.communicate(timeout=60)
        if reading.returncode or said.strip():
            played.errors.append(said)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Played]:
    """By number; the server has been stopped, and said that it closed every image."""
    directory = tmp_path_factory.mktemp("numbers")
    found = {number: Played(directory / f"n{number}.qcow2") for number in CASES}
    for number, case in CASES.items():
        _make(case, found[number].path)
    server = NbdimgServer(*(each.path for each in found.values()))
    try:
        for number, case in CASES.items():
            _play(case, f"nbd+unix:///n{number}?socket={server.socket_path}", found[number])
    finally:
        status = server.stop()
    assert status == 0
    return found


@pytest.mark.parametrize("number", CASES)
def test_case_passes_through_the_server_and_on_the_file_it_leaves(played: dict[str, Played], number: str) -> None:
    case, seen = CASES[number], played[number]
    assert seen.errors == [], case.subject
    report = qemu_check(seen.path)
    assert (report.exit_status, report.leaks, report.corruptions) == (0, 0, 0), case.subject
    if case.reads:
        qemu_io(seen.path, *case.reads, options=("-f", "qcow2"))


@pytest.mark.parametrize("number", [number for number, case in CASES.items() if case.refused])
def test_request_outside_the_disk_fails(played: dict[str, Played], number: str) -> None:
    for command, said in played[number].refusals.items():
        assert said.startswith("1 "), f"{command}: {said}"
        assert "failed" in said or "beyond" in said or "Input/output" in said, f"{command}: {said}"


@pytest.mark.parametrize("number", [number for number, case in CASES.items() if case.has_snapshot])
def test_snapshot_is_what_it_was_before(played: dict[str, Played], number: str, tmp_path: Path) -> None:
    case, raw, again = CASES[number], tmp_path / "raw", tmp_path / "again"
    qemu_img("convert", "-l", "snapshot.name=before", "-f", "qcow2", "-O", "raw", played[number].path, raw)
    qemu_img("create", "-q", "-f", "raw", again, str(case.size))
    qemu_io(again, *case.before, options=("-f", "raw"))
    qemu_img("compare", "-f", "raw", "-F", "raw", raw, again)


@pytest.mark.parametrize("number", OVERLAYS_COMMITTED)
def test_overlay_can_be_committed_by_qemu_img(played: dict[str, Played], number: str, tmp_path: Path) -> None:
    path = tmp_path / played[number].path.name
    base = played[number].path.with_name(f"{path.stem}-base.qcow2")
    for each in (played[number].path, base):
        (tmp_path / each.name).write_bytes(each.read_bytes())
    qemu_img("commit", "-q", "-f", "qcow2", path)
    qemu_io(tmp_path / base.name, *CASES[number].reads, options=("-f", "qcow2"))
    assert qemu_check(tmp_path / base.name).exit_status == 0


def test_control_wrong_pattern_is_an_error(played: dict[str, Played]) -> None:
    with pytest.raises(AssertionError, match="Pattern verification failed"):
        qemu_io(played["021"].path, "read -P 2 0 64k", options=("-f", "qcow2"))
