"""`python -m nbdimg` as a process that is interrupted: one exit status, and no traceback."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

from nbdimg.__main__ import EXIT_INTERRUPTED

WAIT_S = 30

WHILE_LOADING = """
import os, runpy, signal, sys
class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == "nbdimg.cli.main":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
sys.argv = ["nbdimg", "--version"]
runpy.run_module("nbdimg", run_name="__main__", alter_sys=True)
"""


def test_interrupt_while_the_program_is_loaded_ends_it_without_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WHILE_LOADING], capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_INTERRUPTED, "", "")


def test_interrupt_of_a_health_check_that_waits_ends_it_without_a_traceback(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{tmp_path}/s")
        silent.listen()
        argv = [sys.executable, "-m", "nbdimg", "healthcheck", f"--socket={tmp_path}/s"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            with silent.accept()[0]:
                process.send_signal(signal.SIGINT)
                assert process.communicate(timeout=WAIT_S) == ("", "")
            assert process.returncode == EXIT_INTERRUPTED
