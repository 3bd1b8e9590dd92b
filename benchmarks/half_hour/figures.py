"""Rows of the half hour as text, for the terminal and the report, and which of them are missing."""

from collections.abc import Mapping
from typing import Any

from benchmarks.report.formats import number

COMMAND = "make half-hour"
FACTS = {
    "passed": ("passed", "{}"),
    "failed": ("failed", "{}"),
    "skipped": ("skipped", "{}"),
    "step_ms": ("ms a step", "{:.1f}"),
    "over_published": ("over published bf16", "{:.2f} ×"),
    "wait_percent": ("waiting for data", "{:.1f} %"),
    "gpu_idle_percent": ("GPU idle", "{:.1f} %"),
    "cpu_share": ("host's cores", "{:.0%}"),
    "peak_mib": ("peak memory, torch", "{:,.0f} MiB"),
    "gpu_mib": ("memory, all", "{:,.0f} MiB"),
    "mean_error": ("mean error", "{:.2f}"),
    "max_error": ("greatest error", "{:.0f}"),
    "stopped_at": ("stopped after step", "{}"),
    "steps": ("of steps", "{}"),
}
"""What a row may hold besides its rate: heading and format."""


def missing_rows(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return part → names of the rows that were not measured."""
    return {
        part: [name for name in names if "reason" in content["parts"].get(part, {}).get(name, {"reason": ""})]
        for part, names in content["expected"].items()
    }


def rate_in_words(row: Mapping[str, Any]) -> str:
    """Return the median with its unit and the range of the turns; empty for a row without a rate."""
    if "median" not in row:
        return ""
    return f"{number(row['median'])} {row['unit']} ({number(row['low'])} … {number(row['high'])})"


def facts_in_words(row: Mapping[str, Any]) -> dict[str, str]:
    """Return heading → text of everything else that a row holds."""
    return {
        heading: form.format(row[key]) for key, (heading, form) in FACTS.items() if row.get(key) is not None
    }


def row_in_words(row: Mapping[str, Any]) -> str:
    """Return a row on one line: the reason why it was not measured, or its rate and other facts."""
    facts = [f"{heading} {text}" for heading, text in facts_in_words(row).items()]
    return "; ".join(filter(None, [row.get("reason"), rate_in_words(row), *facts]))
