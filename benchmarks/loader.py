"""Our loader beside its peers: the same pictures, the same threads, one run.

    python -m benchmarks.loader --quick           a look, in about two minutes
    python -m benchmarks.loader --json FILE       the figures, in about twenty minutes on two cores

Two works: *crops*, two antialiased uint8 crops of each picture; *recipe*, two views after the whole MoCo v2
augmentation, normalised float32. On two sets of JPEG files, and on sets that hold no JPEG. Everybody is
opened and warmed up, then they take turns; medians and the spread over the turns are reported. Beside them:
how the rate grows with threads, converters, the photometric stage, and where a sample's time goes.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rich.progress import Progress

from benchmarks import loader_parts as parts
from benchmarks.environment import environment, write_figures
from benchmarks.loader_tables import print_tables
from benchmarks.peers import ALL_PEERS, PeerName, load_peers
from benchmarks.peers.ours import PEER
from benchmarks.ratios import ratios
from benchmarks.run_options import CROP_PX, Bars, RunOptions
from benchmarks.sample_sets import SampleSets
from benchmarks.timing import Turns
from pipelines.recipe import moco_v2
from pipelines.workers import usable_cores
from training import cli
from training.cli import console

_PRELOADED = ["benchmarks.loader_parts", "benchmarks.peers.with_torchvision"]

Part = Literal[
    "reencoded-crops",
    "reencoded-recipe",
    "pass-through-crops",
    "pass-through-recipe",
    "raw",
    "scaling",
    "convert",
    "photometric",
    "stages",
]
# Where in the JSON a part's figures stand, and what measures them.
_PARTS: dict[Part, tuple[tuple[str, ...], Callable[[parts.Plan], Any]]] = {
    "reencoded-crops": (("tables", "reencoded", "crops"), lambda p: parts.crops(p.sets.reencoded, p)),
    "reencoded-recipe": (("tables", "reencoded", "recipe"), lambda p: parts.recipe(p.sets.reencoded, p)),
    "pass-through-crops": (
        ("tables", "pass_through", "crops"),
        lambda p: parts.crops(p.sets.pass_through, p),
    ),
    "pass-through-recipe": (
        ("tables", "pass_through", "recipe"),
        lambda p: parts.recipe(p.sets.pass_through, p),
    ),
    "raw": (("tables", "raw"), parts.raw),
    "scaling": (("tables", "scaling"), parts.scaling),
    "convert": (("tables", "convert"), parts.convert),
    "photometric": (("tables", "photometric"), parts.photometric),
    "stages": (("stages",), parts.where_time_goes),
}


@dataclass(frozen=True)
class LoaderBenchmark(RunOptions):
    """Measure two-view loaders."""

    peers: tuple[PeerName, ...] = ALL_PEERS
    """Whom to measure beside ours; ratios that need another one are left out."""
    parts: tuple[Part, ...] = get_args(Part)
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
        plan = parts.Plan(sets, peers, moco_v2(CROP_PX), scale.batch_size, threads, turns, bars.steps)
        found = _measure(config.parts, plan, bars)
    result = {
        "benchmark": "loader",
        "quick": config.quick,
        "config": scale.config(threads),
        "environment": environment(),
        "sets": sets.facts(),
        "left_out": parts.left_out(plan),
        **found,
        **ratios(found["tables"]),
    }
    print_tables(console, result)
    if config.json:
        write_figures(config.json, result, console)
    return result


def _measure(wanted: tuple[Part, ...], plan: parts.Plan, bars: Bars) -> dict[str, Any]:
    """The figures of the parts asked for, nested as in the JSON."""
    found: dict[str, Any] = {"tables": {}, "stages": {}}
    for name in (name for name in get_args(Part) if name in wanted):
        bars.next_part(name)
        path, measure = _PARTS[name]
        place = found
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = measure(plan)
    return found


if __name__ == "__main__":
    cli.program(LoaderBenchmark, main)
