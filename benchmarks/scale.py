"""What opening, shuffling and resuming cost by the number of images in a set: 1.28 million and 10 million.

    make scale

The sets are synthetic: real ``.beton`` files. Their entries share the payloads of a few hundred photographs,
with rising addresses as in a converted set, in a temporary folder that is deleted at the end. So the index
has its full size while the payloads do not, and what is measured is what grows with the index.

Each turn is a fresh Python process that measures through the loader's public methods. Sets take turns, after
one warm-up each that fills the compilers' caches. The files were just written, so the page cache is warm.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.environment import environment, write_figures
from benchmarks.memory import status_mib
from benchmarks.run_options import print_table
from benchmarks.synthetic import write_synthetic
from benchmarks.timing import sampling
from pipelines import build_loader
from pipelines.kernels.turbojpeg import library
from pipelines.loader import ViewLoader
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
_CROP_PX = 224
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
    """Where the payloads come from; `make samples` makes it."""
    payloads: int = 400
    """How many of its images are used."""
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
        ValueError: for settings that measure nothing, or where a measuring process was killed.
        FileNotFoundError: if the photographs are not there.
    """
    _check(config)
    threads = usable_cores(config.threads)
    counts = sorted(set(config.count))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        tempfile.TemporaryDirectory(prefix="scale-") as folder,
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress,
    ):
        sets = {count: Path(folder) / f"{count}.beton" for count in counts}
        source = open_beton(config.photographs)
        index_bytes = {
            count: write_synthetic(source, path, count=count, payloads=config.payloads)
            for count, path in progress.track(sets.items(), description="writing sets")
        }
        turns = _take_turns(config, sets, threads, progress)
    figures = {
        str(count): {name: _summary([turn[name] for turn in turns[count]]) for name in MEASURES}
        | {"index_mib": index_bytes[count] / 2**20}
        for count in counts
    }
    result = {
        "benchmark": "scale",
        "config": {
            "recipe": "moco_v2",
            "crop_px": _CROP_PX,
            "batch_size": config.batch_size,
            "threads": threads,
            "repeats": config.repeats,
            "payloads": config.payloads,
            "page_cache": "warm",
        },
        "environment": environment(),
        "counts": figures,
        "ratios": _ratios(figures[str(counts[0])], figures[str(counts[-1])]),
    }
    _print(result)
    if config.json:
        write_figures(config.json, result, console)
    return result


def _check(config: Scale) -> None:
    if config.repeats < 1:
        raise ValueError(f"{config.repeats} turns measure nothing; take at least 1, better 5")
    least = _LEAST_BATCHES * config.batch_size
    if not config.count or min(config.count) < least:
        raise ValueError(
            f"counts are {config.count}; give at least one, each of {least} images or more, "
            f"{_LEAST_BATCHES} batches"
        )
    if not config.photographs.is_file():
        raise FileNotFoundError(f"there are no photographs in {config.photographs}; make them: make samples")


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
    # A thread watches, since the kernel keeps no peak of private memory.
    with sampling(partial(status_mib, "RssAnon"), _PEAK_EVERY_S) as private_mib:
        start = time.perf_counter()
        loader = build_loader(
            path, moco_v2(_CROP_PX), "ffcv", batch_size=batch_size, seed=0, num_threads=threads
        )
        open_s = time.perf_counter() - start
        opened = _memory_mib()
        first_batch_s = _until_first_batch(loader)
        start = time.perf_counter()
        EpochOrder(loader.config.seed, 1, loader.set.count)[0:batch_size]
        shuffle_s = time.perf_counter() - start
        epoch_s = _until_first_batch(loader, lambda: loader.set_epoch(1))
        middle = {**loader.state_dict(), "epoch": 2, "batches_done": len(loader) // 2}
        resume_s = _until_first_batch(loader, lambda: loader.load_state_dict(middle))
        batches = iter(loader)
        for _ in range(_SETTLING_BATCHES):
            next(batches)
        settled = _memory_mib()
        del batches
    return {
        "open_s": open_s,
        "first_batch_s": first_batch_s,
        "shuffle_s": shuffle_s,
        "epoch_s": epoch_s,
        "resume_s": resume_s,
        "opened_private_memory_mib": opened["private"] - before["private"],
        "private_memory_mib": settled["private"] - before["private"],
        "peak_private_memory_mib": max(private_mib, default=0.0) - before["private"],
        "memory_mib": settled["resident"] - before["resident"],
        "peak_memory_mib": status_mib("VmHWM") - before["resident"],
    }


def _until_first_batch(loader: ViewLoader, prepare: Callable[[], None] = lambda: None) -> float:
    """Return the seconds of ``prepare`` and of the first batch after it."""
    start = time.perf_counter()
    prepare()
    batches = iter(loader)
    next(batches)
    return time.perf_counter() - start


def _memory_mib() -> dict[str, float]:
    """Return the memory of this process: all that is resident, and the private part that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"resident": kib["Rss"] / 1024, "private": kib["Anonymous"] / 1024}


def _take_turns(
    config: Scale, sets: dict[int, Path], threads: int, progress: Progress
) -> dict[int, list[dict[str, float]]]:
    """Measure all sets in turns, each in a fresh process; the first turn of each is the warm-up."""
    turns: dict[int, list[dict[str, float]]] = {count: [] for count in sets}
    task = progress.add_task("warming up", total=(config.repeats + 1) * len(sets))
    for repeat in range(config.repeats + 1):
        for count, path in sets.items():
            progress.update(task, description=f"{count:,} images")
            figures = _in_fresh_process(path, config.batch_size, threads)
            if repeat:
                turns[count].append(figures)
            progress.advance(task)
    return turns


def _in_fresh_process(path: Path, batch_size: int, threads: int) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(turn, path, batch_size, threads).result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"the process measuring {path.stem} images was killed, probably for lack of memory; give a "
                "smaller --count"
            ) from error


def _summary(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "turns": values}


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
