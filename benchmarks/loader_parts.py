"""The parts of the loader benchmark: each measures one table of the JSON."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks import conversion, stages
from benchmarks.peers.contract import FFCV, WORKS, Job, Peer, PeerWork, WorkName
from benchmarks.peers.ours import CROPS
from benchmarks.pixel_error import choose_crops, pixel_error, reference_crops
from benchmarks.ratios import RAW_FFCV, RAW_JPEG, RAW_OURS
from benchmarks.sample_sets import SampleSet, SampleSets
from benchmarks.timing import Runner, Turns, num_steps, summary, take_turns
from pipelines.recipe import Recipe

Rows = dict[str, dict[str, Any]]
"""Name → median, low, high, turns and further figures."""
_ERROR_IMAGES = 32
_STAGES_IMAGES = 256
_CONVERSIONS = 3


@dataclass(frozen=True)
class LoaderPlan:
    """What every part needs to know."""

    sets: SampleSets
    peers: tuple[Peer, ...]  # our loader and the others
    recipe: Recipe
    batch_size: int
    num_threads: int
    turns: Turns
    steps: Callable[[int], Callable[[str], None]]
    """Given the number of steps, returns a function to call with each step's name."""

    def job(self, images: SampleSet) -> Job:
        """Return the job of every loader on these images."""
        sets = (images.folder, images.beton, images.shards)
        return Job(*sets, self.recipe, self.batch_size, self.num_threads)

    def rates(self, runners: Mapping[str, Runner]) -> dict[str, list[float]]:
        """Measure the runners in turns."""
        return take_turns(runners, self.turns, self.steps(num_steps(runners, self.turns)))

    def measure(self, ways: Mapping[str, tuple[PeerWork, Job]]) -> Rows:
        """Measure samples per second of several works in turns."""
        rates = self.rates({name: _runner(*way) for name, way in ways.items()})
        return _rows(rates, {name: work.configured for name, (work, _) in ways.items()})


def _rows(rates: Mapping[str, list[float]], configured: Mapping[str, str]) -> Rows:
    return {name: {**summary(values), "configured": configured[name]} for name, values in rates.items()}


def _runner(work: PeerWork, job: Job) -> Runner:
    threads = job.num_threads
    return Runner(
        partial(work.open, job),
        items=job.batch_size * (threads if work.one_thread else 1),
        queued=work.queued + threads * work.queued_per_thread,
        round=1 if work.one_thread else threads,
        settle=work.settle,
    )


def loaders(kind: WorkName, images: SampleSet, plan: LoaderPlan) -> Rows:
    """Measure every loader that does this kind of work; of crops also the difference from PIL's pixels."""
    job = plan.job(images)
    offered = {peer.name: peer.work(kind) for peer in plan.peers}
    rows = plan.measure({name: (work, job) for name, work in offered.items() if isinstance(work, PeerWork)})
    if kind == "crops":
        fixed = choose_crops(job, _ERROR_IMAGES)
        reference = reference_crops(fixed)
        for peer in (peer for peer in plan.peers if peer.name in rows):
            rows[peer.name] |= {"antialiased": peer.antialiased, **pixel_error(peer, fixed, reference)}
    return rows


def left_out(plan: LoaderPlan) -> dict[str, dict[str, str]]:
    """Return for each kind of work which peers are not measured, and why."""
    return {
        kind: {peer.name: reason for peer in plan.peers if isinstance(reason := peer.work(kind), str)}
        for kind in WORKS
    }


def raw(plan: LoaderPlan) -> Rows:
    """Measure crops from sets that hold no JPEG, and ours from one that does."""
    jpeg = plan.job(plan.sets.reencoded)
    ways = {RAW_OURS: (CROPS, replace(jpeg, beton=plan.sets.yuv420)), RAW_JPEG: (CROPS, jpeg)}
    for peer in plan.peers:
        if peer.name == FFCV and isinstance(peer.crops, PeerWork):
            ways[RAW_FFCV] = (peer.crops, replace(jpeg, beton=plan.sets.ffcv_raw))
    rows = plan.measure(ways)
    for name, (work, job) in ways.items():
        rows[name]["bytes"] = job.beton.stat().st_size
        rows[name]["configured"] = f"{work.configured}; of {job.beton.name}"
    return rows


def scaling(plan: LoaderPlan) -> Rows:
    """Measure our crops with one thread and with all."""
    job = plan.job(plan.sets.reencoded)
    jobs = [replace(job, num_threads=num) for num in sorted({1, plan.num_threads})]
    rates = plan.rates({str(job.num_threads): _runner(CROPS, job) for job in jobs})
    return {name: summary(values) for name, values in rates.items()}


def converters(plan: LoaderPlan) -> Rows:
    """Measure images per second of our converter and of FFCV's."""
    repeats = min(_CONVERSIONS, plan.turns.num)
    step = plan.steps(2 * repeats)
    rates = conversion.converter_rates(plan.sets.reencoded.folder, repeats, plan.num_threads, step)
    return _rows(rates, conversion.CONFIGURED)


def photometric(plan: LoaderPlan) -> Rows:
    """Measure views per second of the photometric stage alone."""
    views = reference_crops(choose_crops(plan.job(plan.sets.reencoded), _ERROR_IMAGES))
    runners = stages.photometric(views.reshape(-1, *views.shape[2:]), plan.recipe, plan.num_threads)
    return _rows(plan.rates(runners), stages.PHOTOMETRIC)


def our_stages(plan: LoaderPlan) -> dict[str, float]:
    """Measure microseconds of each of our stages, per sample on one thread."""
    plan.steps(1)("stages")
    return stages.stage_times(plan.sets.reencoded.beton, plan.recipe, _STAGES_IMAGES)
