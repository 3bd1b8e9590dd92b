"""half_hour.json: read, checked, and arranged for its section of the page, which names what is missing.

python -m benchmarks.report
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.half_hour.figures import (
    BENCHMARK,
    COMMAND,
    FACTS,
    facts_in_words,
    missing_rows,
)
from benchmarks.half_hour.plan import published_name
from benchmarks.report.charts import Chart, chart
from benchmarks.report.files import Node
from benchmarks.report.results import Rate, rate_of

_TITLES = {
    "check": "Tests that need a GPU",
    "ceilings": "What the hardware can do",
    "loader": "Loaders",
    "nvjpeg": "The GPU's JPEG decoder by itself",
    "step": "Training steps",
    "train": "Real runs, stopped and resumed",
    "dali": "DALI",
}
_PEERS = ("published", "torchvision", "DALI GPU")


@dataclass(frozen=True)
class HalfHourFigures:
    """half_hour.json."""

    quick: bool
    """Whether this is a rehearsal with tiny sizes, whose figures are not results."""
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    images: Mapping[str, Any]
    parts: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """Part → row → what was measured, rows with a reason included; in the order of what is expected."""
    rates: Mapping[str, Mapping[str, Rate]]
    """The rows of each part that have a rate."""
    missing: Mapping[str, Mapping[str, str]]
    """Part → row without figures → why."""


def read_half_hour(file: Path) -> HalfHourFigures:
    """Read half_hour.json.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not of this shape; the sentence names file and key.
    """
    content = Node.read(file, COMMAND, BENCHMARK)
    config, expected, measured = (content.at(key) for key in ("config", "expected", "parts"))
    for key in ("crop_px", "batch_size", "queue_len"):
        config.get(key, int)
    for key in ("how", "read_from"):
        content.at("images").get(key, str)
    parts: dict[str, dict[str, Mapping[str, Any]]] = {}
    rates: dict[str, dict[str, Rate]] = {}
    for part in expected.value:
        nodes = {
            name: measured.at(part).at(name)
            for name in expected.get(part, list)
            if name in measured.at(part).value
        }
        parts[part] = {name: node.value for name, node in nodes.items()}
        with_rate = {name: node for name, node in nodes.items() if "median" in node.value}
        for node in with_rate.values():
            node.get("unit", str)
        rates[part] = {name: rate_of(name, node) for name, node in with_rate.items()}
    return HalfHourFigures(
        quick=content.get("quick", bool),
        config=config.value,
        environment=content.environment(),
        images=content.at("images").value,
        parts=parts,
        rates=rates,
        missing={
            part: {name: parts[part].get(name, {}).get("reason", "no time was left") for name in names}
            for part, names in missing_rows(content.value).items()
        },
    )


def half_hour_view(figures: HalfHourFigures) -> dict[str, Any]:
    """What half_hour.html draws."""
    parts = [(name, _part_view(figures, name)) for name in figures.parts]
    return {"figures": figures, "parts": [(_TITLES.get(name, name), view) for name, view in parts]}


def _part_view(figures: HalfHourFigures, part: str) -> dict[str, Any]:
    rates, missing = figures.rates[part], figures.missing[part]
    rows = {name: dict(row) for name, row in figures.parts[part].items() if name not in missing}
    for name, row in rows.items():
        published = rates.get(published_name(name.split(",")[0])) if part == "step" else None
        if published and name in rates:
            row["over_published"] = rates[name].median / published.median
    words = {name: facts_in_words(row) for name, row in rows.items()}
    units = dict.fromkeys(rows[name]["unit"] for name in rates)
    return {
        "charts": [_chart(rates, rows, unit) for unit in units],
        "headings": [
            heading for heading, _ in FACTS.values() if any(heading in row for row in words.values())
        ],
        "words": words,
        "kernels": {name: row["kernels"] for name, row in rows.items() if "kernels" in row},
        "failures": {name: row["failures"] for name, row in rows.items() if row.get("failures")},
        "configured": [rate for rate in rates.values() if rate.configured],
        "missing": _by_reason(missing),
    }


def _chart(rates: Mapping[str, Rate], rows: Mapping[str, Mapping[str, Any]], unit: str) -> Chart:
    """Bars of the rows with this unit, in their order; those of peers are marked as such."""
    drawn = chart({name: rates[name] for name in rates if rows[name]["unit"] == unit}, unit, ours_alone=True)
    bars = (replace(bar, ours=not any(peer in bar.name for peer in _PEERS)) for bar in drawn.bars)
    return replace(drawn, bars=tuple(bars))


def _by_reason(missing: Mapping[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in missing.items():
        grouped.setdefault(reason, []).append(name)
    return grouped
