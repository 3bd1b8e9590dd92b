"""What the measuring programs share: options, progress bars, and the result file."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from rich.progress import Progress
from rich.table import Column, Table

from benchmarks.environment import environment, write_figures
from benchmarks.marked_block import MarkedBlock
from benchmarks.sample_sets import PHOTOGRAPHS
from training.cli import console

CROP_PX = 224
"""Side of the views."""
TABLES_PAGE = Path("docs/evaluation.md")
_Amounts = TypeVar("_Amounts", bound=Any)


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    pictures: int
    batch_size: int
    turns: int
    seconds: float

    def config(self, threads: int) -> dict[str, float]:
        """The JSON's ``config``."""
        amounts = dataclasses.asdict(self)
        del amounts["pictures"]
        return {"threads": threads, "crop_px": CROP_PX, **amounts}


@dataclass(frozen=True)
class RunOptions:
    """How much is measured, on what, and where the figures go."""

    quick: bool = False
    """Fewer images, smaller batches, fewer and shorter turns; for a look, not for figures."""
    threads: int = 0
    """Threads, or processes, of each loader; 0 takes all cores."""
    json: Path | None = None
    """Where the figures go."""
    data: Path = Path("data")
    """Folder of the sample sets; what is missing is made there."""
    pictures: int | None = None
    """Photographs in each set: 2,000, or 128 with --quick."""
    batch_size: int | None = None
    """Images per batch: 64, or 16 with --quick."""
    turns: int | None = None
    """Turns of each after its warm-up: 5, or 2 with --quick."""
    seconds: float | None = None
    """Shortest length of a turn: 4, or 0.5 with --quick."""

    def scale(self) -> Scale:
        """How much is measured; raises ValueError for batches larger than the set."""
        scale = given_or(self, Scale(128, 16, 2, 0.5) if self.quick else Scale(PHOTOGRAPHS, 64, 5, 4.0))
        if not 1 <= scale.batch_size <= scale.pictures:
            raise ValueError(
                f"a batch of {scale.batch_size} pictures does not fit a set of {scale.pictures}; "
                f"choose --batch-size in 1 … {scale.pictures}"
            )
        return scale

    def keep_full_figures(self) -> None:
        """See `keep_full_figures`."""
        keep_full_figures(self.quick, self.json)


def given_or(options: object, usual: _Amounts) -> _Amounts:
    """The dataclass ``usual``, with those of its fields that are not None in ``options``."""
    given = {name: getattr(options, name) for name in vars(usual)}
    return dataclasses.replace(usual, **{name: value for name, value in given.items() if value is not None})


def keep_full_figures(quick: bool, file: Path | None) -> None:
    """Raise ValueError if the figures of a quick run would replace those of a full one."""
    if quick and file and file.is_file() and not json.loads(file.read_text()).get("quick"):
        raise ValueError(f"{file} holds a full run's figures; give a quick run another --json")


def finish_benchmark(name: str, quick: bool, file: Path | None, **figures: Any) -> dict[str, Any]:
    """The result of a benchmark, with its environment; also written to ``file``, if that is not None."""
    result = {"benchmark": name, "quick": quick, **figures, "environment": environment()}
    if file:
        write_figures(file, result, console)
    return result


def table_block(result: Mapping[str, Any]) -> str:
    """A benchmark's table in Markdown, by the template of its name in this folder."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(
        loader=folder, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return f"\n{templates.get_template(result['benchmark'] + '.md').render(result)}\n"


def finish_with_table(name: str, quick: bool, file: Path | None, **figures: Any) -> dict[str, Any]:
    """`finish_benchmark`; prints the table, which a full run with a file also writes into `TABLES_PAGE`."""
    result = finish_benchmark(name, quick, file, **figures)
    console.print(table_block(result))
    if file and not quick:
        block_of(name).rewrite(TABLES_PAGE, table_block(result))
    return result


def block_of(name: str) -> MarkedBlock:
    """Where a benchmark's table is in `TABLES_PAGE`."""
    return MarkedBlock(f"<!-- {name}: begin -->", f"<!-- {name}: end -->")


def mean_and_std(values: list[float], digits: int) -> dict[str, float]:
    """Mean and standard deviation, which is 0 for a single value; rounded."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), digits), "std": round(std, digits)}


def print_table(title: str, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Print rows by name; the columns are the keys of the rows, which are the same for all."""
    table = Table(Column(no_wrap=True), title=title)
    for column in next(iter(rows.values())):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *row.values())
    console.print(table)


def median_and_range(row: Mapping[str, Any], digits: int) -> str:
    """A cell of a table with two lines: the median, and the lowest … highest."""
    median, low, high = (f"{row[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{median}\n[dim]{low} … {high}[/]"


class Bars:
    """Two progress bars: the parts of the run, and the steps of the current part."""

    def __init__(self, display: Progress, num_parts: int) -> None:
        self._display = display
        self._parts = display.add_task("", total=num_parts, completed=-1)
        self._steps = display.add_task("", total=None)

    def next_part(self, name: str) -> None:
        """Start a part."""
        self._display.update(self._parts, advance=1, description=name)

    def note(self, what: str) -> None:
        """Show what is being done outside of the steps."""
        self._display.update(self._steps, description=what)

    def steps(self, total: int) -> Callable[[str], None]:
        """Start counting ``total`` steps; call the result with a name before each of them."""
        self._display.reset(self._steps, total=total, completed=-1)
        return lambda name: self._display.update(self._steps, advance=1, description=name)
