"""What a server has counted, in Prometheus's text format.

Nothing is added up here: the numbers stand where they arise, and a scrape reads them. An export that leaves takes its
series with it. Requests, waits, flushes and errors of a kind that has not been seen yet have no series, so that a
server of a thousand exports does not tell of all that could happen to each.

The text is written on the loop's thread, in turns between which clients have theirs (`prometheus_client` would hold the
loop for all of it). So families tell of slightly different moments; the samples of one histogram do not. Tests have
that library's parser read every line.

    nbdimg_…            of the server
    nbdimg_export_…     of an export, by `export`; of its requests, by `export` and `command`
    process_…           of the process, under the names that Prometheus's own libraries use

Source: Prometheus, "Exposition formats", text format 0.0.4.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import resource
import time
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import accumulate
from pathlib import Path

from nbdimg.export.export import Export
from nbdimg.export.meter import CommandMeter, Meter
from nbdimg.histogram import BOUNDS_S, Histogram
from nbdimg.server.service import Service
from nbdimg.version import own_version
from nbdimg.wire.constants import Command

TURN_S = 1e-3
"""How long it writes before others have theirs."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_BOUNDS = [f'le="{bound}"}} ' for bound in (*BOUNDS_S, "+Inf")]
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


async def exposition(service: Service) -> tuple[bytes, str]:
    """The text and its content type. Others have the loop every TURN_S."""
    page = _Page()
    turn_end_s = time.perf_counter() + TURN_S
    for _ in _fill(page, service):
        if time.perf_counter() >= turn_end_s:
            await asyncio.sleep(0)
            turn_end_s = time.perf_counter() + TURN_S
    return page.text(), CONTENT_TYPE


def _fill(page: _Page, service: Service) -> Iterator[None]:
    """It may be left alone for a while wherever it yields."""
    exports = [(export, _label("export", export.name)) for export in service.registry]
    _add_server(page, service, len(exports))
    _add_process(page)
    yield from _add_exports(page, exports, list(service.unserved))
    yield from _add_requests(page, exports)
    yield from _add_storage(page, exports)


_Exports = list[tuple[Export, str]]
"""Each with its label."""


def _label(name: str, value: str) -> str:
    return f'{name}="{value.translate(_ESCAPES)}"'


class _Page:
    """Families one after the other: the samples of a family follow its head. Encoded as they come: all of it at once
    would take tens of milliseconds.
    """

    def __init__(self) -> None:
        self._text = BytesIO()
        self._name = ""

    def text(self) -> bytes:
        return self._text.getvalue()

    def _put(self, text: str) -> None:
        self._text.write(text.encode())

    def family(self, name: str, kind: str, text: str) -> None:
        self._name = name
        self._put(f"# HELP {name} {text}\n# TYPE {name} {kind}\n")

    def add(self, value: float, *labels: str) -> None:
        of = f"{{{','.join(labels)}}}" if labels else ""
        self._put(f"{self._name}{of} {value}\n")

    def single(self, name: str, kind: str, text: str, value: float) -> None:
        """A family of one sample."""
        self.family(name, kind, text)
        self.add(value)

    def histogram(self, times: Histogram, *labels: str) -> None:
        """Nothing for what has not happened yet."""
        counts = times.counts
        if not any(counts):
            return
        name, of = self._name, ",".join(labels)
        totals = list(accumulate(counts))
        start = f"{name}_bucket{{{of},"
        self._put("".join(f"{start}{bound}{total}\n" for bound, total in zip(_BOUNDS, totals, strict=True)))
        self._put(f"{name}_count{{{of}}} {totals[-1]}\n{name}_sum{{{of}}} {times.sum_s}\n")


def _add_server(page: _Page, service: Service, export_count: int) -> None:
    server, audit = service.server, service.server.audit
    page.family("nbdimg_build_info", "gauge", "The program that serves.")
    page.add(1, _label("version", own_version()), _label("python", platform.python_version()))
    page.single("nbdimg_start_time_seconds", "gauge", "When serving began, since 1970 UTC.", service.started_s)
    page.single("nbdimg_exports", "gauge", "Exports that clients can open.", export_count)
    page.single(
        "nbdimg_connections", "gauge", "Connections that are up, in their handshake too.", server.connection_count
    )
    page.single("nbdimg_buffer_bytes", "gauge", "Memory lent out for payload in flight.", server.lent_bytes)
    page.single(
        "nbdimg_accepted_connections_total",
        "counter",
        "Connections accepted, those refused at once too.",
        audit.accept_count,
    )
    page.family("nbdimg_refusals_total", "counter", "Clients turned away, and exports kept from clients.")
    for reason, count in audit.refusal_counts.items():
        page.add(count, _label("reason", reason.value))
    page.family("nbdimg_tls_handshakes_total", "counter", "TLS handshakes that succeeded.")
    for name, count in audit.tls_counts.items():
        page.add(count, _label("version", name))
    page.family("nbdimg_reloads_total", "counter", "Reloads of the configuration or of the TLS files.")
    page.add(service.reload_count, _label("outcome", "applied"))
    page.add(service.refused_reload_count, _label("outcome", "refused"))


def _add_process(page: _Page) -> None:
    page.single("process_cpu_seconds_total", "counter", "Processor time.", time.process_time())
    page.single("process_max_fds", "gauge", "Descriptors allowed.", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    with contextlib.suppress(OSError):  # a sandbox may hide it
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        page.single("process_resident_memory_bytes", "gauge", "Memory in use.", resident)


def _add_exports(page: _Page, exports: _Exports, unserved: Iterable[str]) -> Iterator[None]:
    page.family("nbdimg_export_size_bytes", "gauge", "The disk's size.")
    for export, label in exports:
        page.add(export.info.size, label)
        yield
    page.family(
        "nbdimg_export_failed",
        "gauge",
        "1 when writes and flushes fail until the image is opened anew, or a reload could not do that.",
    )
    for export, label in exports:
        page.add(int(any(each.image.failure is not None for each in export.with_overlays)), label)
        yield
    for name in unserved:
        page.add(1, _label("export", name))
    page.family("nbdimg_export_connections", "gauge", "Clients attached.")
    for export, label in exports:
        page.add(export.meter.connection_count, label)
        yield
    page.family("nbdimg_export_attaches_total", "counter", "Clients that have attached.")
    for export, label in exports:
        page.add(export.meter.attach_count, label)
        yield
    page.family("nbdimg_export_requests_in_flight", "gauge", "Requests that wait for storage or for others.")
    for export, label in exports:
        page.add(sum(each.inflight.count for each in export.with_overlays), label)
        yield


def _add_requests(page: _Page, exports: _Exports) -> Iterator[None]:
    used: list[tuple[str, str, CommandMeter]] = []
    for export, label in exports:
        used += ((label, _label("command", name), meter) for name, meter in _commands(export.meter))
        yield
    page.family("nbdimg_export_requests_total", "counter", "Requests answered.")
    for label, command, meter in used:
        page.add(meter.count, label, command)
        yield
    page.family("nbdimg_export_request_bytes_total", "counter", "Lengths of the requests that succeeded.")
    for label, command, meter in used:
        page.add(meter.bytes, label, command)
        yield
    page.family("nbdimg_export_request_errors_total", "counter", "Requests answered with an NBD error.")
    for label, command, meter in used:
        for error, count in meter.errors.items():
            page.add(count, label, command, _label("error", error.name))
        yield
    page.family(
        "nbdimg_export_request_duration_seconds", "histogram", "From a request's arrival until its reply is made."
    )
    for label, command, meter in used:
        page.histogram(meter, label, command)
        yield
    page.family("nbdimg_export_queue_wait_seconds", "histogram", "What requests waited for older overlapping ones.")
    for export, label in exports:
        page.histogram(export.meter.waits, label)
        yield


def _commands(meter: Meter) -> Iterator[tuple[str, CommandMeter]]:
    """Those that somebody has used."""
    for number, used in meter.commands.items():
        if used.count:
            yield Command(number).name.lower(), used
    if meter.unknown.count:
        yield "unknown", meter.unknown


def _add_storage(page: _Page, exports: _Exports) -> Iterator[None]:
    page.family(
        "nbdimg_export_flush_duration_seconds", "histogram", "Flushes; one answers all requests that wait for it."
    )
    for export, label in exports:
        page.histogram(export.image.gate.times, label)
        yield
    page.family("nbdimg_export_fsync_duration_seconds", "histogram", "The fdatasync calls that flushes consist of.")
    for export, label in exports:
        page.histogram(export.image.sync_times, label)
        yield
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for export, label in exports:
        for table, cache in export.image.tables():
            of = label, _label("table", table)
            hit_count, miss_count = found.get(of, (0, 0))
            found[of] = hit_count + cache.hit_count, miss_count + cache.load_count
        yield
    page.family("nbdimg_export_metadata_cache_hits_total", "counter", "Look-ups that memory answered.")
    for of, (hit_count, _) in found.items():
        page.add(hit_count, *of)
        yield
    page.family("nbdimg_export_metadata_cache_misses_total", "counter", "Look-ups that had to read a table.")
    for of, (_, miss_count) in found.items():
        page.add(miss_count, *of)
        yield
