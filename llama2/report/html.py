"""The parts a report page is made of. Text is escaped on its way in; only `Html` passes as it
is."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

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


def heading(text: str) -> Html:
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
        said = esc(text) if text else "<i>(nothing)</i>"
        content += (
            f'<div class="turn {esc(role)}"><span class="role">{esc(role)}</span>'
            f'<div class="said">{said}</div></div>'
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


STYLE = """
:root {
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif;
  --paper: #fdfdfc; --card: #ffffff; --ink: #1c2126; --faint: #626b75; --grid: #d9dde2; --soft: #f2f4f6;
  --accent: #1f5f9e; --good: #1a7347; --good-soft: #e2f3e9; --bad: #a8321f; --bad-soft: #fbe6e1;
  --few: #7a5600; --few-soft: #faf0d2;
  --s1: #1f6cb0; --s2: #c8590f; --s3: #1f8a5b; --s4: #8d3f9c;
  --s5: #96700a; --s6: #1391a5; --s7: #bd2f53; --s8: #5f6873;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1b1f23; --ink: #e4e8ec; --faint: #9aa4ae; --grid: #363d44; --soft: #22272c;
    --accent: #7db4ea; --good: #6fd09c; --good-soft: #17392a; --bad: #f2937f; --bad-soft: #47211a;
    --few: #e3c16b; --few-soft: #3b3014;
    --s1: #6aaeea; --s2: #f0914f; --s3: #59c795; --s4: #c98ad6;
    --s5: #d9b24a; --s6: #52c5d6; --s7: #f07a98; --s8: #9aa4ae;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--font); }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 40px; }
h1 { font-size: 2rem; line-height: 1.15; margin: 0; letter-spacing: -0.015em; }
.subtitle { color: var(--faint); margin: 6px 0 18px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; padding: 10px 0 14px; border-bottom: 1px solid var(--grid);
  font-size: 0.9rem; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { padding: 26px 0 8px; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 0 0 10px; letter-spacing: -0.01em; }
h3 { font-size: 1.05rem; margin: 24px 0 8px; }
h4 { font-size: 0.92rem; font-weight: 600; margin: 0 0 6px; }
.paper { color: var(--faint); font-weight: 400; margin-right: 0.6em; }
p { margin: 0 0 12px; max-width: 72ch; }
.note, figcaption { color: var(--faint); font-size: 0.86rem; line-height: 1.45; }
.note { margin-top: 6px; }
figcaption { margin-top: 4px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 18px;
  margin: 14px 0 18px; align-items: start; }
figure { margin: 0; padding: 14px 16px 12px; background: var(--card); border: 1px solid var(--grid); border-radius: 8px;
  min-width: 0; max-width: 640px; }
figure.wide { grid-column: 1 / -1; max-width: none; }
svg.chart { display: block; width: 100%; height: auto; overflow: visible; color: var(--ink); }
.figures.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 12px; }
.scroll { overflow-x: auto; margin: 12px 0 4px; }
figure .scroll { margin: 0; }
table { border-collapse: collapse; font-size: 0.92rem; min-width: min(100%, 420px);
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--faint); font-size: 0.83rem; vertical-align: bottom; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
.n { text-align: right; white-space: nowrap; }
th.n { white-space: normal; max-width: 9em; }
.w { text-align: left; }
tbody tr:last-child td { border-bottom: 0; }
.verdicts table { width: 100%; }
.verdicts td:first-child { font-weight: 600; }
.chip { display: inline-block; padding: 1px 9px; border-radius: 99px; font-size: 0.8rem; font-weight: 600;
  white-space: nowrap; background: var(--soft); color: var(--faint); }
.chip.good { background: var(--good-soft); color: var(--good); }
.chip.bad { background: var(--bad-soft); color: var(--bad); }
.chip.few { background: var(--few-soft); color: var(--few); }
details { margin: 10px 0; border: 1px solid var(--grid); border-radius: 8px; background: var(--card); }
summary { cursor: pointer; padding: 9px 14px; font-weight: 600; font-size: 0.94rem; overflow-wrap: anywhere; }
details > :not(summary) { margin-left: 14px; margin-right: 14px; }
details > :last-child { margin-bottom: 14px; }
.talk { display: flex; flex-direction: column; gap: 6px; margin: 4px 0 12px; }
.turn { display: grid; grid-template-columns: 6.5em 1fr; gap: 10px; font-size: 0.94rem; }
.role { color: var(--faint); font-size: 0.82rem; padding-top: 2px; overflow-wrap: anywhere; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--grid); padding-left: 10px; }
.turn.assistant .said { border-color: var(--s1); }
.marks { color: var(--faint); font-size: 0.8rem; margin-left: 0.5em; white-space: nowrap; }
@media (max-width: 600px) {
  header, main { padding-left: 14px; padding-right: 14px; }
  header { padding-top: 24px; }
  h1 { font-size: 1.55rem; }
  figure { padding: 12px 10px 10px; }
  figure.wide svg.chart { width: 720px; }
  .figures.small { grid-template-columns: 1fr 1fr; gap: 8px; }
  .figures.small figure { padding: 9px 7px 7px; }
  .figures.small h4 { font-size: 0.82rem; }
  .turn { grid-template-columns: 1fr; gap: 0; }
  .verdicts thead { display: none; }
  .verdicts tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--grid); }
  .verdicts td { display: block; border: 0; padding: 1px 0; text-align: left; white-space: normal; }
  .verdicts td:nth-child(n+2):not(:last-child)::before { content: attr(data-label) ": "; color: var(--faint);
    font-size: 0.8rem; }
}
@media print {
  nav { display: none; }
  figure, details { break-inside: avoid; }
}
"""
