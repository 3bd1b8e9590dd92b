"""The first half hour on a GPU, in one command: tests, ceilings, loaders, training steps, real runs, DALI.

    python -m benchmarks.half_hour                                     everything, as far as half an hour goes
    python -m benchmarks.half_hour step train --minutes 15             two parts
    python -m benchmarks.half_hour --device cpu --tiny                 a rehearsal without a GPU, two minutes

Every row is measured in a process of its own and written to the JSON file at once. A second run measures
only what is missing, which includes rows that ran out of time or failed; ``--again`` measures the given parts
anew. Rows that need a package that is not installed are left out and say so.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.markup import escape

from benchmarks.environment import environment
from benchmarks.half_hour.figures import COMMAND, missing_rows, row_in_words
from benchmarks.half_hour.plan import PARTS, PartName, Setup, prepare_images
from benchmarks.half_hour.rows import rows_of
from benchmarks.half_hour.worker import Row, measure_row
from benchmarks.programs import differences
from benchmarks.report.files import read_json
from training import cli
from training.cli import console
from training.files import write_json

_RESULTS = Path("benchmarks/results/half_hour.json")
_Rows = Mapping[PartName, Mapping[str, Row]]


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


def main(options: HalfHour) -> dict[str, Any]:
    """Measure and print; returns the content of the JSON file.

    Raises:
        ValueError: without a GPU, or where the JSON file holds figures of another setup.
    """
    end, parts = time.monotonic() + 60 * options.minutes, tuple(dict.fromkeys(options.parts))
    _check(options)
    json = options.json or (options.out / "tiny.json" if options.tiny else _RESULTS)
    setup = prepare_images(options.device, tiny=options.tiny, data=options.data, out=options.out)
    rows = rows_of(setup)
    is_long = setup.reads == setup.long_set
    reads = "a compiled file that repeats them" if is_long else "a folder of JPEG files, by Pillow"
    content = {
        "benchmark": "half_hour",
        "quick": options.tiny,
        "config": {"device": setup.device, "tiny": setup.tiny, **asdict(setup.size)},
        "environment": environment(),
        "images": {"how": setup.images.how, "read_from": reads},
        "expected": {part: list(rows[part]) for part in rows},
    }
    content["parts"] = _found_before(json, content, again=parts if options.again else ())
    write_json(json, content)
    _measure_parts(setup, {part: rows[part] for part in parts}, json, content, end)
    missing = missing_rows(content)
    for part in parts:
        if missing[part]:
            console.print(f"{part}: {len(missing[part])} not measured: {'; '.join(missing[part])}")
    console.print(f"figures: {json}; the same command measures what is missing")
    console.print("next: make report")
    return content


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


def _found_before(path: Path, content: Mapping[str, Any], again: Sequence[str]) -> dict[str, Any]:
    """Return part → row → figures of the file, in the expected order, without the parts of ``again``.

    Raises:
        ValueError: if the file holds figures of another machine, other sizes, images or versions.
    """
    before = read_json(path, COMMAND) if path.is_file() else {**content, "parts": {}}
    if differing := differences(_setting(before), _setting(content)):
        raise ValueError(
            f"{path} holds figures of another setup ({differing}); give another --json or remove the file"
        )
    found = {part: {} if part in again else before["parts"].get(part, {}) for part in content["expected"]}
    return {
        part: {name: found[part][name] for name in names if name in found[part]}
        for part, names in content["expected"].items()
    }


def _setting(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must agree between two runs, flat, so that a message can name what differs."""
    machine = content.get("environment", {})
    facts = {"benchmark": content.get("benchmark"), **{key: machine.get(key) for key in ("gpu", "processor")}}
    return {**facts, **machine.get("versions", {}), **content.get("config", {}), **content.get("images", {})}


def _measure_parts(setup: Setup, rows: _Rows, json: Path, content: dict[str, Any], end: float) -> None:
    """Print the rows of each part; what is missing is measured first, and written to the file at once."""
    missing = missing_rows(content)
    costs = {part: sum(rows[part][name].cost_s for name in missing[part]) for part in rows}
    for part in rows:
        # Time that earlier parts leave is shared by the later ones, in proportion to their costs.
        left, cost = end - time.monotonic(), costs.pop(part)
        until = time.monotonic() + left * cost / (cost + sum(costs.values()) or 1.0)
        found = content["parts"][part]
        for name, row in rows[part].items():
            left = until - time.monotonic()
            if name in missing[part] and row.needs_gpu and setup.device == "cpu":
                found[name] = {"reason": "needs a GPU"}
            elif name in missing[part] and row.cost_s <= left:
                with console.status(f"{part}: {name}"):
                    found[name] = measure_row(row, setup, setup.out / f"{part}.log", min(row.limit_s, left))
            write_json(json, content)
            if name in found:
                console.print(f"[dim]{part}[/]  {name}: {escape(row_in_words(found[name]))}")


if __name__ == "__main__":
    cli.program(HalfHour, main)
