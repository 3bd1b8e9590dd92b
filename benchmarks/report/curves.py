"""Curves and points as geometry: axes with ticks, lines by epoch, points of single runs; templates draw them.

All positions are percent of the drawing's width or height, the height's from its top, so that a drawing can
be as wide as its reader's screen with text of its own size.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NICE_STEPS = (1, 2, 2.5, 5, 10)
_MOST_DOTS = 12


@dataclass(frozen=True)
class Colour:
    """A colour on white paper and on a dark page."""

    light: str
    dark: str


COLOURS = {
    "random": Colour("#6b7780", "#97a4ae"),
    "moco": Colour("#1f6fc4", "#62a8ef"),
    "erase": Colour("#b07a00", "#e5b04c"),
    "unmix": Colour("#8a4fc2", "#b593ea"),
    "mixmask": Colour("#0b7a75", "#2bb3a8"),
    "both": Colour("#c8472a", "#f0825f"),
}
"""One for each method of the evidence, wherever it is drawn."""


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    pct: float
    text: str


@dataclass(frozen=True)
class Axis:
    """A range of values along a drawing's width or height."""

    low: float
    high: float
    ticks: tuple[Tick, ...]

    def pct(self, value: float) -> float:
        """Where a value stands: ``low`` at 0 and ``high`` at 100."""
        return _pct(value, self.low, self.high)


@dataclass(frozen=True)
class Line:
    """One method's runs by epoch; points are as SVG takes them, "x,y x,y"."""

    name: str
    mean: str
    """The mean over runs."""
    runs: tuple[str, ...]
    """Each run; empty where there is but one, which is the mean."""
    dots: tuple[tuple[float, float], ...]
    """Where the mean's epochs stand; empty where they are too many to be told apart."""


@dataclass(frozen=True)
class Plot:
    """Lines over epochs."""

    title: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Row:
    """Points of one method or runner on an axis; positions in percent."""

    name: str
    text: str
    style: str
    """Class that gives it its colour."""
    dots: tuple[float, ...]
    """Single runs."""
    mean_pct: float
    low_pct: float
    high_pct: float
    """Ends of a whisker, or both the mean."""
    from_pct: float | None = None
    """Where it started, if it is a change."""


@dataclass(frozen=True)
class Strip:
    """Rows of points over one axis, which need not start at 0."""

    rows: tuple[Row, ...]
    axis: Axis


def axis(
    values: Sequence[float], most_ticks: int = 5, unit: str = "", within: tuple[float, float] | None = None
) -> Axis:
    """An axis from tick to tick around ``values``, with at most so many round ticks, which are three or more.

    Values that are all the same stand in the middle of it; ``within`` are limits that it never passes.
    """
    low, high = min(values), max(values)
    if low == high:
        half = abs(low) / 10 or 1.0
        low, high = low - half, high + half
    step = _step(low, high, most_ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = [step * number for number in range(first, last + 1)]
    least, most = within or (-math.inf, math.inf)
    marks = [mark for mark in marks if least - 1e-9 <= mark <= most + 1e-9]
    return _labelled(marks[0], marks[-1], marks, _texts(marks, unit))


def epoch_axis(epochs: Sequence[int], most_ticks: int = 8) -> Axis:
    """From the first epoch to the last, with whole ticks."""
    low, high = min(epochs), max(epochs)
    step = max(1, math.ceil(_step(low, high, most_ticks))) if high > low else 1
    marks = [float(epoch) for epoch in range(low, high + 1) if epoch == low or epoch % step == 0]
    if len(marks) > 1 and marks[1] - marks[0] < step / 2:
        del marks[0]
    return _labelled(low, high, marks, [f"{mark:.0f}" for mark in marks])


def plot(title: str, curves: Mapping[str, Sequence[Mapping[int, float]]], unit: str = "") -> Plot | None:
    """Curves of each method's runs, epoch → value; None where there is nothing to draw."""
    runs = [run for of_method in curves.values() for run in of_method if run]
    if not runs:
        return None
    x = epoch_axis([epoch for run in runs for epoch in run])
    y = axis([value for run in runs for value in run.values()], unit=unit)
    return Plot(title, x, y, tuple(_line(name, found, x, y) for name, found in curves.items() if any(found)))


def row(
    name: str,
    text: str,
    runs: Sequence[float],
    mean: float,
    std: float,
    along: Axis,
    style: str,
    start: float | None = None,
) -> Row:
    """Points of single runs, their mean with a whisker of one standard deviation, and a ``start``."""
    low, high = (along.pct(min(max(end, along.low), along.high)) for end in (mean - std, mean + std))
    dots = tuple(along.pct(value) for value in runs)
    return Row(
        name, text, style, dots, along.pct(mean), low, high, None if start is None else along.pct(start)
    )


def _line(name: str, runs: Sequence[Mapping[int, float]], x: Axis, y: Axis) -> Line:
    epochs = sorted({epoch for run in runs for epoch in run})
    mean = {epoch: statistics.fmean(run[epoch] for run in runs if epoch in run) for epoch in epochs}
    return Line(
        name,
        _points(mean, x, y),
        tuple(_points(run, x, y) for run in runs) if len(runs) > 1 else (),
        tuple((x.pct(epoch), 100 - y.pct(value)) for epoch, value in mean.items())
        if len(mean) <= _MOST_DOTS
        else (),
    )


def _points(run: Mapping[int, float], x: Axis, y: Axis) -> str:
    return " ".join(f"{x.pct(epoch):.2f},{100 - y.pct(run[epoch]):.2f}" for epoch in sorted(run))


def _step(low: float, high: float, most_ticks: int) -> float:
    """The smallest round step with which at most so many ticks cover the range."""
    power = 10.0 ** math.floor(math.log10((high - low) / most_ticks))
    for nice in (nice * power * scale for scale in (1, 10, 100) for nice in _NICE_STEPS):
        if math.ceil(high / nice - 1e-9) - math.floor(low / nice + 1e-9) < most_ticks:
            return nice
    raise AssertionError(f"no step for {low} … {high}")


def _texts(marks: Sequence[float], unit: str) -> list[str]:
    """Labels with as many decimals as the finest of them needs, up to six."""
    near = 1e-4 * (marks[-1] - marks[0])
    enough = (num for num in range(6) if all(abs(round(mark, num) - mark) <= near for mark in marks))
    decimals = next(enough, 6)
    return [f"{round(mark, decimals) + 0.0:,.{decimals}f}{unit}" for mark in marks]


def _labelled(low: float, high: float, marks: Sequence[float], texts: Sequence[str]) -> Axis:
    ticks = (Tick(_pct(mark, low, high), text) for mark, text in zip(marks, texts, strict=True))
    return Axis(low, high, tuple(ticks))


def _pct(value: float, low: float, high: float) -> float:
    """A single epoch stands in the middle; the division comes first, so that ``high`` is 100 exactly."""
    return 100 * ((value - low) / (high - low)) if high > low else 50.0
