"""The parts a report page is made of. Text is escaped on its way in; only `Html` passes as it
is."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

STYLE = "\n" + (Path(__file__).parent / "page.css").read_text("utf-8")
_SECTION = re.compile(r'<section id="([\w-]+)"><h2>(?:<span[^>]*>[^<]*</span>)?([^<]*)</h2>')


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def esc(value: Any) -> Html:
    """Return any value as markup: `Html` as it is, everything else escaped."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Sequence[Html]) -> Html:
    """Join parts, one below the other; empty ones are left out."""
    return Html("\n".join(part for part in parts if part))


def subtitle(text: str) -> Html:
    """Return a heading within a section."""
    return Html(f"<h3>{esc(text)}</h3>")


def paragraph(text: str | Html, kind: str = "") -> Html:
    """Return a paragraph of the class `kind`."""
    start = f'<p class="{kind}">' if kind else "<p>"
    return Html(f"{start}{_bind_units(text)}</p>")


def _bind_units(text: str | Html) -> Html:
    """Keep a number of our own prose and its per cent sign on one line."""
    return Html(esc(text).replace(" %", "\u00a0%"))


def figure(chart: str, title: str, note: str | Html = "", wide: bool = False) -> Html:
    """Return a chart with its title above and a note below. `chart` is SVG markup; a wide one
    scrolls on a phone."""
    caption = f"<figcaption>{_bind_units(note)}</figcaption>" if note else ""
    start = '<figure class="wide">' if wide else "<figure>"
    return Html(f'{start}<h4>{esc(title)}</h4><div class="scroll">{chart}</div>{caption}</figure>')


def figures(*items: Html, small: bool = False) -> Html:
    """Return figures side by side where there is room; empty ones are left out."""
    content = "".join(items)
    kind = "figures small" if small else "figures"
    return Html(f'<div class="{kind}">{content}</div>') if content else Html("")


def table(
    headers: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    words: Sequence[int] = (0,),
    note: str = "",
) -> Html:
    """Return a table whose columns are numbers, but for those named in `words`."""
    names = [esc(header) for header in headers]
    kinds = ["w" if index in words else "n" for index in range(len(names))]
    cells = [f'<th class="{kind}">{name}</th>' for kind, name in zip(kinds, names)]
    head = "".join(cells)
    body = ""

    for row in rows:
        cells = [
            f'<td class="{kind}" data-label="{name}">{esc(cell)}</td>'
            for kind, name, cell in zip(kinds, names, row, strict=True)
        ]
        body += f"<tr>{''.join(cells)}</tr>"

    lines = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    below = paragraph(note, "note") if note else ""
    return Html(f'<div class="scroll">{lines}</div>{below}')


def chip(text: str, kind: str) -> Html:
    """Return a small coloured label; `kind` is good, bad, few (too few to tell) or plain."""
    return Html(f'<span class="chip {kind}">{esc(text)}</span>')


def section(anchor: str, number: str, title: str, *parts: Html) -> Html:
    """Return a section of the page; nothing at all if it has no content."""
    content = join(parts)
    if not content:
        return Html("")

    paper = f'<span class="paper">{esc(number)}</span>' if number else ""
    return Html(f'<section id="{esc(anchor)}"><h2>{paper}{esc(title)}</h2>\n{content}\n</section>')


def percent(share: float | None, decimals: int = 1) -> str:
    """Format a share as per cent; an empty string for none."""
    return "" if share is None else f"{100 * share:.{decimals}f}\u00a0%"


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with so many significant digits; counts in full; an empty string for none."""
    if value is None:
        return ""
    if float(value).is_integer() or abs(value) >= 10**digits:
        return f"{value:,.0f}"

    return f"{value:.{digits}g}"


def short(value: float | None) -> str:
    """Format a count in thousands, millions, billions or trillions; an empty string for none."""
    if value is None:
        return ""

    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"

    return f"{value:.3g}"


def clock(seconds: float | None) -> str:
    """Format a duration; an empty string for none."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"

    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"

    return f"{minutes // 60} h {minutes % 60:02} min"


def details(summary: str | Html, content: Html) -> Html:
    """Return content that is folded away below a line."""
    return Html(f"<details><summary>{esc(summary)}</summary>{content}</details>")


def talk(turns: Iterable[tuple[str, str]]) -> Html:
    """Return a conversation of (role, text) turns."""
    content = ""
    for role, text in turns:
        answer = esc(text) if text else "<i>(nothing)</i>"
        content += (
            f'<div class="turn {esc(role)}"><span class="role">{esc(role)}</span>'
            f'<div class="said">{answer}</div></div>'
        )

    return Html(f'<div class="talk">{content}</div>')


def document(title: str, subtitle: str, body: Html) -> str:
    """Return the whole page, with links to its sections."""
    links = ""
    for anchor, name in _SECTION.findall(body):
        links += f'<a href="#{anchor}">{name}</a>'

    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{esc(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{esc(title)}</h1><p class="subtitle">{esc(subtitle)}</p><nav>{links}</nav></header>
<main>
{body}
</main>
</body>
</html>
"""
