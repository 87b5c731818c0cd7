"""What a run records, and its JSON form.

Times are microseconds, sizes bytes, rates per second. A record holds what was measured; medians, ratios and verdicts
are computed from it in `report`, so a saved run can be judged again with another threshold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Measurement:
    """One fio run. Latencies are completion latencies over all connections of the run."""

    iops: float
    bytes_per_s: float
    p50_us: float
    p99_us: float
    max_us: float
    request_count: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One cell on one server in one round. Exactly one of `measurement` and `error` is set."""

    cell: str
    server: str
    round_index: int
    measurement: Measurement | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class NeighbourSample:
    """A 4 KiB depth-1 reader on one connection, alone and then beside a busy neighbour on another connection.

    `kind` names the neighbour. `disk_bytes` is what the server fetched from storage while the neighbour ran: for a cold
    neighbour it proves that the reads missed the page cache. `is_slow_disk`: the misses were made slow (`slowdisk`).
    """

    kind: str
    server: str
    round_index: int
    alone: Measurement | None
    beside: Measurement | None
    neighbour: Measurement | None
    disk_bytes: int = 0
    is_slow_disk: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CpuCost:
    """Processor time of a server, all its processes and threads, for each request; `busy_cores` is its average use."""

    server: str
    iops: float
    user_us: float
    system_us: float
    busy_cores: float


@dataclass(frozen=True, slots=True)
class SyscallCost:
    name: str
    per_request: float
    time_share: float


@dataclass(frozen=True, slots=True)
class FunctionCost:
    """A Python function or builtin under the profiler: the times include the profiler's own cost for each call."""

    name: str
    calls_per_request: float
    self_us_per_request: float
    self_share: float


@dataclass(slots=True)
class Profile:
    cpu: list[CpuCost] = field(default_factory=list)
    syscalls: list[SyscallCost] = field(default_factory=list)
    functions: list[FunctionCost] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Run:
    """One invocation of the benchmark. `servers` maps name to version in table order; `missing` maps name to why."""

    command: str
    date: str
    subject: str
    rounds: int
    seconds: float
    image_size: int
    facts: dict[str, str]
    servers: dict[str, str]
    missing: dict[str, str]
    samples: list[Sample] = field(default_factory=list)
    cold: list[NeighbourSample] = field(default_factory=list)
    fairness: list[NeighbourSample] = field(default_factory=list)
    profile: Profile | None = None

    @property
    def peers(self) -> list[str]:
        return [name for name in self.servers if name != self.subject]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Run:
        """The run that `to_json` wrote. Raises: ValueError, KeyError or TypeError for any other text."""
        raw: dict[str, Any] = json.loads(text)
        profile = raw.pop("profile")
        return cls(
            **{
                **raw,
                "samples": [
                    Sample(**{**item, "measurement": _measurement(item["measurement"])}) for item in raw["samples"]
                ],
                "cold": [_neighbour(item) for item in raw["cold"]],
                "fairness": [_neighbour(item) for item in raw["fairness"]],
            },
            profile=None if profile is None else _profile(profile),
        )


def _measurement(raw: Mapping[str, Any] | None) -> Measurement | None:
    return None if raw is None else Measurement(**raw)


def _neighbour(raw: Mapping[str, Any]) -> NeighbourSample:
    return NeighbourSample(**{**raw, **{key: _measurement(raw[key]) for key in ("alone", "beside", "neighbour")}})


def _profile(raw: Mapping[str, Any]) -> Profile:
    return Profile(
        cpu=[CpuCost(**item) for item in raw["cpu"]],
        syscalls=[SyscallCost(**item) for item in raw["syscalls"]],
        functions=[FunctionCost(**item) for item in raw["functions"]],
        notes=list(raw["notes"]),
    )
