"""Charts of the report: lines, bars, and three figures of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from llama2.report.svg import FAINT, INK, choose_colour, draw
from llama2.results import Proportion

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = Sequence[float]
DASHES = (0, (4, 2))
DOTS = (0, (2, 3))


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
        rates = [share.rate or 0.0 for share in shares]
        low = [share.low for share in shares]
        high = [share.high for share in shares]
        return Series(label, x, rates, low, high, markers=markers)


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
            axes.axhline(level[1], color=FAINT, linewidth=1, linestyle=DOTS)
            axes.annotate(
                level[0],
                (1, level[1]),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                color=FAINT,
                fontsize=9,
            )

        _legend(axes, len(series))

    return draw(paint, width, height)


def paint_lines(axes: Any, series: Sequence[Series], noisy: bool = False) -> None:
    """Draw the series of a line chart on existing axes."""
    for index, item in enumerate(series):
        shade = FAINT if item.paper else choose_colour(index)
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
            shade = FAINT if item.paper else choose_colour(index)
            axes.bar(
                place,
                item.y,
                each * 0.9,
                color=shade,
                alpha=0.35 if item.paper else 1.0,
                label=item.label,
            )

            if item.low and item.high:
                below = [max(0.0, value - low) for value, low in zip(item.y, item.low)]
                above = [max(0.0, high - value) for value, high in zip(item.y, item.high)]
                axes.errorbar(
                    place,
                    item.y,
                    yerr=[below, above],
                    fmt="none",
                    color=INK,
                    elinewidth=0.9,
                    capsize=2,
                )

        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(y)
        axes.grid(axis="x", visible=False)

        if percent:
            _percent(axes)

        if bounds is not None:
            axes.set_ylim(*bounds)

        if level is not None:
            axes.axhline(level, color=FAINT, linewidth=1, linestyle=DOTS)

        _legend(axes, len(series))

    return draw(paint, width, height)


Point = tuple[str, float, float]
"""a version and its win rates in helpfulness and harmlessness"""


def progress(ours: Sequence[Point], paper: Sequence[Point]) -> str:
    """Return Figure 11: each version at its win rates, in the order in which they were made."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.axhline(0.5, color=FAINT, linewidth=0.9, linestyle=DOTS)
        axes.axvline(0.5, color=FAINT, linewidth=0.9, linestyle=DOTS)
        _paint_path(axes, paper, color=FAINT, linestyle=DASHES, markersize=3.0)
        _paint_path(axes, ours, color=choose_colour(0), linestyle="solid", markersize=5.5)
        for name, x, y in (paper[0], paper[-1]):
            axes.annotate(
                name, (x, y), xytext=(5, -10), textcoords="offset points", color=FAINT, fontsize=8
            )

        _paint_names(axes, ours)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
        axes.set(xlabel="win rate, helpfulness", ylabel="win rate, harmlessness")
        _percent(axes, "x")
        _percent(axes)

    return draw(paint, 5.0, 4.2)


def _paint_path(axes: Axes, points: Sequence[Point], **style: Any) -> None:
    _, x, y = zip(*points)
    axes.plot(x, y, marker="o", linewidth=1.3, clip_on=False, **style)


def _paint_names(axes: Axes, points: Sequence[Point]) -> None:
    """Write the names of versions beside their points, several at one point together."""
    places: dict[tuple[float, float], list[str]] = {}
    for name, x, y in points:
        places.setdefault((round(x, 3), round(y, 3)), []).append(name)

    previous = (-1.0, -1.0)
    for (x, y), names in places.items():
        crowded = abs(x - previous[0]) < 0.12 and abs(y - previous[1]) < 0.05
        left = x > 0.88 or crowded
        axes.annotate(
            ", ".join(names),
            (x, y),
            xytext=(-7 if left else 7, 4 if crowded else -4),
            color=INK,
            fontsize=9,
            textcoords="offset points",
            ha="right" if left else "left",
            annotation_clip=False,
        )
        previous = (x, y)


def ridges(rows: Sequence[tuple[str, Values, float | None]], edges: Values, x: str) -> str:
    """Return Figure 20: one histogram a version, stacked from the first (top) to the last; the
    third value is the median."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        centres = [(a + b) / 2 for a, b in pairwise(edges)]
        peak = max(max(counts) / max(sum(counts), 1) for _, counts, _ in rows) or 1

        for index, (_, counts, median) in enumerate(rows):
            base = float(len(rows) - 1 - index)
            heights = [base + 0.92 * (c / max(sum(counts), 1)) / peak for c in counts]
            axes.fill_between(
                centres,
                base,
                heights,
                color=choose_colour(index),
                alpha=0.3,
                linewidth=0,
                step="mid",
            )
            axes.step(centres, heights, where="mid", color=choose_colour(index), linewidth=1.3)

            if median is not None:
                axes.plot(
                    [median, median],
                    [base, base + 0.92],
                    color=INK,
                    linewidth=1,
                    linestyle=(0, (2, 2)),
                )

        heights = [len(rows) - 1 - index + 0.3 for index in range(len(rows))]
        axes.set_yticks(heights, [name for name, _, _ in rows])
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
    """Return Figure 10: one heat map a model on one scale up to `top` > 0; `marks` are column
    positions with a name (the instruction)."""

    def paint(figure: Any) -> None:
        grid = figure.subplots(len(matrices), 1, squeeze=False, sharex=True)
        for (title, rows), axes in zip(matrices, grid.flat):
            # Every cell is ink of one hue, more or less transparent: readable on light and on dark.
            cells = []
            for row in rows:
                cells.append([(0.17, 0.45, 0.75, min(1.0, value / top)) for value in row])

            axes.imshow(cells, aspect="auto", interpolation="none")
            axes.set_title(title, fontsize=9.5, loc="right", pad=4)
            axes.grid(visible=False)
            axes.set_ylabel(y)
            axes.set_yticks([])

            for place, name in marks:
                axes.axvline(place, color=FAINT, linewidth=0.9, linestyle=(0, (2, 2)))
                axes.annotate(
                    name,
                    (place, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, 4),
                    fontsize=8.5,
                    textcoords="offset points",
                    color=FAINT,
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
