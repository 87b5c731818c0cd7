"""What the environment says over the file.

`NBDIMG_LISTEN` (URIs, spaces between them), `NBDIMG_INSECURE_PLAINTEXT`, `NBDIMG_RELOAD`, `NBDIMG_LOG_FORMAT`, and for
each key of `[limits]` one as `NBDIMG_LIMIT_CONNECTIONS`. Other names that begin with NBDIMG_ are left alone: Kubernetes
sets `NBDIMG_PORT` and the like for a service of that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from nbdimg.config import LOG_FORMATS
from nbdimg.configfile.limits import LIMIT_NAMES, LIMITS
from nbdimg.configfile.mapping import RELOADS
from nbdimg.configfile.values import EnvironmentText, listener_uri, one_of
from nbdimg.errors import ConfigError
from nbdimg.uri import NbdUri

LIMIT_PREFIX = "NBDIMG_LIMIT_"


@dataclass(slots=True)
class Found:
    """None: the environment does not say. `limits` by the names of `Limits`."""

    listeners: tuple[NbdUri, ...] | None = None
    allows_plaintext: bool | None = None
    reload: str | None = None
    log_format: str | None = None
    limits: dict[str, Any] = field(default_factory=dict)


def from_environment(environment: Mapping[str, str], problems: list[str]) -> Found:
    """Problems are appended."""
    found = Found()
    for name, raw in environment.items():
        try:
            _take(found, name, EnvironmentText(raw))
        except ConfigError as error:
            problems.append(f"environment variable {name}: {error}")
    return found


def _take(found: Found, name: str, value: EnvironmentText) -> None:
    if name == "NBDIMG_LISTEN":
        found.listeners = tuple(listener_uri(each) for each in value.split()) or None
    elif name == "NBDIMG_INSECURE_PLAINTEXT":
        found.allows_plaintext = one_of("true", "false")(value) == "true"
    elif name == "NBDIMG_RELOAD":
        found.reload = one_of(*RELOADS)(value)
    elif name == "NBDIMG_LOG_FORMAT":
        found.log_format = one_of(*LOG_FORMATS)(value)
    elif name.startswith(LIMIT_PREFIX):
        key = name.removeprefix(LIMIT_PREFIX).lower()
        if key not in LIMITS:
            near = get_close_matches(key, LIMITS, 1)
            guess = f", did you mean {LIMIT_PREFIX}{near[0].upper()}" if near else ""
            raise ConfigError(f"unknown limit{guess}; known are {', '.join(LIMITS)}")
        found.limits[LIMIT_NAMES[key]] = LIMITS[key](value)
