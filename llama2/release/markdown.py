"""Parts of the papers of a release: each function is named for the Markdown it returns.

Whatever comes from data is escaped (`text`, `code`) on its way into a paper.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llama2.results import Mean, Proportion, WinShare

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~])")


def text(value: object) -> str:
    """Escape a value as one line of plain text: nothing in it is taken for markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def code(value: object) -> str:
    """Quote a value as code on one line, also within a table."""
    line = " ".join(str(value).replace("`", "'").split())
    return f"`{line}`".replace("|", "\\|")


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)
) -> str:
    """Set cells that are Markdown already in a table; nothing without rows.

    Columns are numbers, set to the right, but for those in `words`.
    """
    if not rows:
        return ""

    rule = [":--" if column in words else "--:" for column in range(len(headers))]
    lines = []
    for row in (headers, rule, *rows):
        cells = " | ".join(cell or " " for cell in row)
        lines.append(f"| {cells} |")

    return "\n".join(lines)


def document(*parts: str) -> str:
    """Join blocks with an empty line between them; empty ones are left out."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def section(title: str, *parts: str) -> str:
    """Put a title above what there is; nothing where all parts are empty."""
    return when(any(parts), document(title, *parts))


def when(condition: object, part: str) -> str:
    """Keep a part where the condition holds; nothing elsewhere."""
    return part if condition else ""


def bullets(*lines: str) -> str:
    """List lines; empty ones are left out."""
    return "\n".join(f"- {line}" for line in lines if line)


def percent(share: float | None, decimals: int = 1) -> str:
    """Write a share as per cent; a dash for none."""
    return "–" if share is None else f"{100 * share:.{decimals}f} %"


def count(value: float | None) -> str:
    """Write a whole number in full, with commas; a dash for none."""
    return "–" if value is None else f"{value:,.0f}"


def hours(value: float) -> str:
    """Write device-hours, of small ones as much as is not zero."""
    return f"{value:,.4f}" if value >= 0.001 else f"{value:.6f}"


def rate(share: Proportion | WinShare | None) -> str:
    """Write a share with its 95 % interval; a dash for none."""
    if share is None or share.rate is None:
        return "–"

    return f"{percent(share.rate)} [{bound(share.low)}, {bound(share.high)}]"


def bound(share: float) -> str:
    """Write one end of an interval of a share in per cent."""
    return f"{100 * min(1.0, max(0.0, share)):.1f}"


def mean(value: Mean | None) -> str:
    """Write a mean between 0 and 1 with its 95 % interval; a dash for none."""
    if value is None or value.mean is None or value.low is None or value.high is None:
        return "–"

    return f"{value.mean:.3f} [{max(0.0, value.low):.3f}, {min(1.0, value.high):.3f}]"
