"""Every line of the metrics is read by Prometheus's own parser, and says what a scripted client has done."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbdimg.admin import metrics
from nbdimg.admin.metrics import exposition
from nbdimg.config import AccessRule, ExportConfig, ServerConfig
from nbdimg.formats import create_image
from nbdimg.limits import Limits
from nbdimg.server.service import Service
from nbdimg.uri import NbdUri
from tests.server.tls_live import LiveServer
from tests.support.rawclient import Client
from tests.support.rawprotocol import Command, ConnectionClosed, Option, Rep, info_data
from tests.support.rss import wait_until

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
GONE_LIMIT_S = 30

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(server: LiveServer) -> Samples:
    """Value by name and labels. Raises: ValueError: a line that the parser does not take."""
    text, content_type = server.ask(exposition(server.service))
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    found: Samples = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.type != "unknown", family.name
        assert family.documentation, family.name
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((f"nbdimg_{name}", tuple(sorted(labels.items()))))


def served(directory: Path, *exports: ExportConfig, **limits: int) -> LiveServer:
    return LiveServer(ServerConfig(exports, (NbdUri(socket=str(directory / "s")),), Limits(**limits)))


def raw(directory: Path, name: str, access: tuple[AccessRule, ...] = ()) -> ExportConfig:
    path = directory / f"{len(list(directory.iterdir()))}.raw"
    path.write_bytes(b"d" * SIZE)
    return ExportConfig(str(path), name, "raw", access=access)


def attached(server: LiveServer, name: str) -> Client:
    client = Client(server.address)
    client.greet()
    client.negotiate(name)
    return client


def test_metrics_say_what_a_client_has_done(tmp_path: Path) -> None:
    with served(tmp_path, raw(tmp_path, "disk"), raw(tmp_path, "idle")) as server:
        with attached(server, "disk") as client:
            for _ in range(3):
                assert client.read(0, 4096).error == 0
            assert client.write(8192, b"w" * 1000).error == 0
            assert client.request(Command.FLUSH).error == 0
            assert client.read(SIZE, 512).error == 22
            found = samples(server)
            client.disconnect()
        disk = {"export": "disk"}
        assert value(found, "export_requests_total", command="read", **disk) == 4
        assert value(found, "export_requests_total", command="write", **disk) == 1
        assert value(found, "export_requests_total", command="flush", **disk) == 1
        assert value(found, "export_request_bytes_total", command="read", **disk) == 12288
        assert value(found, "export_request_bytes_total", command="write", **disk) == 1000
        assert value(found, "export_request_errors_total", command="read", error="EINVAL", **disk) == 1
        assert value(found, "export_request_duration_seconds_count", command="read", **disk) == 4
        assert value(found, "export_request_duration_seconds_bucket", command="read", le="+Inf", **disk) == 4
        assert value(found, "export_flush_duration_seconds_count", **disk) == 1
        assert value(found, "export_fsync_duration_seconds_count", **disk) == 1
        assert value(found, "export_connections", **disk) == 1
        assert value(found, "export_attaches_total", **disk) == 1
        assert value(found, "export_requests_in_flight", **disk) == 0
        assert value(found, "export_size_bytes", **disk) == SIZE
        assert value(found, "export_failed", **disk) == 0
        assert value(found, "connections") == 1
        assert value(found, "exports") == 2
        idle = {name for name, labels in found if ("export", "idle") in labels}
        assert idle == {
            *("nbdimg_export_size_bytes", "nbdimg_export_failed", "nbdimg_export_connections"),
            *("nbdimg_export_attaches_total", "nbdimg_export_requests_in_flight"),
        }
        assert wait_until(lambda: value(samples(server), "connections") == 0, GONE_LIMIT_S)
        found = samples(server)
        assert value(found, "export_connections", **disk) == 0
        assert value(found, "export_attaches_total", **disk) == 1
        assert value(found, "accepted_connections_total") == 1


@pytest.mark.parametrize("kind", ["per-client", "kept"])
def test_metrics_of_overlays_are_those_of_the_export_that_they_lie_over(
    tmp_path: Path, kind: Literal["per-client", "kept"]
) -> None:
    golden = replace(raw(tmp_path, "golden"), overlay=kind, overlay_directory=str(tmp_path))
    with served(tmp_path, golden) as server:
        with attached(server, "golden@vm1" if kind == "kept" else "golden") as client:
            assert client.write(0, b"w" * 4096).error == 0
            assert client.request(Command.FLUSH).error == 0
            found = samples(server)
            assert value(found, "export_flush_duration_seconds_count", export="golden") == 1
            assert value(found, "export_fsync_duration_seconds_count", export="golden") or kind == "per-client"
            assert value(found, "export_failed", export="golden") == 0
            (export,) = server.service.registry
            (overlay,) = export.overlays.lent if export.overlays else ()
            overlay.image.gate.failure = "a flush failed"
            assert value(samples(server), "export_failed", export="golden") == 1
        assert wait_until(lambda: value(samples(server), "export_failed", export="golden") == 0, GONE_LIMIT_S)


def test_histogram_grows_towards_its_last_bucket_and_ends_with_the_count(tmp_path: Path) -> None:
    with served(tmp_path, raw(tmp_path, "disk")) as server, attached(server, "disk") as client:
        client.send_requests(client.reads(50, 4096))
        assert len(client.read_replies(50)) == 50
        found = samples(server)
    name, of = "nbdimg_export_request_duration_seconds", {"export": "disk", "command": "read"}
    buckets = sorted(
        (float(dict(labels)["le"]), count) for (each, labels), count in found.items() if each == f"{name}_bucket"
    )
    assert [bound for bound, _ in buckets] == [
        *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0),
        float("inf"),
    ]
    counts = [count for _, count in buckets]
    assert counts == sorted(counts)
    assert counts[-1] == value(found, "export_request_duration_seconds_count", **of) == 50
    total = value(found, "export_request_duration_seconds_sum", **of)
    assert total is not None
    assert 0 < total < 50 * 60


@pytest.mark.parametrize("name", ['with "quotes"', "back\\slash", "two\nlines", "Größe\t日本", '\\n", evil="1'])
def test_export_name_of_any_kind_is_one_label(tmp_path: Path, name: str) -> None:
    with served(tmp_path, raw(tmp_path, name)) as server:
        with attached(server, name) as client:
            assert client.read(0, 512).error == 0
            found = samples(server)
        assert value(found, "export_requests_total", export=name, command="read") == 1


def test_export_that_leaves_takes_its_series_with_it(tmp_path: Path) -> None:
    with served(tmp_path, raw(tmp_path, "stays"), raw(tmp_path, "leaves")) as server:
        with attached(server, "leaves") as client:
            assert client.read(0, 512).error == 0
        assert value(samples(server), "export_requests_total", export="leaves", command="read") == 1
        left = server.service.registry.lookup("leaves")
        assert left is not None
        server.now(server.service.registry.remove, "leaves")
        after = samples(server)
        assert not [key for key in after if ("export", "leaves") in key[1]]
        assert value(after, "export_size_bytes", export="stays") == SIZE
        server.now(server.service.registry.add, left)


def test_refusals_are_counted_by_reason(tmp_path: Path) -> None:
    hidden = raw(tmp_path, "hidden", access=(AccessRule(networks=("192.0.2.1",)),))
    with served(tmp_path, hidden, raw(tmp_path, "disk"), connections=1) as server:
        with Client(server.address) as client:
            client.greet()
            assert client.option(Option.GO, info_data("hidden"))[-1].type == Rep.ERR_UNKNOWN
            with Client(server.address) as second, pytest.raises(ConnectionClosed):
                second.greet()
        assert server.has_logged("1 client is connected already")
        found = samples(server)
        by_reason = {dict(labels)["reason"]: count for (name, labels), count in found.items() if "refusals" in name}
        assert by_reason == {"access": 1, "limit": 1, "tls": 0, "timeout": 0, "protocol": 0, "image": 0}
        assert value(found, "accepted_connections_total") == 2


def test_tables_of_a_chain_tell_their_hits_and_misses(tmp_path: Path) -> None:
    """A table is read once, and answers every other look-up."""
    path = tmp_path / "disk.qcow2"
    create_image(path, 64 * MIB, format="qcow2")
    with served(tmp_path, ExportConfig(str(path), "disk", "qcow2")) as server, attached(server, "disk") as client:
        assert client.write(0, b"x" * 65536).error == 0
        assert client.request(Command.FLUSH).error == 0
    with served(tmp_path, ExportConfig(str(path), "disk", "qcow2")) as server, attached(server, "disk") as client:
        for _ in range(20):
            assert client.read(0, 512).error == 0
        found = samples(server)
    l2 = {"export": "disk", "table": "l2"}
    assert value(found, "export_metadata_cache_misses_total", **l2) == 1
    hits = value(found, "export_metadata_cache_hits_total", **l2)
    assert hits is not None
    assert 19 <= hits <= 80


def test_reload_of_the_tls_files_counts_when_there_is_tls(tmp_path: Path) -> None:
    with served(tmp_path, raw(tmp_path, "disk")) as server:
        server.now(server.service.reload_tls)
        found = samples(server)
        assert value(found, "reloads_total", outcome="applied") == 0
        assert value(found, "reloads_total", outcome="refused") == 0


def test_control_parser_refuses_a_name_that_is_not_escaped() -> None:
    with pytest.raises(ValueError, match=r".*"):
        list(text_string_to_metric_families('a_total{export="with "quotes""} 1\n'))


async def turns_of_others(service: Service) -> int:
    """Turns of the loop while the metrics are written."""
    writing = asyncio.ensure_future(exposition(service))
    count = 0
    while not writing.done():
        await asyncio.sleep(0)
        count += 1
    return count


def test_metrics_of_many_exports_leave_the_loop_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tmp_path, *(raw(tmp_path, f"disk{index}") for index in range(20))) as server:
        monkeypatch.setattr(metrics, "TURN_S", 0.0)
        assert server.ask(turns_of_others(server.service)) > 100
        monkeypatch.setattr(metrics, "TURN_S", 3600.0)
        assert server.ask(turns_of_others(server.service)) <= 2, "control"
