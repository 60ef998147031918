"""What became of what a stage read: nothing is left out in silence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Counts of one set of records: read, kept, cut short, and left out by reason."""

    read: int = 0
    kept: int = 0
    cut: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    cures: dict[str, str] = field(default_factory=dict)
    """reason -> what would keep these records"""

    def skip(self, reason: str, cure: str = "", count: int = 1) -> None:
        """Count records that are left out; `cure` says what would keep them."""
        if not count:
            return
        self.skipped[reason] += count
        if cure:
            self.cures[reason] = cure

    def summary(self) -> dict[str, Any]:
        """Plain JSON: rows read, records kept, cut short, and skipped by reason."""
        return {"read": self.read, "kept": self.kept, **({"cut": self.cut} if self.cut else {}),
                "skipped": dict(self.skipped.most_common())}

    def line(self) -> str:
        """`read 5, kept 2, cut 1, left out 3: empty answer 2, too long 1 (raise --sequence-length)`."""
        said = f"read {self.read:,}, kept {self.kept:,}"
        if self.cut:
            said += f", cut {self.cut:,}"
        reasons = [f"{reason} {count:,}" + (f" ({self.cures[reason]})" if reason in self.cures else "")
                   for reason, count in self.skipped.most_common() if count]
        if reasons:
            said += f", left out {sum(self.skipped.values()):,}: {', '.join(reasons)}"
        return said
