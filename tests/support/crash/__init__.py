"""The crash harness: what a power cut may leave of an image's files, and whether all of it keeps the guest's bytes.

A run is recorded, then crashed at every point, in memory; nothing here touches a disk, and a seed decides everything.

    Scenario ─ record ─▶ Trace ─ crash_states ─▶ CrashState ─ Verifier ─▶ Observation ─ Explorer ─▶ Report
                           ▲                        │  ▲                       │
       RecordingFile, Client                        ▼  └── a recovery's own ───┘
                                               Expectations

The trace is one total order of: start and end of every write, punch, zero, truncate and fdatasync of every file; submit
and ack of every guest request (WRITE, WRITE_ZEROES, TRIM, FLUSH, and FUA); begin and end of the scenario's own steps.

What a crash leaves. A write past the end of its file is two operations: the bytes, and the extension.

    (D1) An operation is *durable* at t when it ended before the start of an fdatasync of its own file that had ended
         well by t. One file's barrier says nothing of another's.
    (D2) An operation is *pending* at t when it started by t and is not durable. A request in flight is pending.
    (D3) A failed fdatasync makes nothing durable, and what was pending when it ended stays pending for ever: a later
         barrier that succeeds does not cover it. A write that failed stays pending for ever as well.
    (S1) A crash at t leaves all that is durable, and any subset of the pending operations, in the order of starts.
         Two that are in flight together on the same bytes are a violation of their own ("racing operations"): their
         order is nobody's, so no state could be called right.
    (S2) Of an operation left, any subset of its 512-byte sectors may be there: it is *torn*. A sector is atomic, but
         an operation on a part of a sector changes only that part.
    (S3) Bytes beyond the end that the extensions and truncates left give the file vanish; an extension without its
         bytes leaves zeroes.
    (S4) Crash points are the starts of all operations and barriers, and the end of the trace.

Enumeration at a crash point: everything and nothing; with up to 8 pending operations all subsets, else each alone, all
but each, every prefix, and 32 random subsets, in which some are torn too; for each operation of several sectors a
prefix, a suffix and a random part of it, on top of everything and on top of nothing. States that are equal in content
are visited once for each set of flushes that the guest knows of. A cap on a crash point's states takes everything and
nothing, and a seeded sample of the others.

What the disk may then read as. Every sector has a history: what it held at the start, and each change submitted to it.

    (G1) Its *floor* is the newest element acked before a FLUSH was submitted that was itself acked by t, or acked with
         FUA by t. Changes of one sector take effect in the order of submission: the export's queue sees to that.
    (G2) Admissible is each element from the floor on that was submitted by t, in full; nothing else is.
    (G3) A trim, and what a shrinking disk loses, leave zeroes or what was there; as a floor they admit both. A request
         that failed may have taken effect or not, sector by sector.
    (G4) The size is that of the last resize which is durable, or of one submitted since.

Violations: "does not open"; "corrupt" (the scenario's checker; also that a recovery repeated changes nothing more);
"flushed sector lost" (not admissible, yet once put in that sector, or zeroes); "alien sector" (bytes that nobody put
there: torn, another sector's, stale); "wrong size"; "racing operations"; "does not go on" (a state, one in
`going_on_every`, that cannot be written to, flushed, closed and read again).

Opening a state for writing may write: that recovery is a trace too, and its crash states are visited once, with the
expectations of the crash that it recovers from.

A violation counts once for each kind and state. A scenario does well to begin with a disk that is not all zeroes: where
zeroes are admissible, a mapping that reached the disk before its data cannot be told from a write that was lost.

Controls: `without_barriers` lets every fdatasync cover nothing, which a writer cannot survive; `toys` are formats with
faults to switch on.
"""

from tests.support.crash.client import Client, ExportTarget, Target, requests, written
from tests.support.crash.explore import (
    ALIEN,
    CLOSED,
    CORRUPT,
    HEADER,
    LOST,
    RACE,
    SIZE,
    STUCK,
    Explorer,
    Observation,
    Report,
)
from tests.support.crash.scenario import Built, Scenario, Verifier, record, run, run_now
from tests.support.crash.states import CrashState, crash_states
from tests.support.crash.trace import SECTOR, RecordingFile, Trace

__all__ = [
    "ALIEN",
    "CLOSED",
    "CORRUPT",
    "HEADER",
    "LOST",
    "RACE",
    "SECTOR",
    "SIZE",
    "STUCK",
    "Built",
    "Client",
    "CrashState",
    "Explorer",
    "ExportTarget",
    "Observation",
    "RecordingFile",
    "Report",
    "Scenario",
    "Target",
    "Trace",
    "Verifier",
    "crash_states",
    "record",
    "requests",
    "run",
    "run_now",
    "written",
]
