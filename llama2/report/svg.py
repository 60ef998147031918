"""Drawings of matplotlib as SVG text, coloured by the page.

The colours in a drawing are placeholders that become CSS variables, so that one drawing serves
light and dark pages; its text stays text in the page's font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

from llama2.errors import explain_missing_extra

INK, FAINT, GRID = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0{n}0f0{n}" for n in range(1, 9))  # placeholders of the page's --s1 .. --s8
_COLOURS = {
    INK: "currentColor",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
    **{code: f"var(--s{n})" for n, code in enumerate(SERIES, 1)},
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.7,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "llama2",
}


def choose_colour(index: int) -> str:
    """Return the placeholder colour of the `index`-th series."""
    return SERIES[index % len(SERIES)]


def draw(paint: Callable[[Any], None], width: float = 5.0, height: float = 3.1) -> str:
    """Run `paint` on a fresh matplotlib figure of `width` x `height` inches; return its SVG
    element, ready to be inlined."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise explain_missing_extra("matplotlib", "report") from None

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs the layout font lacks: the browser's has them
        figure = Figure(figsize=(width, height))
        figure.patch.set_alpha(0)
        paint(figure)

        for axes in figure.axes:
            axes.patch.set_alpha(0)

        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )

    return _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """Strip what only a file needs, and point colours and fonts at the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    referenced = set(re.findall(r"(?:url\(|href=\")#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in referenced else "", svg)
    svg = re.sub(r"(font: [\d.]+px|font-family:) [^;\"]+", r"\1 var(--font)", svg)

    for code, variable in _COLOURS.items():
        svg = svg.replace(code, variable)

    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        r'<svg class="chart" viewBox="\1" role="img">',
        svg,
        count=1,
    )
    return re.sub(r"\n\s*", "\n", svg).strip()


def number_ids(page: str) -> str:
    """Give the charts of a page ids of their own: two drawings may use the same names."""
    start, *charts = re.split(r'(?=<svg class="chart")', page)
    for index, chart in enumerate(charts, 1):
        start += re.sub(r'( id="|url\(#|href="#)(?=[mpi][0-9a-f]{10})', rf"\g<1>c{index}-", chart)

    return start
