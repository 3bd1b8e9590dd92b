"""Figures as geometry: where bars and whiskers stand, in percent of a chart's width. The page draws them.

Percentages let a chart be as wide as its reader's screen, with text of its own size beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.peers.contract import DECODE_LIMIT
from benchmarks.report.results import Rate, Rates

_MARGIN = 1.02


@dataclass(frozen=True)
class Bar:
    """One bar; positions in percent."""

    name: str
    ours: bool
    text: str
    """The median in words."""
    spread: str
    """Lowest … highest turn, in words."""
    median_pct: float
    low_pct: float
    high_pct: float
    mark_pct: float | None = None
    """Where a mark stands on this bar, if it has one."""


@dataclass(frozen=True)
class Chart:
    """Bars over one axis that starts at 0."""

    bars: tuple[Bar, ...]
    unit: str
    limit_pct: float | None = None
    """Where the line stands that no bar can pass."""
    limit: str = ""
    """What the line is."""
    mark: str = ""
    """What the marks on the bars are."""


@dataclass(frozen=True)
class Part:
    """One piece of a stacked bar."""

    name: str
    text: str
    share: str
    start_pct: float
    width_pct: float


def chart(
    rates: Rates,
    unit: str,
    *,
    limit: bool = False,
    marks: Mapping[str, float] | None = None,
    mark: str = "",
    ours_alone: bool = False,
) -> Chart:
    """Bars of ``rates``, the highest first; in the order given where there are ``ours_alone``.

    With ``limit`` the entry DECODE_LIMIT becomes a line instead of a bar; ``marks`` are values per name.
    """
    marks = marks or {}
    line = rates.get(DECODE_LIMIT) if limit else None
    shown = [rate for rate in rates.values() if rate is not line]
    if not ours_alone:
        shown.sort(key=lambda rate: -rate.median)
    top = max([rate.high for rate in rates.values()] + list(marks.values()), default=0) * _MARGIN or 1.0
    bars = tuple(
        Bar(
            rate.name,
            ours_alone or rate.is_ours,
            quantity(rate.median, unit),
            f"{number(rate.low)} … {number(rate.high)}",
            median_pct=100 * rate.median / top,
            low_pct=100 * rate.low / top,
            high_pct=100 * rate.high / top,
            mark_pct=100 * marks[rate.name] / top if rate.name in marks else None,
        )
        for rate in shown
    )
    if line is None:
        return Chart(bars, unit, mark=mark)
    return Chart(bars, unit, 100 * line.median / top, f"{line.name}: {quantity(line.median, unit)}", mark)


def ratio_chart(ratios: Mapping[str, float]) -> Chart:
    """Bars of ratios by their words, with the line at 1: longer is more than what is compared with."""
    top = max([*ratios.values(), 1.0]) * _MARGIN
    bars = tuple(
        Bar(words, True, times(value), "", *(100 * value / top for _ in range(3)))
        for words, value in ratios.items()
    )
    return Chart(bars, "×", 100 / top)


def costs(rates: Sequence[Rate], unit: str) -> Chart:
    """Bars of costs in the order given, with times and memory in the unit a person would choose."""
    top = max(max(rate.high for rate in rates), 0) * _MARGIN or 1.0
    words = seconds if unit == "s" else mebibytes
    bars = tuple(
        Bar(
            rate.name,
            True,
            words(rate.median),
            f"{words(rate.low)} … {words(rate.high)}",
            *(100 * max(value, 0) / top for value in (rate.median, rate.low, rate.high)),
        )
        for rate in rates
    )
    return Chart(bars, unit)


def stack(parts_us: Mapping[str, float]) -> tuple[Part, ...]:
    """Stages one after the other, as parts of their sum."""
    total = sum(parts_us.values()) or 1.0
    parts, start = [], 0.0
    for name, value in parts_us.items():
        share = 100 * value / total
        parts.append(Part(name, f"{number(value)} µs", f"{share:.0f} %", start, share))
        start += share
    return tuple(parts)


def number(value: float) -> str:
    """Three figures, or all of a larger number's: 1,234; 123; 12.3; 1.23; 0.0123."""
    if value == 0:
        return "0"
    # Rounded first: 9.999 is 10.0 and not 10.00.
    exponent = int(f"{value:.2e}".split("e")[1])
    return f"{value:,.{max(0, 2 - exponent)}f}"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.2f} ×"


def quantity(value: float, unit: str) -> str:
    """A number with its unit."""
    return f"{number(value)} {unit}"


def seconds(value: float) -> str:
    """A time in s, ms or µs."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if abs(value) * factor >= 0.9995:
            return quantity(value * factor, unit)
    return quantity(value * 1e6, "µs")


def mebibytes(value: float) -> str:
    """Memory in GiB or MiB, to a tenth of a MiB; what is less is allocator noise."""
    if abs(value) >= 1024:
        return quantity(value / 1024, "GiB")
    return f"{value:,.0f} MiB" if abs(value) >= 99.95 else f"{value:.1f} MiB"


def megabytes(num_bytes: float) -> str:
    """Bytes on disk in MB or GB, of a thousand."""
    return quantity(num_bytes / 1e9, "GB") if num_bytes >= 1e9 else quantity(num_bytes / 1e6, "MB")
