"""Ctrl-C: one line, status 130, no traceback, and images that open and have lost nothing."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nbdimg.units import KiB, MiB
from tests.support.qcow2edit import qemu_img
from tests.support.vhdximages import dynamic

pytestmark = pytest.mark.usefixtures("directory")

LINE = "nbdimg: interrupted\n"

AT_IMPORT = """
import signal, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == "typer":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""

AT_WRITE = """
import os, signal, time
real, count = os.pwrite, 0
def pwrite(*arguments):
    global count
    count += 1
    if count in {calls}:
        os.kill(os.getpid(), {calls}[count])
        time.sleep({slow_s})
    return real(*arguments)
os.pwrite = pwrite
"""

AT_END_OF_PROGRESS = """
import signal
from contextlib import contextmanager
from nbdimg.cli import output
@contextmanager
def progress(*arguments, **options):
    yield None
    signal.raise_signal(signal.SIGINT)
output.progress = progress
"""

RUN = """
from nbdimg.__main__ import main
main()
"""


def interrupted(
    script: str, *arguments: str, ignored: signal.Signals | None = None
) -> subprocess.CompletedProcess[str]:
    """The end of an nbdimg that sends itself the signal."""
    before = "" if ignored is None else f"import signal; signal.signal({ignored:d}, signal.SIG_IGN)\n"
    return subprocess.run(
        [sys.executable, "-c", before + script + RUN, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )


def at_write(*calls: int, slow_s: float = 0.05, number: int = signal.SIGINT) -> str:
    return at_writes(dict.fromkeys(calls, number), slow_s)


def at_writes(numbers: dict[int, int], slow_s: float) -> str:
    """The signal for each call that gets one."""
    return AT_WRITE.format(calls={call: int(number) for call, number in numbers.items()}, slow_s=slow_s)


def with_bitmaps(path: str) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "16M")
    for name in ("a", "b"):
        qemu_img("bitmap", "--add", "-g", "512", path, name)


def is_sound(path: str) -> bool:
    return qemu_img("check", "-q", path).returncode == 0


def test_interrupt_while_modules_are_imported_is_one_line() -> None:
    ended = interrupted(AT_IMPORT, "info", "absent.raw")
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signal.SIGINT, "", LINE)


def test_interrupt_of_a_health_check_that_waits_is_one_line() -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind("s")
        silent.listen()
        argv = [sys.executable, "-m", "nbdimg", "healthcheck", "--socket=s"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            with silent.accept()[0]:
                process.send_signal(signal.SIGINT)
                assert process.communicate(timeout=60) == ("", LINE)
            assert process.returncode == 128 + signal.SIGINT


def test_interrupt_that_is_ignored_stays_so() -> None:
    Path("a.raw").write_bytes(bytes(KiB))
    ended = interrupted(AT_IMPORT, "info", "a.raw", ignored=signal.SIGINT)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_interrupt_at_a_terminal_leaves_it_without_half_a_bar_and_with_a_cursor() -> None:
    primary, secondary = pty.openpty()
    try:
        argv = [sys.executable, "-c", AT_IMPORT + RUN, "info", "absent.raw"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        ended = subprocess.run(argv, env=environment, stderr=secondary, timeout=60)
        assert ended.returncode == 128 + signal.SIGINT
        assert os.read(primary, 4096) == b"\r\x1b[2K\x1b[?25hnbdimg: interrupted\r\n"
    finally:
        os.close(primary)
        os.close(secondary)


NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", NUMBERS)
def test_signal_that_is_ignored_does_not_end_a_verb_that_hears_it(number: signal.Signals) -> None:
    """nohup has a hangup ignored, a script's `&` Ctrl-C."""
    with_bitmaps("a.qcow2")
    ended = interrupted(at_write(1, number=number), "resize", "--shrink", "a.qcow2", "4M", ignored=number)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("call", [1, 4])
def test_interrupted_resize_of_an_image_with_bitmaps_goes_on_to_its_end(call: int, number: int) -> None:
    """Its tables are at stake: half of it would leave bitmaps that are of no size the disk has."""
    with_bitmaps("a.qcow2")
    ended = interrupted(at_write(call, number=number), "resize", "a.qcow2", "+20M")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert is_sound("a.qcow2")
    assert "in-use" not in qemu_img("info", "a.qcow2").stdout


@pytest.mark.parametrize("number", NUMBERS)
def test_interrupted_resize_ends_in_order_where_it_tells_of_progress(number: int) -> None:
    with_bitmaps("a.qcow2")
    ended = interrupted(at_write(1, number=number), "resize", "--shrink", "a.qcow2", "4M")
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + number, "", LINE)
    assert is_sound("a.qcow2")
    assert "in-use" not in qemu_img("info", "a.qcow2").stdout


@pytest.mark.parametrize("number", NUMBERS)
def test_interrupted_bitmap_verb_goes_on_to_its_end(number: int) -> None:
    with_bitmaps("a.qcow2")
    ended = interrupted(at_write(1, number=number), "bitmap", "clear", "a.qcow2", "b")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert is_sound("a.qcow2")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_interrupt_ends_at_once(first: int, second: int) -> None:
    with_bitmaps("a.qcow2")
    ended = interrupted(at_writes({1: first, 2: second}, slow_s=4), "resize", "a.qcow2", "+20M")
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + second, "", LINE)


def test_hangups_of_a_closed_terminal_leave_time_to_end_in_order() -> None:
    with_bitmaps("a.qcow2")
    ended = interrupted(at_write(1, 2, 3, number=signal.SIGHUP), "resize", "a.qcow2", "+20M")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert is_sound("a.qcow2")
    assert "in-use" not in qemu_img("info", "a.qcow2").stdout


@pytest.mark.parametrize("name", ["a.qcow2", "a.vhdx"])
def test_interrupt_when_the_image_is_made_does_not_say_that_nothing_was_left(name: str) -> None:
    ended = interrupted(AT_END_OF_PROGRESS, "create", name, "8M")
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signal.SIGINT, "", f"nbdimg: {name}: interrupted\n")
    assert interrupted("", "info", name).returncode == 0


def test_interrupted_compact_is_one_line_and_can_be_taken_up_again() -> None:
    Path("a.vhdx").write_bytes(dynamic(b"\1" * MiB + bytes(4 * MiB), block_size=MiB))
    with open("a.vhdx", "ab") as file:
        file.truncate(64 * MiB)
    ended = interrupted(at_write(1), "compact", "a.vhdx")
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signal.SIGINT, "", LINE)
    assert interrupted("", "compact", "a.vhdx").returncode == 0
