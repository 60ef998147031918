"""The parts that the papers of a release are made of. Whatever comes from data is escaped on its
way into a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~])")


def text(value: object) -> str:
    """Any value as one line of plain text: nothing in it is taken for markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def code(value: object) -> str:
    """Any value as code on one line, also within a table."""
    return f"`{' '.join(str(value).replace('`', chr(39)).split())}`".replace("|", "\\|")


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)
) -> str:
    """A table of cells that are Markdown already; columns are numbers, set to the right, but for
    those in `words`."""
    rule = [":--" if column in words else "--:" for column in range(len(headers))]
    return "\n".join(
        "| " + " | ".join(cell or " " for cell in row) + " |" for row in (headers, rule, *rows)
    )


def document(*parts: str) -> str:
    """Blocks with an empty line between them; empty ones are left out."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def bullets(*lines: str) -> str:
    return "\n".join(f"- {line}" for line in lines if line)


def percent(share: float | None, decimals: int = 1) -> str:
    """A share as per cent; a dash for none."""
    return "–" if share is None else f"{100 * share:.{decimals}f} %"


def count(value: float | None) -> str:
    """A whole number in full, with commas; a dash for none."""
    return "–" if value is None else f"{value:,.0f}"


def hours(value: float) -> str:
    """Device-hours, of small ones as much as is not zero."""
    return f"{value:,.4f}" if value >= 0.001 else f"{value:.6f}"


def rate(found: Mapping[str, Any] | None, key: str = "rate") -> str:
    """A share with its 95 % interval."""
    if not found or found.get(key) is None:
        return "–"

    return f"{percent(found[key])} [{bound(found['low'])}, {bound(found['high'])}]"


def bound(share: float) -> str:
    """One end of an interval of a share, in per cent."""
    return f"{100 * min(1.0, max(0.0, share)):.1f}"


def mean(found: Mapping[str, Any] | None) -> str:
    """A mean between 0 and 1 with its 95 % interval."""
    if not found or found.get("mean") is None:
        return "–"

    return f"{found['mean']:.3f} [{max(0.0, found['low']):.3f}, {min(1.0, found['high']):.3f}]"
