"""Samples per second of our loader and of its peers, on the same pictures, in one run.

    python -m benchmarks.loader data/photographs/train data/photographs.beton --json FILE

The work is the full MoCo v2 recipe at 224 px: two augmented, normalised float views of each picture. Every
loader is warmed up, then they take turns; medians and the spread over the turns are reported. All get the
same threads.
"""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.peers import torchvision_pil
from engine import cli
from engine.checkpoint import write_atomically
from pipelines import build_loader
from pipelines.cores import usable_cores
from pipelines.recipe import moco_v2

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class LoaderBenchmark:
    """Measure two-view loaders."""

    folder: tyro.conf.Positional[Path]
    """Pictures as files, for the peers."""
    compiled: tyro.conf.Positional[Path]
    """The same pictures as a .beton, for ours."""
    seconds: float = 4.0
    """Length of one turn."""
    repeats: int = 5
    """Turns of each loader."""
    batch_size: int = 64
    """Pictures per batch."""
    threads: int = 0
    """Threads, or processes, of each loader; 0 takes all cores."""
    json: Path | None = None
    """Where the figures go."""


def main(config: LoaderBenchmark) -> dict[str, Any]:
    """Measure, print a table, write the JSON; returns what was written."""
    if config.repeats < 1 or config.seconds <= 0:
        raise ValueError(
            f"{config.repeats} turns of {config.seconds} s measure nothing; take at least one of 1 s"
        )
    threads = usable_cores(config.threads)
    recipe = moco_v2(224)
    # Processes are forked before ours starts threads, which a fork would cut off.
    peer = torchvision_pil(config.folder, recipe, config.batch_size, threads)
    next(peer)
    ours = build_loader(config.compiled, recipe, batch_size=config.batch_size, num_threads=threads)
    loaders: dict[str, Iterator[Any]] = {"ours (ffcv)": _endless(ours), "torchvision + PIL": peer}
    # DataLoader keeps two batches per worker, ours keeps four.
    queued = max(2 * threads, 4)
    turn = functools.partial(
        _samples_per_s, seconds=config.seconds, batch_size=config.batch_size, queued=queued
    )
    rates = _take_turns(loaders, turn, config.repeats, queued * config.batch_size)
    result = {
        "work": "two views, MoCo v2 recipe, 224 px, normalised float32",
        "rates": {name: _summary(values) for name, values in rates.items()},
        "vs_torchvision_pil": statistics.median(rates["ours (ffcv)"])
        / statistics.median(rates["torchvision + PIL"]),
        "threads": threads,
        "batch_size": config.batch_size,
        "pictures": ours.engine.count,
        "environment": environment(),
    }
    _print(result)
    if config.json:
        content = (json.dumps(result, indent=2) + "\n").encode()
        write_atomically(config.json, lambda file: file.write(content))
        console.print(f"written to {config.json}")
    return result


def _endless(loader: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def _samples_per_s(batches: Iterator[Any], *, seconds: float, batch_size: int, queued: int) -> float:
    # Between turns a loader has filled its queue; those batches were made on the others' time.
    for _ in range(queued):
        next(batches)
    start, num = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        num += batch_size
    return num / elapsed


def _take_turns(
    loaders: dict[str, Iterator[Any]],
    turn: Callable[[Iterator[Any]], float],
    repeats: int,
    queue_samples: int,
) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("warming up", total=(repeats + 1) * len(loaders))
        for repeat in range(repeats + 1):
            for name, batches in loaders.items():
                progress.update(task, description=name)
                rate = turn(batches)
                # Having stopped asking, let it fill its queue on its own time and not on the next one's.
                time.sleep(min(10.0, 1.5 * queue_samples / rate))
                if repeat:  # the first turn of each is the warm-up
                    rates[name].append(rate)
                progress.advance(task)
    return rates


def _summary(values: list[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "turns": [round(value, 1) for value in values],
    }


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['work']}; {result['threads']} threads")
    for heading in ("loader", "samples/s", "lowest … highest"):
        table.add_column(heading, justify="left" if heading == "loader" else "right")
    for name, rate in result["rates"].items():
        table.add_row(name, f"{rate['median']:.0f}", f"{rate['low']:.0f} … {rate['high']:.0f}")
    console.print(table)
    console.print(f"ours over torchvision + PIL: {result['vs_torchvision_pil']:.2f} ×")


if __name__ == "__main__":
    torch.multiprocessing.set_sharing_strategy("file_system")
    cli.run(functools.partial(lambda argv: main(tyro.cli(LoaderBenchmark, args=argv)), sys.argv[1:]))
