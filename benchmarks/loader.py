"""Our loader beside its peers: the same pictures, the same threads, one run.

    python -m benchmarks.loader --quick           a look, in about two minutes
    python -m benchmarks.loader --json FILE       the figures, in about twenty minutes on two cores

Two works: *crops*, two antialiased uint8 crops of each picture; *recipe*, two views after the whole MoCo v2
augmentation, normalised float32. On two sets of JPEG files, and on sets that hold no JPEG. Everybody is
opened and warmed up, then they take turns; medians and the spread over the turns are reported. Beside them:
how the rate grows with threads, converters, the photometric stage, and where a sample's time goes.
"""

import functools
import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import tyro
from rich.console import Console
from rich.progress import Progress

from benchmarks import loader_parts as parts
from benchmarks.environment import environment, write_figures
from benchmarks.loader_tables import print_tables
from benchmarks.peers import ALL_PEERS, PeerName, load_peers
from benchmarks.peers.ours import PEER
from benchmarks.ratios import ratios
from benchmarks.sample_sets import PHOTOGRAPHS, SampleSets
from benchmarks.timing import Turns
from engine import cli
from pipelines.cores import usable_cores
from pipelines.recipe import moco_v2

console = Console(highlight=False, soft_wrap=True)
_CROP_PX = 224
_PRELOADED = ["benchmarks.loader_parts", "benchmarks.peers.with_torchvision"]


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    pictures: int
    batch_size: int
    turns: int
    seconds: float


FULL = Scale(pictures=PHOTOGRAPHS, batch_size=64, turns=5, seconds=4.0)
QUICK = Scale(pictures=128, batch_size=16, turns=2, seconds=0.5)

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
class LoaderBenchmark:
    """Measure two-view loaders."""

    quick: bool = False
    """Fewer pictures, smaller batches, fewer and shorter turns; for a look, not for figures."""
    threads: int = 0
    """Threads, or processes, of each loader; 0 takes all cores."""
    json: Path | None = None
    """Where the figures go."""
    data: Path = Path("data")
    """Folder of the sample sets; what is missing is made there."""
    pictures: int | None = None
    """Photographs in each set: 2,000, or 128 with --quick."""
    batch_size: int | None = None
    """Pictures per batch: 64, or 16 with --quick."""
    turns: int | None = None
    """Turns of each after its warm-up: 5, or 2 with --quick."""
    seconds: float | None = None
    """Least length of a turn: 4, or 0.5 with --quick."""
    peers: tuple[PeerName, ...] = ALL_PEERS
    """Whom to measure beside ours; ratios that need another one are left out."""
    parts: tuple[Part, ...] = get_args(Part)
    """What to measure."""

    def scale(self) -> Scale:
        """How much is measured: what is given, else the default of a full or a quick run.

        Raises ValueError for batches larger than the set.
        """
        usual = QUICK if self.quick else FULL
        scale = Scale(
            usual.pictures if self.pictures is None else self.pictures,
            usual.batch_size if self.batch_size is None else self.batch_size,
            usual.turns if self.turns is None else self.turns,
            usual.seconds if self.seconds is None else self.seconds,
        )
        if not 1 <= scale.batch_size <= scale.pictures:
            raise ValueError(
                f"a batch of {scale.batch_size} pictures does not fit a set of {scale.pictures}; "
                f"choose --batch-size in 1 … {scale.pictures}"
            )
        return scale


def main(config: LoaderBenchmark) -> dict[str, Any]:
    """Measure, print tables, write the JSON; returns what was written."""
    if config.quick and config.json and config.json.is_file() and not _is_quick(config.json):
        raise ValueError(f"{config.json} holds a full run's figures; give a quick run another --json")
    scale, threads = config.scale(), usable_cores(config.threads)
    turns = Turns(scale.turns, scale.seconds)
    peers = (PEER, *load_peers(config.peers))
    # The server that forks the DataLoaders' workers imports once what all of them need.
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as display:
        bars = _Bars(display, len(config.parts))
        sets = SampleSets(config.data, scale.pictures, bars.note)
        plan = parts.Plan(sets, peers, moco_v2(_CROP_PX), scale.batch_size, threads, turns, bars.steps)
        found = _measure(config.parts, plan, bars)
    result = {
        "benchmark": "loader",
        "quick": config.quick,
        "config": {
            "threads": threads,
            "batch_size": scale.batch_size,
            "crop_px": _CROP_PX,
            "turns": scale.turns,
            "seconds": scale.seconds,
        },
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


def _is_quick(figures: Path) -> bool:
    return bool(json.loads(figures.read_text()).get("quick"))


def _measure(wanted: tuple[Part, ...], plan: parts.Plan, bars: "_Bars") -> dict[str, Any]:
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


class _Bars:
    """Two progress bars: the parts of the run, and the steps of the present one."""

    def __init__(self, display: Progress, num_parts: int) -> None:
        self._display = display
        self._parts = display.add_task("", total=num_parts, completed=-1)
        self._steps = display.add_task("", total=None)

    def next_part(self, name: str) -> None:
        """A part begins."""
        self._display.update(self._parts, advance=1, description=name)

    def note(self, what: str) -> None:
        """Say what is being done beside the steps."""
        self._display.update(self._steps, description=what)

    def steps(self, total: int) -> Callable[[str], None]:
        """Steps begin, as many as told; the function given back is to be told of each before it is done."""
        self._display.reset(self._steps, total=total, completed=-1)

        def step(name: str) -> None:
            self._display.update(self._steps, advance=1, description=name)

        return step


if __name__ == "__main__":
    cli.run(functools.partial(lambda argv: main(tyro.cli(LoaderBenchmark, args=argv)), sys.argv[1:]))
