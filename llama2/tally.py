"""Counts of what a stage reads: nothing is left out in silence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_NAMED = 8


@dataclass
class Tally:
    """Counts of one set of records: read, kept, cut short, and left out by reason."""

    read: int = 0
    kept: int = 0
    cut: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    cures: dict[str, str] = field(default_factory=dict)
    """reason -> what would keep these records"""
    notes: dict[str, Counter[str]] = field(default_factory=dict)
    """a thing found -> how many rows: of each format, of each column that is not read"""
    files: Counter[str] = field(default_factory=Counter)
    """files of a folder, a glob or an archive that were left out, by reason"""

    def skip(self, reason: str, cure: str = "", count: int = 1) -> None:
        """Count records that are left out; `cure` says what would keep them."""
        if count:
            self.skipped[reason] += count
        if count and cure:
            self.cures[reason] = cure

    def note(self, what: str, name: str, count: int = 1) -> None:
        """Count a thing found that leaves nothing out: `note("format", "alpaca")`."""
        self.notes.setdefault(what, Counter())[name] += count

    def leave(self, reason: str, count: int = 1) -> None:
        """Count files that are not read."""
        self.files[reason] += count

    def summary(self) -> dict[str, Any]:
        """Plain JSON: rows read, records kept, cut short, and skipped by reason; then what was
        noted."""
        summary: dict[str, Any] = {"read": self.read, "kept": self.kept}
        if self.cut:
            summary["cut"] = self.cut

        summary["skipped"] = dict(self.skipped.most_common())
        for what, counts in self.notes.items():
            summary[what.replace(" ", "_")] = dict(counts.most_common())

        return summary | ({"files_left_out": dict(self.files.most_common())} if self.files else {})

    def line(self) -> str:
        """`read 5, kept 2, left out 3: empty answer 2, too long 1 (raise --sequence-length);
        format: turns 5`."""
        text = f"read {self.read:,}, kept {self.kept:,}"
        if self.cut:
            text += f", cut {self.cut:,}"

        reasons: list[str] = []
        for reason, count in self.skipped.most_common():
            cure = f" ({self.cures[reason]})" if reason in self.cures else ""
            reasons.append(f"{reason} {count:,}{cure}")

        if reasons:
            text += f", left out {self.skipped.total():,}: {', '.join(reasons)}"

        for what, counts in self.notes.items():
            names = [f"{name} {count:,}" for name, count in counts.most_common(_NAMED)]
            if len(counts) > _NAMED:
                names.append(f"and {len(counts) - _NAMED} more")

            text += f"; {what}: {', '.join(names)}"

        return f"{text}; {self.left_out()}" if self.files else text

    def left_out(self) -> str:
        """`files left out 2: hidden 1, README.md 1`."""
        reasons = [f"{reason} {count:,}" for reason, count in self.files.most_common()]
        return f"files left out {self.files.total():,}: {', '.join(reasons)}"
