"""What a check says about an image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FINDINGS_MAX = 1000
"""Findings kept in a report; the rest are counted only, for a broken table can make millions of them."""

FindingKind = Literal["leak", "corruption", "error"]
"""leak: space that nothing refers to. corruption: data is or may come to be wrong. error: this could not be checked."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`offset` is the place in the file, in bytes; `message` says what was found and what is allowed."""

    kind: FindingKind
    structure: str
    offset: int | None
    message: str


@dataclass(slots=True)
class CheckReport:
    """Counts as `qemu-img check` gives them; cluster counts are of the guest's disk."""

    leaks: int = 0
    corruptions: int = 0
    check_errors: int = 0
    leaks_fixed: int = 0
    corruptions_fixed: int = 0
    allocated_clusters: int = 0
    total_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    image_end_offset: int = 0
    """Behind the last cluster that is in use, in bytes."""
    findings: list[Finding] = field(default_factory=list)
    findings_omitted: int = 0
    """Findings beyond FINDINGS_MAX."""

    def add(self, kind: FindingKind, structure: str, offset: int | None, message: str, times: int = 1) -> None:
        """`times`: how often it counts, as when a shared table holds it."""
        if kind == "leak":
            self.leaks += times
        elif kind == "corruption":
            self.corruptions += times
        else:
            self.check_errors += times
        if self.is_full:
            self.findings_omitted += 1
        else:
            self.findings.append(Finding(kind, structure, offset, message))

    def omit(self, leaks: int, corruptions: int) -> None:
        """Count so many findings, each once, that there is no room for."""
        assert self.is_full
        self.leaks += leaks
        self.corruptions += corruptions
        self.findings_omitted += leaks + corruptions

    @property
    def is_full(self) -> bool:
        return len(self.findings) >= FINDINGS_MAX

    @property
    def is_clean(self) -> bool:
        return not (self.leaks or self.corruptions or self.check_errors)

    @property
    def exit_status(self) -> int:
        """As of `qemu-img check`: 0 clean, 1 not completed, 2 corruptions, 3 leaks only."""
        if self.check_errors:
            return 1
        if self.corruptions:
            return 2
        return 3 if self.leaks else 0
