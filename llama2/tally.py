"""What became of what a stage read: nothing is left out in silence."""

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
    """what was found -> how many rows: of each format, of each column that is not read"""
    files: Counter[str] = field(default_factory=Counter)
    """files of a folder, a glob or an archive that were left out, by reason"""

    def skip(self, reason: str, cure: str = "", count: int = 1) -> None:
        """Count records that are left out; `cure` says what would keep them."""
        if not count:
            return

        self.skipped[reason] += count
        if cure:
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
        noted = {
            what.replace(" ", "_"): dict(found.most_common()) for what, found in self.notes.items()
        }
        return {
            "read": self.read,
            "kept": self.kept,
            **({"cut": self.cut} if self.cut else {}),
            "skipped": dict(self.skipped.most_common()),
            **noted,
            **({"files_left_out": dict(self.files.most_common())} if self.files else {}),
        }

    def line(self) -> str:
        """`read 5, kept 2, left out 3: empty answer 2, too long 1 (raise --sequence-length);
        format: turns 5`."""
        said = f"read {self.read:,}, kept {self.kept:,}"
        if self.cut:
            said += f", cut {self.cut:,}"

        reasons = [
            f"{reason} {count:,}" + (f" ({self.cures[reason]})" if reason in self.cures else "")
            for reason, count in self.skipped.most_common()
            if count
        ]
        if reasons:
            said += f", left out {sum(self.skipped.values()):,}: {', '.join(reasons)}"

        for what, found in self.notes.items():
            named = [f"{name} {count:,}" for name, count in found.most_common(_NAMED)]
            more = [f"and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
            said += f"; {what}: {', '.join([*named, *more])}"

        return f"{said}; {self.left_out()}" if self.files else said

    def left_out(self) -> str:
        """`files left out 2: hidden 1, README.md 1`."""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.files.most_common())
        return f"files left out {sum(self.files.values()):,}: {reasons}"
