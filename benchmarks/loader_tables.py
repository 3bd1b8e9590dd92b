"""The loader benchmark's result as tables on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.ratios import GROUPS

_JPEG_SETS = ("reencoded", "pass_through")
"""Their tables have one for each work below them."""
_UNITS = {"convert": "pictures/s", "photometric": "views/s"}

# What rows may hold beside their rate: its heading and its form.
_COLUMNS = {
    "mean_error": ("mean error", ".2f"),
    "max_error": ("largest", ".2f"),
}


def print_tables(console: Console, result: dict[str, Any]) -> None:
    """Print every table of the result, then the stages, then the ratios."""
    threads = result["config"]["threads"]
    for name, table in result["tables"].items():
        for work, rows in table.items() if name in _JPEG_SETS else (("", table),):
            title = f"{name} {work}".strip()
            console.print(_rates(f"{title}; {threads} threads", rows, _UNITS.get(name, "samples/s")))
    if result["stages"]:
        console.print(_stages(result["stages"]))
    for group in GROUPS:
        for ratio, value in result.get(group, {}).items():
            console.print(f"{group}.{ratio}: {value:.2f}")
    measured = {work for name in _JPEG_SETS for work in result["tables"].get(name, {})}
    for work, reasons in ((work, result["left_out"][work]) for work in sorted(measured)):
        for name, reason in reasons.items():
            console.print(f"[dim]{work} without {name}: {reason}[/]")


def _rates(title: str, rows: dict[str, dict[str, Any]], unit: str) -> Table:
    columns = {key: told for key, told in _COLUMNS.items() if any(key in row for row in rows.values())}
    table = Table(title=title)
    table.add_column("")
    for heading in (unit, "lowest … highest", *(heading for heading, _ in columns.values())):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        cells = [f"{row['median']:.0f}", f"{row['low']:.0f} … {row['high']:.0f}"]
        for key, (_, form) in columns.items():
            cells.append("–" if row[key] is None else format(row[key], form))
        table.add_row(name, *cells)
    return table


def _stages(stages: dict[str, float]) -> Table:
    table = Table(title="where a sample's time goes, one thread")
    table.add_column("stage")
    table.add_column("µs", justify="right")
    for name, micros in stages.items():
        table.add_row(name, f"{micros:.0f}")
    return table
