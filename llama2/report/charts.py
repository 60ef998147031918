"""Charts of the report as SVG text, drawn by matplotlib and coloured by the page.

The colours in a drawing are placeholders that become CSS variables, so that one drawing serves
light and dark pages; its text stays text in the page's font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from llama2.errors import missing_extra
from llama2.results import Proportion

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = Sequence[float]
_INK, _FAINT, _GRID = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0{n}0f0{n}" for n in range(1, 9))  # placeholders of the page's --s1 .. --s8
_COLOURS = {
    _INK: "currentColor",
    _FAINT: "var(--faint)",
    _GRID: "var(--grid)",
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
    "text.color": _INK,
    "axes.labelcolor": _FAINT,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _FAINT,
    "ytick.labelcolor": _FAINT,
    "axes.edgecolor": _GRID,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.7,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "llama2",
}


@dataclass(frozen=True)
class Series:
    """One line or one set of bars. `low` and `high` are its 95 % interval; a dashed one is the
    paper's."""

    label: str
    x: Sequence[Any]
    y: Values
    low: Values = ()
    high: Values = ()
    paper: bool = False
    markers: bool = False

    @classmethod
    def of_shares(
        cls, label: str, x: Sequence[Any], shares: Sequence[Proportion], markers: bool = False
    ) -> Series:
        """Return the series of measured shares with their intervals."""
        return Series(
            label,
            x,
            [share.rate or 0.0 for share in shares],
            [share.low for share in shares],
            [share.high for share in shares],
            markers=markers,
        )


def colour(index: int) -> str:
    """The placeholder colour of the `index`-th series."""
    return SERIES[index % len(SERIES)]


def draw(paint: Callable[[Any], None], width: float = 5.0, height: float = 3.1) -> str:
    """Run `paint` on a fresh matplotlib figure of `width` x `height` inches; its SVG element, ready
    to be inlined."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "report") from None

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
    """A page whose charts each have ids of their own: two drawings may use the same names."""
    charts = re.split(r'(?=<svg class="chart")', page)
    return charts[0] + "".join(
        re.sub(r'( id="|url\(#|href="#)(?=[mpi][0-9a-f]{10})', rf"\g<1>c{index}-", chart)
        for index, chart in enumerate(charts[1:], 1)
    )


def _percent(axes: Axes, axis: str = "y") -> None:
    from matplotlib.ticker import PercentFormatter

    getattr(axes, f"{axis}axis").set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def _legend(axes: Axes, count: int) -> None:
    if count > 1:
        columns = max(1, min(count, 5, round(axes.bbox.width / 72)))
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=columns,
            borderaxespad=0.3,
            handlelength=1.4,
            columnspacing=1.1,
            handletextpad=0.5,
            borderpad=0,
        )


def smooth(values: Values, window: int) -> list[float]:
    """A centred running mean over at most `window` values."""
    half = window // 2
    out = []
    for index in range(len(values)):
        part = values[max(0, index - half) : index + half + 1]
        out.append(sum(part) / len(part))

    return out


def lines(
    series: Sequence[Series],
    x: str,
    y: str,
    *,
    percent: bool = False,
    log_x: bool = False,
    level: tuple[str, float] | None = None,
    noisy: bool = False,
    bounds: tuple[float, float] | None = None,
    width: float = 5.0,
    height: float = 3.1,
) -> str:
    """Line chart. `noisy` draws a running mean over the faint raw values; `level` is a labelled
    horizontal line."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        paint_lines(axes, series, noisy=noisy)
        axes.set(xlabel=x, ylabel=y)

        if log_x:
            axes.set_xscale("log")
            ticks = sorted({value for item in series for value in item.x})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            axes.minorticks_off()

        if percent:
            _percent(axes)

        if bounds is not None:
            axes.set_ylim(*bounds)

        if level is not None:
            axes.axhline(level[1], color=_FAINT, linewidth=1, linestyle=(0, (2, 3)))
            axes.annotate(
                level[0],
                (1, level[1]),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                color=_FAINT,
                fontsize=9,
            )

        _legend(axes, len(series))

    return draw(paint, width, height)


def paint_lines(axes: Any, series: Sequence[Series], noisy: bool = False) -> None:
    """Draw the series of a line chart on existing axes."""
    for index, item in enumerate(series):
        shade = _FAINT if item.paper else colour(index)
        style: Any = (0, (4, 2)) if item.paper else "solid"
        y = item.y

        if noisy and len(y) > 60:
            axes.plot(item.x, y, color=shade, alpha=0.22, linewidth=0.8)
            y = smooth(y, max(5, len(y) // 25))

        if item.low and item.high:
            axes.fill_between(item.x, item.low, item.high, color=shade, alpha=0.1, linewidth=0)

        axes.plot(
            item.x,
            y,
            color=shade,
            linestyle=style,
            label=item.label,
            marker="o" if item.markers or len(y) == 1 else None,
            markersize=4,
        )


def bars(
    series: Sequence[Series],
    y: str,
    *,
    percent: bool = True,
    bounds: tuple[float, float] | None = None,
    level: float | None = None,
    width: float = 5.0,
    height: float = 3.1,
) -> str:
    """Grouped bars over the categories `x` of the series (those of the first name the groups), with
    intervals."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        groups = [str(name) for name in series[0].x]
        each = 0.82 / len(series)

        for index, item in enumerate(series):
            place = [g + (index - (len(series) - 1) / 2) * each for g in range(len(item.y))]
            shade = _FAINT if item.paper else colour(index)
            axes.bar(
                place,
                item.y,
                each * 0.9,
                color=shade,
                alpha=0.35 if item.paper else 1.0,
                label=item.label,
            )

            if item.low and item.high:
                gaps = [
                    [max(0.0, v - a) for v, a in zip(item.y, item.low)],
                    [max(0.0, b - v) for v, b in zip(item.y, item.high)],
                ]
                axes.errorbar(
                    place, item.y, yerr=gaps, fmt="none", color=_INK, elinewidth=0.9, capsize=2
                )

        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(y)
        axes.grid(axis="x", visible=False)

        if percent:
            _percent(axes)

        if bounds is not None:
            axes.set_ylim(*bounds)

        if level is not None:
            axes.axhline(level, color=_FAINT, linewidth=1, linestyle=(0, (2, 3)))

        _legend(axes, len(series))

    return draw(paint, width, height)


def progress(
    ours: Sequence[tuple[str, float, float]], paper: Sequence[tuple[str, float, float]]
) -> str:
    """Figure 11: each version at (win rate in helpfulness, win rate in harmlessness), in the order
    they were made."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.axhline(0.5, color=_FAINT, linewidth=0.9, linestyle=(0, (2, 3)))
        axes.axvline(0.5, color=_FAINT, linewidth=0.9, linestyle=(0, (2, 3)))

        for points, shade, style, size in (
            (paper, _FAINT, (0, (4, 2)), 3.0),
            (ours, colour(0), "solid", 5.5),
        ):
            axes.plot(
                [p[1] for p in points],
                [p[2] for p in points],
                color=shade,
                linestyle=style,
                marker="o",
                markersize=size,
                linewidth=1.3,
                clip_on=False,
            )

        for name, x, y in (paper[0], paper[-1]):
            axes.annotate(
                name, (x, y), xytext=(5, -10), textcoords="offset points", color=_FAINT, fontsize=8
            )

        places: dict[tuple[float, float], list[str]] = {}
        for name, x, y in ours:
            places.setdefault((round(x, 3), round(y, 3)), []).append(name)

        previous: tuple[float, float] | None = None
        for (x, y), names in places.items():
            crowded = (
                previous is not None and abs(x - previous[0]) < 0.12 and abs(y - previous[1]) < 0.05
            )
            left = x > 0.88 or crowded
            axes.annotate(
                ", ".join(names),
                (x, y),
                xytext=(-7 if left else 7, 4 if crowded else -4),
                color=_INK,
                fontsize=9,
                textcoords="offset points",
                ha="right" if left else "left",
                annotation_clip=False,
            )
            previous = (x, y)

        axes.set(
            xlim=(0, 1.02),
            ylim=(0, 1.02),
            xlabel="win rate, helpfulness",
            ylabel="win rate, harmlessness",
        )
        _percent(axes, "x")
        _percent(axes)

    return draw(paint, 5.0, 4.2)


def ridges(rows: Sequence[tuple[str, Values, float | None]], edges: Values, x: str) -> str:
    """Figure 20: one histogram a version, stacked from the first (top) to the last; the third value
    is the median."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        centres = [(a + b) / 2 for a, b in pairwise(edges)]
        peak = max((max(counts) / max(sum(counts), 1) for _, counts, _ in rows), default=0) or 1

        for index, (_, counts, median) in enumerate(rows):
            base = float(len(rows) - 1 - index)
            heights = [base + 0.92 * (c / max(sum(counts), 1)) / peak for c in counts]
            axes.fill_between(
                centres, base, heights, color=colour(index), alpha=0.3, linewidth=0, step="mid"
            )
            axes.step(centres, heights, where="mid", color=colour(index), linewidth=1.3)

            if median is not None:
                axes.plot(
                    [median, median],
                    [base, base + 0.92],
                    color=_INK,
                    linewidth=1,
                    linestyle=(0, (2, 2)),
                )

        axes.set_yticks(
            [len(rows) - 1 - i + 0.3 for i in range(len(rows))], [name for name, _, _ in rows]
        )
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=x, ylim=(0, len(rows) + 0.05), xlim=(edges[0], edges[-1]))
        axes.spines.left.set_visible(False)

    return draw(paint, 5.0, 0.8 + 0.62 * max(len(rows), 2))


def heat(
    matrices: Sequence[tuple[str, Sequence[Values]]],
    columns: Sequence[str],
    top: float,
    x: str,
    y: str,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Figure 10: one heat map a model on one scale; `marks` are column positions with a name (the
    instruction)."""

    def paint(figure: Any) -> None:
        grid = figure.subplots(len(matrices), 1, squeeze=False, sharex=True)
        for (title, rows), axes in zip(matrices, grid.flat):
            # Every cell is ink of one hue, more or less transparent: readable on light and on dark.
            cells = [
                [(0.17, 0.45, 0.75, min(1.0, value / top) if top else 0.0) for value in row]
                for row in rows
            ]
            axes.imshow(cells, aspect="auto", interpolation="none")
            axes.set_title(title, fontsize=9.5, loc="right", pad=4)
            axes.grid(visible=False)
            axes.set_ylabel(y)
            axes.set_yticks([])

            for place, name in marks:
                axes.axvline(place, color=_FAINT, linewidth=0.9, linestyle=(0, (2, 2)))
                axes.annotate(
                    name,
                    (place, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, 4),
                    fontsize=8.5,
                    textcoords="offset points",
                    color=_FAINT,
                    annotation_clip=False,
                )

        last = grid.flat[-1]
        step = max(1, len(columns) // 12)
        last.set_xticks(
            range(0, len(columns), step),
            [columns[i] for i in range(0, len(columns), step)],
            rotation=35,
            ha="right",
            fontsize=8,
        )
        last.set_xlabel(x)

    return draw(paint, 10.2, 1.0 + 1.6 * len(matrices))
