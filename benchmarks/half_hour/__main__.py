"""The first half hour on a GPU, in one command: tests, ceilings, loaders, training steps, real runs, DALI.

    python -m benchmarks.half_hour                                     everything, as far as half an hour goes
    python -m benchmarks.half_hour step train --minutes 15             two parts
    python -m benchmarks.half_hour --device cpu --tiny                 a rehearsal without a GPU, two minutes

Every row is written to the JSON file as soon as it is measured. A second run measures only what is missing,
which includes rows that ran out of time or failed; ``--again`` measures the given parts anew. Rows that need
a package that is not installed are left out and say so.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.half_hour import plan
from benchmarks.half_hour.figures import BENCHMARK, FiguresFile, facts_in_words, rate_in_words
from benchmarks.half_hour.images import facts, find_images
from benchmarks.half_hour.plan import FULL, PARTS, TINY, PartName, Row, Setup, rows_of
from benchmarks.half_hour.worker import Worker
from training import cli
from training.cli import console

_RESULTS = Path("benchmarks/results/half_hour.json")


@dataclass(frozen=True)
class HalfHour:
    """Measure on a GPU, within a given time, everything this project claims about GPUs."""

    parts: Annotated[tuple[PartName, ...], tyro.conf.Positional] = PARTS
    """Parts to measure, in this order."""
    json: Path | None = None
    """File of the figures; what is in it already is kept. By default benchmarks/results/half_hour.json, with
    --tiny tiny.json in --out."""
    minutes: float = 30.0
    """Time for all parts together; a row starts only where its estimated cost is left."""
    data: Path = Path("data")
    """Folder of the sample sets; photographs in it are used, and made if their packages are installed."""
    out: Path = Path("runs/half_hour")
    """Folder for logs and intermediate files."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu, together with --tiny, rehearses the command without a GPU."""
    tiny: bool = False
    """A small encoder, images of 32 px, short turns: to try the command, not for figures."""
    again: bool = False
    """Measure the rows of the given parts anew."""


def main(options: HalfHour) -> FiguresFile:
    """Measure, print a summary; returns the file of figures.

    Raises:
        ValueError: without a GPU, or where the JSON file holds figures of another setup.
    """
    end, parts = time.monotonic() + 60 * options.minutes, tuple(dict.fromkeys(options.parts))
    _check(options)
    images = find_images(
        options.data, options.out, TINY if options.tiny else FULL, tiny=options.tiny, note=console.print
    )
    setup = Setup(options.device, options.tiny, str(options.out), images)
    head = {
        "benchmark": BENCHMARK,
        "quick": options.tiny,
        "config": {"device": setup.device, "tiny": setup.tiny, **asdict(setup.size)},
        "environment": environment(),
        "images": facts(images),
    }
    rows = {part: rows_of(source, setup) for part, source in plan.SOURCES.items()}
    json = options.json or (options.out / "tiny.json" if options.tiny else _RESULTS)
    figures = FiguresFile(json, head)
    for part in rows:
        figures.expect(part, list(rows[part]), again=options.again and part in parts)
    _measure_parts(setup, {part: rows[part] for part in parts}, figures, end)
    _summarise(parts, figures)
    console.print(f"figures: {json}; the same command measures what is missing")
    console.print("next: make report")
    return figures


def _check(options: HalfHour) -> None:
    if options.device == "cpu" and not options.tiny:
        raise ValueError("--device cpu takes hours at full size; add --tiny, which rehearses the command")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"torch {torch.__version__} sees no GPU; run this on a machine with an NVIDIA GPU and a torch "
            "built for CUDA, or rehearse it here with --device cpu --tiny"
        )
    if not options.minutes > 0:
        raise ValueError(f"--minutes is {options.minutes}; it must be above 0")


def _measure_parts(
    setup: Setup, rows: Mapping[PartName, Mapping[str, Row]], figures: FiguresFile, end: float
) -> None:
    """Measure what is missing of each part, in a process of its own; write it down row by row."""
    costs = {part: sum(rows[part][name].cost_s for name in figures.missing(part)) for part in rows}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task("", total=sum(len(figures.missing(part)) for part in rows))
        for part in rows:
            # Time that earlier parts leave is shared by the later ones, in proportion to their costs.
            left, cost = end - time.monotonic(), costs.pop(part)
            until = time.monotonic() + left * cost / (cost + sum(costs.values()) or 1.0)
            worker = Worker(plan.SOURCES[part], setup, Path(setup.out) / f"{part}.log")
            try:
                for name in figures.missing(part):
                    display.update(task, description=f"{part}: {name}")
                    found = _measure(worker, name, rows[part][name], setup, until)
                    display.advance(task)
                    if found:
                        figures.record(part, name, found)
                        console.print(f"[dim]{part}[/]  {name}: {escape(_in_words(found))}")
            finally:
                worker.close()


def _measure(worker: Worker, name: str, row: Row, setup: Setup, until: float) -> dict[str, Any] | None:
    """Return a row's figures or why there are none; None where it does not fit into the time left."""
    if row.needs_gpu and setup.device != "cuda":
        return {"reason": "needs a GPU"}
    left = until - time.monotonic()
    if row.cost_s > left:
        return None
    if row.alone:
        worker.close()
    return worker.measure(name, min(row.limit_s, left))


def _in_words(row: Mapping[str, Any]) -> str:
    if "reason" in row:
        return str(row["reason"])
    facts = [f"{heading} {text}" for heading, text in facts_in_words(row).items()]
    return "; ".join(filter(None, [rate_in_words(row), *facts]))


def _summarise(parts: Sequence[PartName], figures: FiguresFile) -> None:
    """Print a table of the rows, and the names of those that are missing."""
    table = Table("part", "row", "found")
    for part in parts:
        for name, row in figures.rows(part).items():
            table.add_row(part, name, escape(_in_words(row)))
        table.add_section()
    console.print(table)
    for part in parts:
        if missing := figures.missing(part):
            console.print(f"{part}: {len(missing)} not measured: {'; '.join(missing)}")


if __name__ == "__main__":
    cli.program(HalfHour, main)
