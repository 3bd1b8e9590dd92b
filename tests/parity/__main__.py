"""Compare every backend and every operation with torchvision and Pillow, and write docs/parity.md.

    make parity

Compares decoding, resizing, flipping, the photometric operations, masks and mixtures at fixed parameters, and
the distributions of everything that is drawn at random. DALI's own operators are compared too, which shows
why the loader uses some of them and not others. Takes about a minute; exits with code 1 and a message for
each comparison beyond its limits, which are defined in tests/parity/comparisons.py. With the committed
results, benchmarks/results/parity.json, the tables of docs/parity.md are written too. ``--check`` measures
nothing and exits with code 1 if they differ from the JSON.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.environment import environment, write_figures
from benchmarks.marked_block import MarkedBlock
from benchmarks.report.files import read_json
from pipelines.decode.dali_operators import import_dali
from tests.parity import distributions, geometry, mixtures, photometric
from tests.parity.comparisons import Row
from tests.parity.samples import Samples, make_samples, views_of
from training import cli
from training.cli import console

RESULTS, PAGE = Path("benchmarks/results/parity.json"), Path("docs/parity.md")
BLOCK = MarkedBlock("<!-- parity: begin -->", "<!-- parity: end -->")
_COMMAND = "make parity"
_FILE_WIDTH = 200
_HEADINGS = ("operation", "by", "against", "mean error", "largest", "allowed: mean, largest", "unit", "")
_RIGHT = ("mean error", "largest", "allowed: mean, largest")
_LIBRARIES = ("torch", "torchvision", "pillow", "ffcv", "nvidia-dali-cuda130")


@dataclass(frozen=True)
class Parity:
    """Compare every backend and every operation with torchvision and Pillow."""

    json: Path | None = None
    """File to write the rows to."""
    page: Path | None = None
    """Page with the tables to write; by default docs/parity.md for the committed results, none for others."""
    measure: bool = True
    """Measure; otherwise write the page from the existing JSON."""
    check: bool = False
    """Measure and write nothing; exit with code 1 if the page differs from the JSON."""


def main(config: Parity) -> int:
    """Measure and write, or check; return the exit code.

    Raises:
        FileNotFoundError: if the JSON to read, or the page, does not exist.
        ValueError: if the page lacks the two comments around the tables, or the JSON is not a parity result.
    """
    if config.check or not config.measure:
        file, page = config.json or RESULTS, config.page or PAGE
        result = read_result(file)
        if config.check and BLOCK.current(page) != block(result):
            console.print(f"the tables in {page} differ from {file}; run `{_COMMAND}`")
            return 1
        if config.check:
            console.print(f"the tables in {page} agree with {file}")
        else:
            _write(page, result)
        return verdict(result)
    with tempfile.TemporaryDirectory(prefix="parity.") as folder, console.status("making images") as status:
        samples = make_samples(Path(folder))
        # The operations are small: a second thread would mostly wait.
        torch.set_num_threads(1)
        result = measure(samples, progress=status.update)
    # A file has no width of its own.
    (console if console.is_terminal else Console(width=_FILE_WIDTH)).print(Markdown(block(result)))
    if config.json:
        write_figures(config.json, result, console)
    if config.page or config.json == RESULTS:
        _write(config.page or PAGE, result)
    return verdict(result)


def measure(samples: Samples, progress: Callable[[str], None]) -> dict[str, Any]:
    """Return all rows as plain data; ``left_out`` names what lacks a package, with the reason."""
    left_out: dict[str, str] = {}
    rows = []
    for row in _rows(samples, left_out):
        rows.append(asdict(row))
        progress(f"{row.backend}: {row.operation}")
    return {"benchmark": "parity", "environment": environment(), "left_out": left_out, "rows": rows}


def _rows(samples: Samples, left_out: dict[str, str]) -> Iterator[Row]:
    for name, subject in geometry.SUBJECTS.items():
        path = samples.folder if subject.backend == "folder" else samples.beton
        try:
            crops = geometry.cropper_of(path, name)
        except ImportError as error:
            left_out[name] = str(error)
        else:
            yield from geometry.rows(name, crops, samples)
    views = views_of(samples, photometric.SIDE_PX)
    for name, stage in photometric.STAGES.items():
        yield from photometric.rows(name, stage, views)
    yield from distributions.rows()
    yield from mixtures.rows()
    try:
        import_dali()
    except ImportError as error:
        left_out["DALI's operators"] = str(error)
    else:
        from tests.parity import dali_operators

        yield from dali_operators.rows(samples, views)


def verdict(result: Mapping[str, Any]) -> int:
    """Print the comparisons of used operations that exceed their limits; return 1 if there are any."""
    failed = [row for row in result["rows"] if row["used"] and not row["ok"]]
    for row in failed:
        console.print(
            f"[bold red]not equal:[/] {row['operation']} by {row['backend']} is off by {row['mean_error']:g} "
            f"on average and {row['max_error']:g} at most ({row['unit']}) from {row['against']}; allowed are "
            f"{row['mean_tolerance']:g} and {row['tolerance']:g}"
        )
    return 1 if failed else 0


def read_result(file: Path) -> dict[str, Any]:
    """Read the JSON.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is not a parity result.
    """
    result = read_json(file, _COMMAND)
    missing = {"benchmark", "environment", "left_out", "rows"} - result.keys()
    if missing or result["benchmark"] != "parity":
        raise ValueError(f"{file} is not a parity result; write it again: {_COMMAND}")
    return result


def block(result: Mapping[str, Any]) -> str:
    """Return the tables of the page in Markdown, with the line breaks around them."""
    used = [row for row in result["rows"] if row["used"]]
    others = [row for row in result["rows"] if not row["used"]]
    paragraphs = [
        _introduction(result, used),
        _table(used),
        *[f"Not measured: {name}, {reason}." for name, reason in result["left_out"].items()],
        *(("## DALI's own operators", _table(others)) if others else ()),
        "## Reasons for the limits",
        _reasons(result),
    ]
    return "\n" + "\n\n".join(paragraphs) + "\n"


def _introduction(result: Mapping[str, Any], used: list[dict[str, Any]]) -> str:
    versions = result["environment"]["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in _LIBRARIES if versions.get(name))
    failed = sum(not row["ok"] for row in used)
    outcome = f"{failed} of them beyond their limits" if failed else "all within their limits"
    return f"{len(used)} comparisons, {outcome}. {libraries}; {result['environment']['processor']}."


def _table(rows: list[dict[str, Any]]) -> str:
    rule = "|".join("---:" if heading in _RIGHT else "---" for heading in _HEADINGS)
    lines = [f"| {' | '.join(_HEADINGS)}|", f"|{rule}|"]
    for row in rows:
        errors = (f"{row[name]:g}" for name in ("mean_error", "max_error"))
        allowed = f"{row['mean_tolerance']:g}, {row['tolerance']:g}"
        names = (row["operation"], row["how"] or row["backend"], row["against"])
        cells = (*names, *errors, allowed, row["unit"], "ok" if row["ok"] else "**no**")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _reasons(result: Mapping[str, Any]) -> str:
    """Return the reasons in the order of the rows, each with its operations and references."""
    by_reason: dict[str, dict[str, None]] = {}
    for row in result["rows"]:
        by_reason.setdefault(row["why"], {})[f"{row['operation']} (against {row['against']})"] = None
    return "\n".join(f"- {'; '.join(names)}: {reason}." for reason, names in by_reason.items())


def _write(page: Path, result: Mapping[str, Any]) -> None:
    changed = BLOCK.rewrite(page, block(result))
    console.print(f"{page}: {'tables rewritten' if changed else 'tables are up to date'}")


if __name__ == "__main__":
    cli.program(Parity, main)
