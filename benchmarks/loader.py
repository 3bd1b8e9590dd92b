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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

from rich.progress import Progress

from benchmarks import stages
from benchmarks.peers import ALL_PEERS, PeerName, load_peers
from benchmarks.peers.contract import FFCV, WORKS, Job, Peer, PeerWork, WorkName
from benchmarks.peers.ours import CROPS, PEER
from benchmarks.pixel_error import choose_crops, pixel_error, reference_crops
from benchmarks.ratios import GROUPS, RAW_FFCV, RAW_JPEG, RAW_OURS, ratios
from benchmarks.run_options import CROP_PX, Bars, RunOptions, finish_benchmark, print_table
from benchmarks.sample_sets import SampleSet, SampleSets
from benchmarks.timing import Runner, Turns, num_steps, summary, take_turns
from pipelines.recipe import Recipe, moco_v2
from pipelines.workers import usable_cores
from training import cli
from training.cli import console

_ERROR_IMAGES = 32
_STAGES_IMAGES = 256
_CONVERSIONS = 3
_PRELOADED = ["benchmarks.stages", "benchmarks.peers.with_torchvision"]
_JPEG_SETS = ("reencoded", "pass_through")
_UNITS = {"convert": "pictures/s", "photometric": "views/s"}
_Rows = dict[str, dict[str, Any]]
"""Name → median, low, high, turns and further figures."""

_JPEGPart = Literal["reencoded-crops", "reencoded-recipe", "pass-through-crops", "pass-through-recipe"]
LoaderPart = Literal[_JPEGPart, "raw", "scaling", "convert", "photometric", "stages"]


@dataclass(frozen=True)
class LoaderBenchmark(RunOptions):
    """Measure two-view loaders."""

    peers: tuple[PeerName, ...] = ALL_PEERS
    """Loaders to measure with ours; ratios that need another one are left out."""
    parts: tuple[LoaderPart, ...] = get_args(LoaderPart)
    """What to measure."""


@dataclass(frozen=True)
class _Plan:
    """What every part needs to know."""

    sets: SampleSets
    peers: tuple[Peer, ...]  # our loader and the others
    recipe: Recipe
    batch_size: int
    num_threads: int
    turns: Turns
    bars: Bars

    def job(self, images: SampleSet) -> Job:
        """Return the job of every loader on these images."""
        sets = (images.folder, images.beton, images.shards)
        return Job(*sets, self.recipe, self.batch_size, self.num_threads)

    def measure(self, runners: Mapping[str, Runner], configured: Mapping[str, str] | None = None) -> _Rows:
        """Measure the runners in turns."""
        rates = take_turns(runners, self.turns, self.bars.steps(num_steps(runners, self.turns)))
        return _rows(rates, configured)


def main(config: LoaderBenchmark) -> dict[str, Any]:
    """Measure, print tables, write the JSON; returns what was written."""
    config.keep_full_figures()
    scale, threads = config.scale(), usable_cores(config.threads)
    turns = Turns(scale.turns, scale.seconds)
    peers = (PEER, *load_peers(config.peers))
    # The server that forks the DataLoaders' workers imports once what all of them need.
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    tables: dict[str, Any] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as display:
        bars = Bars(display, len(config.parts))
        sets = SampleSets(config.data, scale.pictures, bars.note)
        plan = _Plan(sets, peers, moco_v2(CROP_PX), scale.batch_size, threads, turns, bars)
        for part in (part for part in get_args(LoaderPart) if part in config.parts):
            bars.next_part(part)
            images, _, name = part.replace("-", "_").rpartition("_")
            place = tables.setdefault(images, {}) if images else tables
            place[name] = _PARTS[part](plan)
    micros = tables.pop("stages", {})
    left_out = {
        work: {peer.name: reason for peer in peers if isinstance(reason := peer.work(work), str)}
        for work in WORKS
    }
    figures = {
        "config": scale.config(threads),
        "sets": sets.facts(),
        "left_out": left_out,
        "tables": tables,
        "stages": micros,
        **ratios(tables),
    }
    _print(figures)
    return finish_benchmark("loader", config.quick, config.json, **figures)


def _rows(rates: Mapping[str, list[float]], configured: Mapping[str, str] | None) -> _Rows:
    rows = {name: summary(values) for name, values in rates.items()}
    for name, how in (configured or {}).items():
        rows[name]["configured"] = how
    return rows


def _runner(work: PeerWork, job: Job) -> Runner:
    threads = job.num_threads
    return Runner(
        partial(work.open, job),
        items=job.batch_size * (threads if work.one_thread else 1),
        queued=work.queued + threads * work.queued_per_thread,
        round=1 if work.one_thread else threads,
        settle=work.settle,
    )


def _loaders(kind: WorkName, images: SampleSet, plan: _Plan) -> _Rows:
    """Measure every loader that does this kind of work; of crops also the difference from PIL's pixels."""
    job = plan.job(images)
    works = {peer: work for peer in plan.peers if isinstance(work := peer.work(kind), PeerWork)}
    rows = plan.measure(
        {peer.name: _runner(work, job) for peer, work in works.items()},
        {peer.name: work.configured for peer, work in works.items()},
    )
    if kind == "crops":
        fixed = choose_crops(job, _ERROR_IMAGES)
        reference = reference_crops(fixed)
        for peer in works:
            rows[peer.name] |= {"antialiased": peer.antialiased, **pixel_error(peer, fixed, reference)}
    return rows


def _raw(plan: _Plan) -> _Rows:
    """Measure crops from sets that hold no JPEG, and ours from one that does."""
    jpeg = plan.job(plan.sets.reencoded)
    ways = {RAW_OURS: (CROPS, replace(jpeg, beton=plan.sets.yuv420)), RAW_JPEG: (CROPS, jpeg)}
    for peer in plan.peers:
        if peer.name == FFCV and isinstance(peer.crops, PeerWork):
            ways[RAW_FFCV] = (peer.crops, replace(jpeg, beton=plan.sets.ffcv_raw))
    rows = plan.measure({name: _runner(*way) for name, way in ways.items()})
    for name, (work, job) in ways.items():
        rows[name]["bytes"] = job.beton.stat().st_size
        rows[name]["configured"] = f"{work.configured}; of {job.beton.name}"
    return rows


def _scaling(plan: _Plan) -> _Rows:
    """Measure our crops with one thread and with all."""
    job = plan.job(plan.sets.reencoded)
    numbers = sorted({1, plan.num_threads})
    return plan.measure({str(num): _runner(CROPS, replace(job, num_threads=num)) for num in numbers})


def _converters(plan: _Plan) -> _Rows:
    """Measure images per second of our converter and of FFCV's."""
    repeats = min(_CONVERSIONS, plan.turns.num)
    step = plan.bars.steps(2 * repeats)
    rates = stages.converter_rates(plan.sets.reencoded.folder, repeats, plan.num_threads, step)
    return _rows(rates, stages.CONVERTERS)


def _photometric(plan: _Plan) -> _Rows:
    """Measure views per second of the photometric stage alone."""
    views = reference_crops(choose_crops(plan.job(plan.sets.reencoded), _ERROR_IMAGES))
    runners = stages.photometric(views.reshape(-1, *views.shape[2:]), plan.recipe, plan.num_threads)
    return plan.measure(runners, stages.PHOTOMETRIC)


def _stages(plan: _Plan) -> dict[str, float]:
    """Measure microseconds of each of our stages, per sample on one thread."""
    return stages.stage_times(plan.sets.reencoded.beton, plan.recipe, _STAGES_IMAGES)


_PARTS: dict[LoaderPart, Callable[[_Plan], Any]] = {
    "reencoded-crops": lambda plan: _loaders("crops", plan.sets.reencoded, plan),
    "reencoded-recipe": lambda plan: _loaders("recipe", plan.sets.reencoded, plan),
    "pass-through-crops": lambda plan: _loaders("crops", plan.sets.pass_through, plan),
    "pass-through-recipe": lambda plan: _loaders("recipe", plan.sets.pass_through, plan),
    "raw": _raw,
    "scaling": _scaling,
    "convert": _converters,
    "photometric": _photometric,
    "stages": _stages,
}


def _print(figures: dict[str, Any]) -> None:
    threads, measured = figures["config"]["threads"], set()
    for name, table in figures["tables"].items():
        for work, rows in (table if name in _JPEG_SETS else {"": table}).items():
            measured.add(work)
            unit = _UNITS.get(name, "samples/s")
            cells = {peer: _cells(row, unit) for peer, row in rows.items()}
            print_table(f"{name} {work}".strip() + f"; {threads} threads", cells)
    if figures["stages"]:
        rows = {name: {"µs": f"{micros:.0f}"} for name, micros in figures["stages"].items()}
        print_table("time of each stage per sample, one thread", rows)
    for group in GROUPS:
        for ratio, value in figures.get(group, {}).items():
            console.print(f"{group}.{ratio}: {value:.2f}")
    for work in (work for work in WORKS if work in measured):
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
