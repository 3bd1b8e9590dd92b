"""How far every backend and every operation is from torchvision's and Pillow's.

    make parity

Decoding, resizing, flipping, the photometric operations, masks and mixtures at fixed parameters, and the
distributions of what is drawn at random; DALI's own operators beside them, as the reason why we take some and
not others. Ends with code 1 and a sentence for each comparison beyond its limit; the limits stand in
benchmarks/parity/limits.py. Takes about a minute. With the committed results, benchmarks/results/parity.json,
the tables of docs/parity.md are written too; ``--check`` measures nothing and ends with code 1 where they are
not those of the JSON.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment, write_figures
from benchmarks.parity import chances, colour, geometry, mixtures
from benchmarks.parity.measures import Row
from benchmarks.parity.page import BLOCK, block
from benchmarks.parity.samples import Samples, make_samples, views_of
from benchmarks.report.files import read_json
from pipelines.decode.dali_operators import import_dali
from training import cli
from training.cli import console

RESULTS, PAGE = Path("benchmarks/results/parity.json"), Path("docs/parity.md")
_MEND = "make parity"
_FILE_WIDTH = 200


@dataclass(frozen=True)
class Parity:
    """Compare every backend and every operation with torchvision and Pillow."""

    json: Path | None = None
    """Where the rows go."""
    page: Path | None = None
    """Page with the tables to write; by default docs/parity.md for the committed results, none for others."""
    measure: bool = True
    """Measure anew; otherwise the page is written from the JSON as it is."""
    check: bool = False
    """Measure and write nothing; end with code 1 where the page is not what the JSON gives."""


def main(config: Parity) -> int:
    """Measure and write, or check; returns the exit code.

    Raises:
        FileNotFoundError: if a JSON to be read, or the page, is not there.
        ValueError: if the page has no place for the tables, or there is nothing to read.
    """
    if config.check or not config.measure:
        file = config.json or RESULTS
        result = read_result(file)
        if config.check:
            return _check(file, config.page or PAGE, result)
        _write(config.page or PAGE, result)
        return verdict(result)
    with tempfile.TemporaryDirectory(prefix="parity.") as folder, console.status("making pictures") as status:
        samples = make_samples(Path(folder))
        # Many small operations: beside other work a second thread waits more than it does.
        torch.set_num_threads(1)
        result = measure(samples, progress=status.update)
    _print(result)
    if config.json:
        write_figures(config.json, result, console)
    page = config.page or (PAGE if config.json == RESULTS else None)
    if page:
        _write(page, result)
    return verdict(result)


def measure(samples: Samples, progress: Callable[[str], None]) -> dict[str, Any]:
    """All rows, as plain data; whatever lacks a package is named with the reason under ``left_out``."""
    left_out: dict[str, str] = {}
    rows = []
    for row in _rows(samples, left_out):
        rows.append(asdict(row))
        progress(f"{row.backend}: {row.operation}")
    return {"benchmark": "parity", "environment": environment(), "left_out": left_out, "rows": rows}


def _rows(samples: Samples, left_out: dict[str, str]) -> Iterator[Row]:
    for name, subject in geometry.SUBJECTS.items():
        try:
            crops = geometry.cropper_of(
                samples.folder if subject.backend == "folder" else samples.beton, name
            )
        except ImportError as error:
            left_out[name] = str(error)
        else:
            yield from geometry.rows(name, crops, samples)
    views = views_of(samples, colour.SIDE_PX)
    for name, stage in colour.STAGES.items():
        yield from colour.rows(name, stage, views)
    yield from chances.rows()
    yield from mixtures.rows()
    try:
        import_dali()
    except ImportError as error:
        left_out["DALI's operators"] = str(error)
    else:
        from benchmarks.parity import dali_operators

        yield from dali_operators.rows(samples, views)


def verdict(result: dict[str, Any]) -> int:
    """Say which rows that matter are beyond their limits; 1 where there are any."""
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
        FileNotFoundError: if it is not there.
        ValueError: if it is none of this program's.
    """
    result = read_json(file, _MEND)
    missing = {"benchmark", "environment", "left_out", "rows"} - result.keys()
    if missing or result["benchmark"] != "parity":
        raise ValueError(f"{file} is none of this program's results; make it again: {_MEND}")
    return result


def _check(file: Path, page: Path, result: dict[str, Any]) -> int:
    if BLOCK.current(page) != block(result):
        console.print(f"the tables in {page} are not those of {file}; run `{_MEND}`")
        return 1
    console.print(f"the tables in {page} are those of {file}")
    return verdict(result)


def _write(page: Path, result: dict[str, Any]) -> None:
    changed = BLOCK.rewrite(page, block(result))
    console.print(f"{page}: {'tables rewritten' if changed else 'tables are up to date'}")


def _print(result: dict[str, Any]) -> None:
    table = Table(title="Distance from torchvision and Pillow; rows in grey are not what the loader does")
    for name in ("operation", "by"):
        table.add_column(name, no_wrap=True)
    table.add_column("against")
    for name in ("mean", "largest", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in result["rows"]:
        allowed = f"{row['mean_tolerance']:g}, {row['tolerance']:g}"
        table.add_row(
            row["operation"],
            row["how"] or row["backend"],
            row["against"],
            f"{row['mean_error']:g}",
            f"{row['max_error']:g}",
            allowed,
            row["unit"],
            "ok" if row["ok"] else "[red]no[/]",
            style=None if row["used"] else "dim",
        )
    # A file is never too narrow.
    (console if console.is_terminal else Console(width=_FILE_WIDTH)).print(table)


if __name__ == "__main__":
    cli.program(Parity, main)
