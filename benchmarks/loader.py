"""Our loader and its peers: the same images, the same threads, one run.

    python -m benchmarks.loader --quick           a look, in about two minutes
    python -m benchmarks.loader --json FILE       the figures, in about twenty minutes on two cores

Two kinds of work: *crops*, two antialiased uint8 crops of each image; *recipe*, two views after the whole
MoCo v2 augmentation, normalised float32. They are measured on two sets of JPEG files, and on sets that hold
no JPEG. All loaders are opened and warmed up, then measured round-robin; medians and the spread over the
turns are reported. Further parts: scaling with threads, converters, the photometric stage, and the time of
each of our stages.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rich.progress import Progress

from benchmarks import loader_parts as parts
from benchmarks.peers import ALL_PEERS, PeerName, load_peers
from benchmarks.peers.ours import PEER
from benchmarks.ratios import GROUPS, ratios
from benchmarks.run_options import CROP_PX, Bars, RunOptions, finish_benchmark, print_table
from benchmarks.sample_sets import SampleSets
from benchmarks.timing import Turns
from pipelines.recipe import moco_v2
from pipelines.workers import usable_cores
from training import cli
from training.cli import console

_PRELOADED = ["benchmarks.loader_parts", "benchmarks.peers.with_torchvision"]
_JPEG_SETS = ("reencoded", "pass_through")
_UNITS = {"convert": "pictures/s", "photometric": "views/s"}

_JPEGPart = Literal["reencoded-crops", "reencoded-recipe", "pass-through-crops", "pass-through-recipe"]
LoaderPart = Literal[_JPEGPart, "raw", "scaling", "convert", "photometric", "stages"]
# The place of a part's figures in the JSON, and the function that measures them.
_PARTS: dict[LoaderPart, tuple[str, Callable[[parts.LoaderPlan], Any]]] = {
    "reencoded-crops": ("tables.reencoded.crops", lambda p: parts.loaders("crops", p.sets.reencoded, p)),
    "reencoded-recipe": ("tables.reencoded.recipe", lambda p: parts.loaders("recipe", p.sets.reencoded, p)),
    "pass-through-crops": (
        "tables.pass_through.crops",
        lambda p: parts.loaders("crops", p.sets.pass_through, p),
    ),
    "pass-through-recipe": (
        "tables.pass_through.recipe",
        lambda p: parts.loaders("recipe", p.sets.pass_through, p),
    ),
    "raw": ("tables.raw", parts.raw),
    "scaling": ("tables.scaling", parts.scaling),
    "convert": ("tables.convert", parts.converters),
    "photometric": ("tables.photometric", parts.photometric),
    "stages": ("stages", parts.our_stages),
}


@dataclass(frozen=True)
class LoaderBenchmark(RunOptions):
    """Measure two-view loaders."""

    peers: tuple[PeerName, ...] = ALL_PEERS
    """Loaders to measure with ours; ratios that need another one are left out."""
    parts: tuple[LoaderPart, ...] = get_args(LoaderPart)
    """What to measure."""


def main(config: LoaderBenchmark) -> dict[str, Any]:
    """Measure, print tables, write the JSON; returns what was written."""
    config.keep_full_figures()
    scale, threads = config.scale(), usable_cores(config.threads)
    turns = Turns(scale.turns, scale.seconds)
    peers = (PEER, *load_peers(config.peers))
    # The server that forks the DataLoaders' workers imports once what all of them need.
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as display:
        bars = Bars(display, len(config.parts))
        sets = SampleSets(config.data, scale.pictures, bars.note)
        plan = parts.LoaderPlan(sets, peers, moco_v2(CROP_PX), scale.batch_size, threads, turns, bars.steps)
        found = _measure(config.parts, plan, bars)
    figures = {
        "config": scale.config(threads),
        "sets": sets.facts(),
        "left_out": parts.left_out(plan),
        **found,
        **ratios(found["tables"]),
    }
    _print(figures)
    return finish_benchmark("loader", config.quick, config.json, **figures)


def _measure(names: tuple[LoaderPart, ...], plan: parts.LoaderPlan, bars: Bars) -> dict[str, Any]:
    """Measure the given parts; returns their figures, nested as in the JSON."""
    found: dict[str, Any] = {"tables": {}, "stages": {}}
    for name in (name for name in get_args(LoaderPart) if name in names):
        bars.next_part(name)
        path, measure = _PARTS[name]
        *outer, last = path.split(".")
        place = found
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = measure(plan)
    return found


def _print(figures: dict[str, Any]) -> None:
    threads = figures["config"]["threads"]
    for name, table in figures["tables"].items():
        for work, rows in table.items() if name in _JPEG_SETS else (("", table),):
            unit = _UNITS.get(name, "samples/s")
            cells = {name: _cells(row, unit) for name, row in rows.items()}
            print_table(f"{name} {work}".strip() + f"; {threads} threads", cells)
    if stages := figures["stages"]:
        rows = {name: {"µs": f"{micros:.0f}"} for name, micros in stages.items()}
        print_table("time of each stage per sample, one thread", rows)
    for group in GROUPS:
        for ratio, value in figures.get(group, {}).items():
            console.print(f"{group}.{ratio}: {value:.2f}")
    measured = {work for name in _JPEG_SETS for work in figures["tables"].get(name, {})}
    for work in sorted(measured):
        for name, reason in figures["left_out"][work].items():
            console.print(f"[dim]{work} without {name}: {reason}[/]")


def _cells(row: dict[str, Any], unit: str) -> dict[str, str]:
    cells = {unit: f"{row['median']:.0f}", "lowest … highest": f"{row['low']:.0f} … {row['high']:.0f}"}
    for key in ("mean_error", "max_error"):
        if key in row:
            cells[key.replace("_", " ")] = "–" if row[key] is None else f"{row[key]:.2f}"
    return cells


if __name__ == "__main__":
    cli.program(LoaderBenchmark, main)
