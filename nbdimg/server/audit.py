"""Who came, who left, who was refused: one line for each in the log `nbdimg.audit`, and how many there were.

    attach      a client has opened an export
    detach      it is gone, in whatever way; what it has transferred
    refuse      a client was turned away, or an export was kept from it, with the reason

A refusal that ends a connection is its last line; a connection that was attached gets a detach and no refusal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from enum import Enum
from time import monotonic

from nbdimg.errors import escaped
from nbdimg.export.meter import Meter, Tally
from nbdimg.server.log import LimitedLog
from nbdimg.units import counted

ATTACH_LINES_MAX, ATTACH_PERIOD_S = 10_000, 30.0
"""Of attach and detach lines: what journald takes of a service, so that a fleet leaves its trace when it starts."""

logger = logging.getLogger("nbdimg.audit")


class Refusal(Enum):
    """Why a client was refused, in metrics and in JSON lines."""

    ACCESS = "access"
    """It has no right to the export, and was told that there is none."""
    TLS = "tls"
    """No TLS where it is required, or its handshake failed: a wrong certificate, a wrong version, no TLS at all."""
    LIMIT = "limit"
    """There are as many clients as are allowed."""
    TIMEOUT = "timeout"
    """Its handshake took too long."""
    PROTOCOL = "protocol"
    """It broke the protocol before it had opened an export."""
    IMAGE = "image"
    """It would have got an overlay, which could not be made or opened."""


class Audit:
    """One for a server. `accept_count` also counts who was refused; `tls_counts` by version, as "TLSv1.3"."""

    def __init__(self) -> None:
        self.accept_count = 0
        self.refusal_counts = dict.fromkeys(Refusal, 0)
        self.tls_counts: dict[str, int] = {}
        self._visits = LimitedLog(logger, ATTACH_LINES_MAX, ATTACH_PERIOD_S)
        self._refusals = {reason: LimitedLog(logger) for reason in Refusal}
        """Apart, or who sends rubbish would cover who tries what it may not open."""

    def tell_rest(self) -> None:
        """Have the log say of how many there was no line. The server ends."""
        self._visits.tell_rest()
        for refusals in self._refusals.values():
            refusals.tell_rest()

    def encrypted(self, version: str) -> None:
        """A TLS handshake has succeeded."""
        self.tls_counts[version] = self.tls_counts.get(version, 0) + 1

    def refused(
        self,
        peer: str,
        reason: Refusal,
        message: str,
        export: str | None = None,
        identities: Iterable[str] = (),
        tls: str | None = None,
    ) -> None:
        """`export`: which was kept from the client; None: it got as far as none. `identities`, `tls`: as a Visit's."""
        self.refusal_counts[reason] += 1
        known = {"export": export, "peer": peer, "identity": sorted(identities), "tls": tls}
        fields = {"event": "refuse", **known, "reason": reason.value}
        self._refusals[reason].say(logging.WARNING, f"{peer}: refused: {message}", fields)

    def attached(self, visit: Visit) -> None:
        visit.meter.attach_count += 1
        visit.meter.connection_count += 1
        right = "read-only" if visit.is_read_only else "read-write"
        how = "".join(f", {each}" for each in (visit.tls, visit.shown_identity()) if each)
        message = f"{visit.peer}: attached to {escaped(visit.export)}, {right}{how}"
        self._visits.say(logging.INFO, message, visit.fields("attach"))

    def detached(self, visit: Visit, tally: Tally) -> None:
        visit.meter.connection_count -= 1
        seconds = monotonic() - visit.started_s
        read, written = tally.read_bytes, tally.written_bytes
        message = (
            f"{visit.peer}: detached from {escaped(visit.export)} after {seconds:.1f} s, "
            f"{counted(read, 'byte')} read, {written} written"
        )
        done = {"read_bytes": read, "written_bytes": written, "seconds": round(seconds, 3)}
        self._visits.say(logging.INFO, message, visit.fields("detach") | done)


class Visit:
    """What is known of a client that has opened an export. `tls`: as "TLSv1.3"; None: plain. `meter`: the export's."""

    __slots__ = ("export", "identities", "is_read_only", "meter", "peer", "started_s", "tls")

    def __init__(
        self, export: str, meter: Meter, peer: str, identities: Iterable[str], tls: str | None, *, is_read_only: bool
    ) -> None:
        self.export = export
        self.meter = meter
        self.peer = peer
        self.identities = sorted(identities)
        self.tls = tls
        self.is_read_only = is_read_only
        self.started_s = monotonic()

    def shown_identity(self) -> str:
        """The names that TLS has proven; a key's fingerprint is for machines."""
        names = [escaped(each) for each in self.identities if not each.startswith("spki-sha256:")]
        return f"as {', '.join(names)}" if names else ""

    def fields(self, event: str) -> dict[str, object]:
        return {
            "event": event,
            "export": self.export,
            "peer": self.peer,
            "identity": self.identities,
            "tls": self.tls,
            "read_only": self.is_read_only,
        }
