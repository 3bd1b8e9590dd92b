"""The file of figures, which is written after every row, and rows as text for the terminal and the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.programs import differences
from benchmarks.report.files import read_json
from benchmarks.report.formats import number
from training.files import write_json

BENCHMARK = "half_hour"
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


class FiguresFile:
    """The JSON file of a half hour; every change is written at once, atomically."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        """Open the file, or begin a new one.

        Args:
            path: of the file.
            head: benchmark, quick, config, environment and images.

        Raises:
            ValueError: if the file holds figures of another machine, other sizes, images or versions.
        """
        self._path = path
        self._content: dict[str, Any] = {**head, "expected": {}, "parts": {}}
        if not path.is_file():
            return
        before = read_json(path, COMMAND)
        if differing := differences(_identity(before), _identity(head)):
            raise ValueError(
                f"{path} holds figures of another setup ({differing}); give another --json or remove the file"
            )
        self._content |= {key: before[key] for key in ("expected", "parts")}

    def missing(self, part: str) -> list[str]:
        """Return the names of a part's rows that have no figures."""
        return missing_rows(self._content)[part]

    def expect(self, part: str, names: Sequence[str], *, again: bool) -> None:
        """Set which rows a part has; ``again`` discards the figures that are there."""
        self._content["expected"][part] = list(names)
        before = {} if again else self._content["parts"].get(part, {})
        self._content["parts"][part] = {name: before[name] for name in names if name in before}
        write_json(self._path, self._content)

    def record(self, part: str, name: str, figures: Mapping[str, Any]) -> None:
        """Put a row into the file."""
        self._content["parts"][part][name] = dict(figures)
        write_json(self._path, self._content)

    def rows(self, part: str) -> dict[str, dict[str, Any]]:
        """Return a part's rows so far, in the order in which they are expected."""
        rows: dict[str, dict[str, Any]] = self._content["parts"].get(part, {})
        return {name: rows[name] for name in self._content["expected"].get(part, []) if name in rows}


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


def _identity(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must agree between two runs, flat, so that a message can name what differs."""
    where = content.get("environment", {})
    flat: dict[str, Any] = {
        "gpu": where.get("gpu"),
        "processor": where.get("processor"),
        **where.get("versions", {}),
    }
    flat["benchmark"] = content.get("benchmark")
    return {**flat, **content.get("config", {}), **content.get("images", {})}
