"""Bars for the tables of the page, and curves and points drawn by matplotlib as SVG in the page's colours."""

import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from benchmarks.peers.contract import OURS
from benchmarks.report.formats import number

COLOURS = {
    **{"random": ("#6b7780", "#97a4ae"), "moco": ("#1f6fc4", "#62a8ef"), "erase": ("#b07a00", "#e5b04c")},
    **{"unmix": ("#8a4fc2", "#b593ea"), "mixmask": ("#0b7a75", "#2bb3a8"), "both": ("#c8472a", "#f0825f")},
    **{"peer": ("#5b6671", "#9aa7b0"), "ink": ("#1b2126", "#e8ecee"), "quiet": ("#5b6670", "#9aa7b0")},
    **{"line": ("#e3e5e2", "#2e363c"), "card": ("#ffffff", "#1b2125")},
}
"""Methods of the evidence, other runners, parts of the page → colour on a light and on a dark page."""
_LIGHT = {name: light for name, (light, _) in COLOURS.items()}
_MAX_DOTS = 12
_STYLE = {
    **{"font.size": 12, "axes.edgecolor": _LIGHT["line"], "axes.facecolor": "none"},
    **{"text.color": _LIGHT["ink"], "xtick.color": _LIGHT["quiet"], "ytick.color": _LIGHT["quiet"]},
    **{"xtick.major.size": 0, "ytick.major.size": 0, "axes.grid": True, "grid.color": _LIGHT["line"]},
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
}


@dataclass(frozen=True)
class Bar:
    """A row of a table with a bar below it."""

    name: str
    text: str
    """The median in words, …"""
    spread: str
    """… and the lowest and highest turn; empty if they do not differ."""
    median: float
    low: float
    high: float
    ours: bool
    mark: float | None = None
    """A value to mark on the bar."""
    cells: tuple[str, ...] = ()
    """Further cells of the row."""


def bars(
    rates: Mapping[str, Any], form: Callable[[float], str] = number, *, ours: bool | None = None
) -> list[Bar]:
    """Return bars of ``rates``, the highest first.

    Args:
        rates: By name a value, or median, low and high.
        form: Formats a value.
        ours: Whether all bars are of our code, which keeps the given order; by default the names decide.
    """
    found = []
    for name, rate in rates.items():
        keys = ("median", "low", "high")
        median, low, high = (rate[key] if isinstance(rate, Mapping) else rate for key in keys)
        spread = f"{form(low)} … {form(high)}" if low < high else ""
        is_ours = OURS in name if ours is None else ours
        found.append(Bar(name, form(median), spread, max(median, 0), max(low, 0), max(high, 0), is_ours))
    return found if ours is not None else sorted(found, key=lambda bar: -bar.median)


@dataclass(frozen=True)
class Points:
    """A row of points: shares in [0, 1] of single runs, with their mean and standard deviation."""

    name: str
    text: str
    colour: str
    """A name in :data:`COLOURS`."""
    runs: Sequence[float]
    mean: float
    std: float = 0.0
    start: float | None = None
    """The value before training, for a row that shows a change."""


@mpl.rc_context(_STYLE)
def curves(runs: Mapping[str, Sequence[Mapping[int, float]]], *, share: bool = False) -> Figure | None:
    """Draw the runs of each method by epoch, and their mean as a thick line.

    Args:
        runs: Method → for each run, epoch → value.
        share: Whether values are shares in [0, 1], to be labelled in percent.

    Returns:
        The figure, or None if there is no run.
    """
    trained = {name: [run for run in found if run] for name, found in runs.items() if any(found)}
    if not trained:
        return None
    figure = Figure(figsize=(5, 3))
    axes = figure.add_axes((0.14, 0.1, 0.83, 0.85))
    for name, found in trained.items():
        colour = _LIGHT[name]
        for run in found if len(found) > 1 else []:
            axes.plot(list(run), list(run.values()), color=colour, linewidth=1, alpha=0.4, clip_on=False)
        epochs = sorted({epoch for run in found for epoch in run})
        mean = [statistics.fmean(run[epoch] for run in found if epoch in run) for epoch in epochs]
        dots: dict[str, Any] = {"marker": "o", "markersize": 4.5} if len(epochs) <= _MAX_DOTS else {}
        axes.plot(epochs, mean, color=colour, linewidth=2.25, label=name, clip_on=False, **dots)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _label(axes.yaxis, share=share)
    axes.grid(axis="x", visible=False)
    return figure


@mpl.rc_context(_STYLE)
def points(rows: Sequence[Points], common: Sequence[Points] = ()) -> Figure:
    """Draw rows of points on an axis, which also covers the points in ``common``."""
    height = 38 * len(rows) + 24
    figure = Figure(figsize=(5, height / 72))
    axes = figure.add_axes((0.01, 20 / height, 0.98, 1 - 20 / height))
    for y, row in enumerate(rows):
        _draw_row(axes, y, row)
    for row in common:
        axes.update_datalim([(value, 0) for value in (*row.runs, row.mean - row.std, row.mean + row.std)])
    axes.autoscale_view()
    low, high = axes.get_xlim()
    axes.set(xlim=(max(low, 0), min(high, 1)), ylim=(len(rows) - 0.7, -0.85), yticks=[])
    axes.grid(visible=False)
    _label(axes.xaxis, share=True)
    return figure


def _label(axis: Axis, *, share: bool) -> None:
    axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    axis.set_major_formatter(PercentFormatter(1, symbol=" %") if share else StrMethodFormatter("{x:.10g}"))


def _draw_row(axes: Axes, y: int, row: Points) -> None:
    colour = _LIGHT[row.colour]
    label: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "verticalalignment": "center"}
    axes.axhline(y, color=_LIGHT["line"], linewidth=1, clip_on=False)
    axes.text(0, y - 0.45, row.name, **label)
    axes.text(1, y - 0.45, row.text, horizontalalignment="right", color=_LIGHT["quiet"], **label)
    if row.start is not None:
        axes.plot([row.start, row.mean], [y, y], color=colour, linewidth=3, alpha=0.45, clip_on=False)
        axes.plot(row.start, y, "o", markeredgecolor=colour, markerfacecolor=_LIGHT["card"], clip_on=False)
    if row.std:
        ends = [min(max(end, 0), 1) for end in (row.mean - row.std, row.mean + row.std)]
        axes.plot(ends, [y, y], "|-", color=colour, linewidth=1.5, markersize=8, clip_on=False)
    axes.plot(row.runs, [y] * len(row.runs), "o", color=colour, alpha=0.7, clip_on=False)
    if len(row.runs) > 1:
        axes.plot(row.mean, y, "|", color=colour, markersize=15, markeredgewidth=1.5, clip_on=False)


@mpl.rc_context(_STYLE)
def picture(figure: Figure, title: str, note: str) -> str:
    """Return curves as an SVG file of their own, on white, with title, note and legend."""
    figure.set_size_inches(760 / 72, 400 / 72)
    (axes,) = figure.axes
    axes.set_position((0.095, 0.15, 0.725, 0.66))
    axes.set_xlabel("epoch", color=_LIGHT["quiet"])
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1.04), labelspacing=0.7)
    figure.text(0.03, 0.925, title, size=16, weight="bold")
    figure.text(0.03, 0.875, note, color=_LIGHT["quiet"])
    return svg(figure, title, in_page=False)


def svg(figure: Figure, label: str, *, in_page: bool = True) -> str:
    """Return a figure as SVG with selectable text; in the page its colours follow the page's.

    Args:
        figure: What :func:`curves` or :func:`points` drew.
        label: Description for readers who cannot see the drawing.
        in_page: Use the page's CSS variables and its full width, without a background.
    """
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": label, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=in_page, dpi=72)
    text = buffer.getvalue()
    text = re.sub(r'(<g) id="[^"]*"', r"\1", text[text.index("<svg") :])
    text = re.sub(r' clip-path="[^"]*"|<clipPath.*?</clipPath>', "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'[^;]*sans-serif", "system-ui, sans-serif", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    if in_page:
        for name, light in _LIGHT.items():
            text = text.replace(light, f"var(--{name})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
