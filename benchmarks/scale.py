"""What opening, shuffling and resuming cost by the number of images in a set: 1.28 million and 10 million.

    make scale

The sets are synthetic: real ``.beton`` files. Their entries share the payloads of a few hundred photographs,
with rising addresses as in a converted set, in a temporary folder that is deleted at the end. So the index
has its full size while the payloads do not, and what is measured is what grows with the index.

Each turn is a fresh Python process that measures through the loader's public methods. Sets take turns, after
one warm-up each that fills the compilers' caches. The files were just written, so the page cache is warm.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks.memory import status_mib
from benchmarks.programs import output_of
from benchmarks.run_options import CROP_PX, finish_benchmark, print_table
from benchmarks.synthetic import write_synthetic
from benchmarks.timing import sampling, summary
from pipelines import build_loader
from pipelines.kernels.turbojpeg import library
from pipelines.randomness import EpochOrder
from pipelines.recipe import moco_v2
from pipelines.sets.beton import open_beton
from pipelines.workers import usable_cores
from training import cli
from training.cli import console

MEASURES = {
    "open_s": ("open", "s"),
    "first_batch_s": ("first batch", "s"),
    "shuffle_s": ("shuffle", "s"),
    "epoch_s": ("next epoch", "s"),
    "resume_s": ("resume in mid-epoch", "s"),
    "opened_private_memory_mib": ("private memory once open", "MiB"),
    "private_memory_mib": ("private memory settled", "MiB"),
    "peak_private_memory_mib": ("private memory peak", "MiB"),
    "memory_mib": ("resident memory settled", "MiB"),
    "peak_memory_mib": ("resident memory peak", "MiB"),
}
"""What a turn measures, its title and unit, in the order of the table; :func:`turn` defines each."""
_PAYLOADS = 400
_SETTLING_BATCHES = 4
_LEAST_BATCHES = 2 * (1 + _SETTLING_BATCHES)
"""So that half an epoch has a batch to resume with, and some to settle."""
_PEAK_EVERY_S = 0.005


@dataclass(frozen=True)
class Scale:
    """Measure what a set's size costs."""

    count: tuple[int, ...] = (1_281_167, 10_000_000)
    """Images in each synthetic set."""
    photographs: Path = Path("data/photographs.beton")
    """Where the payloads come from, its first 400 images; `make samples` makes it."""
    repeats: int = 5
    """Turns of each set, after the warm-up."""
    batch_size: int = 64
    """Images per batch."""
    threads: int = 0
    """Threads of the loader; 0 takes all cores."""
    json: Path | None = None
    """File of the figures."""


def main(config: Scale) -> dict[str, Any]:
    """Measure, print a table, write the JSON; returns what was written.

    Raises:
        ValueError: for settings that measure nothing, or where a measuring process failed.
    """
    least = _LEAST_BATCHES * config.batch_size
    if config.repeats < 1 or min(config.count, default=0) < least:
        raise ValueError(
            f"{config.repeats} turns of sets of {config.count} images measure nothing; give at least 1 turn, "
            f"and at least one set, each of {least} images or more, {_LEAST_BATCHES} batches"
        )
    threads, counts = usable_cores(config.threads), sorted(set(config.count))
    source = open_beton(config.photographs)
    payloads = min(_PAYLOADS, len(source))
    turns: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    index_bytes: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        sets = {count: Path(folder) / f"{count}.beton" for count in counts}
        for count, path in sets.items():
            index_bytes[count] = write_synthetic(source, path, count=count, payloads=payloads)
        # The first turn of each set is the warm-up.
        order = [count for _ in range(config.repeats + 1) for count in counts]
        for count in track(order, "turns", console=console, disable=not console.is_terminal, transient=True):
            turns[count].append(_in_fresh_process(sets[count], config.batch_size, threads))
    figures = {
        str(count): {name: summary([made[name] for made in turns[count][1:]], 9) for name in MEASURES}
        | {"index_mib": index_bytes[count] / 2**20}
        for count in counts
    }
    settings = {
        "recipe": "moco_v2",
        "crop_px": CROP_PX,
        "batch_size": config.batch_size,
        "threads": threads,
        "repeats": config.repeats,
        "payloads": payloads,
        "page_cache": "warm",
    }
    ratios = _ratios(figures[str(counts[0])], figures[str(counts[-1])])
    result = finish_benchmark("scale", False, config.json, config=settings, counts=figures, ratios=ratios)
    _print(result)
    return result


def turn(path: Path, batch_size: int, threads: int) -> dict[str, float]:
    """Open a set, take first batches, shuffle and resume, in this process.

    Returns, times in seconds and memory in MiB over that of the same process before it opened the set:

    - open: ``build_loader`` until it returns; first batch: from there until it is handed out;
    - shuffle: the order of another epoch and its first batch's part; next epoch: ``set_epoch`` until the
      first batch; resume: ``load_state_dict`` with a cursor in mid-epoch until the first batch;
    - private memory, which no file backs, once the set is open, a few batches later with the loader at work
      (settled), and at its peak; resident memory, with the mapped pages of the file, likewise.
    """
    library()
    # Sets the kernel's high-water mark of resident memory back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory_mib()
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    def first_batch(prepare: Callable[[], None] = lambda: None) -> Iterator[object]:
        """Return the iterator, so that it is closed after the clock has stopped."""
        prepare()
        batches: Iterator[object] = iter(loader)
        next(batches)
        return batches

    # A thread watches, since the kernel keeps no peak of private memory.
    with sampling(partial(status_mib, "RssAnon"), _PEAK_EVERY_S) as private_mib:
        options: dict[str, Any] = {"batch_size": batch_size, "seed": 0, "num_threads": threads}
        loader = timed("open_s", lambda: build_loader(path, moco_v2(CROP_PX), "ffcv", **options))
        opened = _memory_mib()
        timed("first_batch_s", first_batch)
        timed("shuffle_s", lambda: EpochOrder(loader.config.seed, 1, loader.set.count)[0:batch_size])
        timed("epoch_s", lambda: first_batch(lambda: loader.set_epoch(1)))
        middle = {**loader.state_dict(), "epoch": 2, "batches_done": len(loader) // 2}
        batches = timed("resume_s", lambda: first_batch(lambda: loader.load_state_dict(middle)))
        for _ in range(_SETTLING_BATCHES):
            next(batches)
        settled = _memory_mib()
        del batches
    return seconds | {
        "opened_private_memory_mib": opened["private"] - before["private"],
        "private_memory_mib": settled["private"] - before["private"],
        "peak_private_memory_mib": max(private_mib, default=0.0) - before["private"],
        "memory_mib": settled["resident"] - before["resident"],
        "peak_memory_mib": status_mib("VmHWM") - before["resident"],
    }


def _memory_mib() -> dict[str, float]:
    """Return the memory of this process: all that is resident, and the private part that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"resident": kib["Rss"] / 1024, "private": kib["Anonymous"] / 1024}


def _in_fresh_process(path: Path, batch_size: int, threads: int) -> dict[str, float]:
    program = "from benchmarks.scale import print_turn; print_turn()"
    figures: dict[str, float] = json.loads(output_of("-c", program, path, batch_size, threads))
    return figures


def print_turn() -> None:
    """Run :func:`turn` as a program: with its arguments on the command line, its figures printed as JSON."""
    path, batch_size, threads = sys.argv[1:]
    sys.stdout.write(json.dumps(turn(Path(path), int(batch_size), int(threads))))


def _ratios(small: dict[str, Any], large: dict[str, Any]) -> dict[str, float | None]:
    """Divide the largest set's medians by the smallest's; None where the latter are not positive."""
    medians = {name: (small[name]["median"], large[name]["median"]) for name in MEASURES}
    medians["index_mib"] = small["index_mib"], large["index_mib"]
    return {name: large / small if small > 0 else None for name, (small, large) in medians.items()}


def _print(result: dict[str, Any]) -> None:
    rows = {}
    for name, (title, unit) in (MEASURES | {"index_mib": ("index in the file", "MiB")}).items():
        cells = {f"{int(count):,}": _cell(figures[name]) for count, figures in result["counts"].items()}
        ratio = result["ratios"][name]
        rows[f"{title}, {unit}"] = cells | {"ratio": "–" if ratio is None else f"{ratio:.2f} ×"}
    turns = result["config"]["repeats"]
    print_table(f"What a set's size costs; medians, lowest … highest of {turns} turns", rows)


def _cell(figure: Any) -> str:
    if isinstance(figure, float):
        return f"{figure:,.0f}"
    return f"{figure['median']:.3g}\n[dim]{figure['low']:.3g} … {figure['high']:.3g}[/]"


if __name__ == "__main__":
    cli.program(Scale, main)
