"""Controls: each part of the benchmark, run for real against a server that is broken on purpose, must say so.

The subject is nbdkit behind filters that make it slow (`delay`) or let one request at a time into the plugin, whichever
connection it came from (`noparallel`). Each measurement takes about a second.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import cold, fairness, report, slowdisk, throughput
from bench.cells import MIB, select_cells
from bench.image import create_image, evict, resident_share, settle, warm
from bench.report import Verdict
from bench.results import NeighbourSample, Sample
from bench.servers import ServerSpec

SECONDS = 0.8
IMAGE_SIZE = 128 * MIB

pytestmark = pytest.mark.skipif(
    shutil.which("fio") is None or shutil.which("nbdkit") is None, reason="needs fio and nbdkit"
)


def nbdkit(name: str, filters: list[str], *parameters: str) -> ServerSpec:
    return ServerSpec(
        name,
        ("nbdkit", "--version"),
        lambda path, image: [
            "nbdkit", "-f", "-U", path, *(f"--filter={word}" for word in filters), "file", str(image), *parameters
        ],
    )  # fmt: skip


PLAIN = nbdkit("plain", [])
SLOW = nbdkit("nbdimg", ["delay"], "delay-read=20ms")
SERIAL = nbdkit("nbdimg", ["noparallel"], "serialize=all-requests")
BROKEN = nbdkit("nbdimg", ["error"], "error=EIO", "error-rate=1%")
ABSENT = ServerSpec("nbdimg", ("no-such-server", "--version"), lambda path, image: ["no-such-server", path, str(image)])


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("bench") / "image.raw"
    create_image(path, IMAGE_SIZE)
    yield path
    path.unlink()


def ignore(_: str) -> None:
    """No progress bar."""


def measure_cell(image: Path, subject: ServerSpec) -> list[Sample]:
    cells = select_cells(["4k-randread-16"])
    return throughput.measure(cells, [subject, PLAIN], image, rounds=1, seconds=SECONDS, step=ignore)


def cold_summary(image: Path, subject: ServerSpec) -> report.NeighbourSummary:
    samples = cold.measure([subject], image, rounds=1, seconds=SECONDS, step=ignore)
    assert [sample.error for sample in samples] == [None] * len(cold.kinds())
    summary = report.summarize_neighbour(samples, cold.kinds()[0], subject.name)
    assert summary is not None
    assert summary.disk_bytes > 0
    if not summary.is_slow_disk:
        pytest.skip("the kernel's I/O limit is not available here: no verdict on a fast disk")
    return summary


def test_throughput_of_a_slow_server_fails_the_cell(image: Path) -> None:
    summary = report.summarize(measure_cell(image, SLOW), "4k-randread-16", "nbdimg")
    assert summary.best_peer == "plain"
    assert summary.verdict(1.0) is Verdict.FAIL


def test_throughput_of_a_server_with_io_errors_is_an_error_and_no_figure(image: Path) -> None:
    samples = measure_cell(image, BROKEN)
    assert [(sample.server, sample.measurement is None) for sample in samples] == [("nbdimg", True), ("plain", False)]
    assert samples[0].error


def test_server_that_is_not_installed_is_missing_with_a_reason(image: Path) -> None:
    assert ABSENT.missing(image) == "no-such-server is not installed"
    assert PLAIN.missing(image) is None


def test_server_that_does_not_start_is_missing_with_its_message(image: Path) -> None:
    reason = nbdkit("nbdimg", [], "no-such-parameter=1").missing(image)
    assert reason is not None
    assert reason.startswith("does not start: ")
    assert "no-such-parameter" in reason


def test_server_that_is_deaf_until_it_greets_is_waited_for(image: Path) -> None:
    """As qemu-nbd: a SIGTERM that comes between its `listen` and its loop is lost, and nobody ends it."""
    deaf = """
import contextlib, signal, socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
listener.listen()
time.sleep(0.3)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
while True:
    client, _ = listener.accept()
    with client, contextlib.suppress(BrokenPipeError):
        client.send(b"NBDMAGIC")
"""
    spec = ServerSpec("nbdimg", (sys.executable, "--version"), lambda path, _: [sys.executable, "-c", deaf, path])
    assert spec.missing(image) is None


def test_cold_neighbour_of_a_serial_server_stalls_the_warm_reader(image: Path) -> None:
    assert report.cold_verdict(cold_summary(image, SERIAL)) is Verdict.FAIL


def test_cold_neighbour_of_a_threaded_server_stalls_nobody(image: Path) -> None:
    """The best of three: a shared machine stalls readers of its own accord, and a serial server never passes."""
    verdicts = (report.cold_verdict(cold_summary(image, PLAIN)) for _ in range(3))
    assert any(verdict is Verdict.PASS for verdict in verdicts)


def test_slow_disk_without_control_groups_says_so(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slowdisk, "V1_ROOT", tmp_path / "absent")
    monkeypatch.setattr(slowdisk, "V2_ROOT", tmp_path / "absent")
    with slowdisk.slow_disk(os.getpid(), image) as is_slow:
        assert not is_slow


def test_fairness_of_a_slow_server_fails(image: Path) -> None:
    samples: list[NeighbourSample] = fairness.measure([SLOW], image, rounds=1, seconds=SECONDS, step=ignore)
    summary = report.summarize_neighbour(samples, fairness.kinds()[0], "nbdimg")
    assert report.fairness_verdict(summary) is Verdict.FAIL


def test_evicted_range_leaves_the_page_cache_and_warm_brings_it_back(image: Path) -> None:
    half = IMAGE_SIZE // 2
    settle(image)
    warm(image, 0, IMAGE_SIZE)
    assert resident_share(image, 0, IMAGE_SIZE) == 1.0
    evict(image, half, half)
    assert resident_share(image, 0, half) == 1.0
    assert resident_share(image, half, half) < 0.01
    warm(image, half, half)
    assert resident_share(image, half, half) == 1.0
