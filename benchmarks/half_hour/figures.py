"""The file of figures, which is written after every row, and rows in words for the terminal and the report.

python -m benchmarks.half_hour --json FILE
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
_MUST_AGREE = ("benchmark", "config", "images")


class FiguresFile:
    """The JSON file of a half hour; every change is written at once, and as a whole."""

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
        there, here = ({**_pairs(content)} for content in (before, head))
        differing = [
            f"{key} was {there.get(key)}, is {here[key]}" for key in here if there.get(key) != here[key]
        ]
        if differing:
            raise ValueError(
                f"{path} holds figures that do not belong with new ones ({'; '.join(differing)}); "
                "give another --json or remove the file"
            )
        self._content |= {key: before[key] for key in ("expected", "parts")}

    def missing(self, part: str) -> list[str]:
        """Names of a part's rows that have no figures."""
        return missing_rows(self._content)[part]

    def expect(self, part: str, names: Sequence[str], *, again: bool) -> None:
        """Say which rows a part has; ``again`` forgets those that are there."""
        self._content["expected"][part] = list(names)
        before = {} if again else self._content["parts"].get(part, {})
        self._content["parts"][part] = {name: before[name] for name in names if name in before}
        write_json(self._path, self._content)

    def record(self, part: str, name: str, figures: Mapping[str, Any]) -> None:
        """Put a row into the file."""
        self._content["parts"][part][name] = dict(figures)
        write_json(self._path, self._content)

    def rows(self, part: str) -> dict[str, dict[str, Any]]:
        """A part's rows so far, in the order in which they are expected."""
        rows: dict[str, dict[str, Any]] = self._content["parts"].get(part, {})
        return {name: rows[name] for name in self._content["expected"].get(part, []) if name in rows}


def missing_rows(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """Part → names of the rows that were not measured."""
    return {
        part: [name for name in names if "reason" in content["parts"].get(part, {}).get(name, {"reason": ""})]
        for part, names in content["expected"].items()
    }


def rate_in_words(row: Mapping[str, Any]) -> str:
    """The median with its unit and the range of the turns; empty for a row without a rate."""
    if "median" not in row:
        return ""
    low, high = (number(row[key]) for key in ("low", "high"))
    return f"{number(row['median'])} {row['unit']} ({low} … {high})"


def facts_in_words(row: Mapping[str, Any]) -> dict[str, str]:
    """Heading → text of all else that a row holds."""
    return {
        heading: form.format(row[key]) for key, (heading, form) in FACTS.items() if row.get(key) is not None
    }


def _pairs(content: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree, flat, so that a message can name what differs."""
    where = content.get("environment", {})
    pairs = {"gpu": where.get("gpu"), "processor": where.get("processor"), **where.get("versions", {})}
    for key in _MUST_AGREE:
        value = content.get(key)
        pairs |= value if isinstance(value, Mapping) else {key: value}
    return pairs
