"""The parts of the loader benchmark: each measures one table of the JSON."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks import conversion, photometric_stage, stages
from benchmarks.peers.contract import FFCV, WORKS, Job, Peer, Work, works
from benchmarks.peers.ours import CROPS
from benchmarks.pixel_error import choose_crops, pixel_error, reference_crops
from benchmarks.ratios import RAW_FFCV, RAW_JPEG, RAW_OURS
from benchmarks.sample_sets import SampleSet, SampleSets
from benchmarks.timing import Runner, Turns, num_steps, summary, take_turns
from pipelines.recipe import Recipe

Rows = dict[str, dict[str, Any]]
"""Name → median, low, high, turns and what else is known of it."""
_ERROR_PICTURES = 32
_STAGES_PICTURES = 256
_CONVERSIONS = 3


@dataclass(frozen=True)
class Plan:
    """What every part needs to know."""

    sets: SampleSets
    peers: tuple[Peer, ...]
    """Ours and those beside it."""
    recipe: Recipe
    batch_size: int
    num_threads: int
    turns: Turns
    steps: Callable[[int], Callable[[str], None]]
    """Given how many steps come, a function to be told of each."""

    def job(self, pictures: SampleSet) -> Job:
        """The job of every loader on these pictures."""
        return Job(
            pictures.folder,
            pictures.beton,
            pictures.shards,
            self.recipe,
            self.batch_size,
            self.num_threads,
        )

    def rates(self, runners: Mapping[str, Runner]) -> dict[str, list[float]]:
        """Let them take turns."""
        return take_turns(runners, self.turns, self.steps(num_steps(runners, self.turns)))


def crops(pictures: SampleSet, plan: Plan) -> Rows:
    """Samples per second of every loader that makes crops, and how far its pixels are from PIL's."""
    rows = _loaders(pictures, plan, works("crops", plan.peers))
    add_errors(rows, pictures, plan)
    return rows


def add_errors(rows: Rows, pictures: SampleSet, plan: Plan) -> None:
    """Add to each row of crops how far they are from PIL's."""
    asked = choose_crops(plan.job(pictures), _ERROR_PICTURES)
    reference = reference_crops(asked)
    for peer in plan.peers:
        if peer.name in rows:
            rows[peer.name] |= {"antialiased": peer.antialiased, **pixel_error(peer, asked, reference)}


def recipe(pictures: SampleSet, plan: Plan) -> Rows:
    """Samples per second of every loader that makes the recipe's views."""
    return _loaders(pictures, plan, works("recipe", plan.peers))


def left_out(plan: Plan) -> dict[str, dict[str, str]]:
    """For each work whom it is not measured with, and why."""
    return {
        name: {peer: reason for peer, reason in works(name, plan.peers).items() if isinstance(reason, str)}
        for name in WORKS
    }


def _loaders(pictures: SampleSet, plan: Plan, offers: Mapping[str, Work | str]) -> Rows:
    job = plan.job(pictures)
    offered = {name: work for name, work in offers.items() if isinstance(work, Work)}
    rates = plan.rates({name: runner(work, job) for name, work in offered.items()})
    return {name: {**summary(rates[name]), "configured": work.configured} for name, work in offered.items()}


def runner(work: Work, job: Job) -> Runner:
    """One who takes part in the turns."""
    threads = job.num_threads
    return Runner(
        partial(work.open, job),
        items=job.batch_size * (threads if work.one_thread else 1),
        queued=work.queued + threads * work.queued_per_thread,
        round=1 if work.one_thread else threads,
        settle=work.settle,
    )


def raw(plan: Plan) -> Rows:
    """Samples per second of crops from sets that hold no JPEG, and from ours that does."""
    jpeg = plan.job(plan.sets.reencoded)
    ways: dict[str, tuple[Work, Job]] = {
        RAW_OURS: (CROPS, replace(jpeg, beton=plan.sets.yuv420)),
        RAW_JPEG: (CROPS, jpeg),
    }
    for peer in plan.peers:
        if peer.name == FFCV and isinstance(peer.crops, Work):
            ways[RAW_FFCV] = (peer.crops, replace(jpeg, beton=plan.sets.ffcv_raw))
    rates = plan.rates({name: runner(work, job) for name, (work, job) in ways.items()})
    return {
        name: {
            **summary(rates[name]),
            "bytes": job.beton.stat().st_size,
            "configured": f"{work.configured}; of {job.beton.name}",
        }
        for name, (work, job) in ways.items()
    }


def scaling(plan: Plan) -> Rows:
    """Samples per second of our crops with one thread and with all."""
    job = plan.job(plan.sets.reencoded)
    numbers = sorted({1, plan.num_threads})
    rates = plan.rates({str(num): runner(CROPS, replace(job, num_threads=num)) for num in numbers})
    return {name: summary(values) for name, values in rates.items()}


def convert(plan: Plan) -> Rows:
    """Pictures per second of our converter and of FFCV's."""
    repeats = min(_CONVERSIONS, plan.turns.num)
    step = plan.steps(2 * repeats)
    rates = conversion.measure(plan.sets.reencoded.folder, repeats, plan.num_threads, step)
    return _configured(rates, conversion.CONFIGURED)


def photometric(plan: Plan) -> Rows:
    """Views per second of the photometric stage alone."""
    views = reference_crops(choose_crops(plan.job(plan.sets.reencoded), _ERROR_PICTURES))
    views_NSS3 = views.reshape(-1, *views.shape[2:])
    runners = photometric_stage.runners(views_NSS3, plan.recipe, plan.num_threads)
    return _configured(plan.rates(runners), photometric_stage.CONFIGURED)


def _configured(rates: Mapping[str, list[float]], sentences: Mapping[str, str]) -> Rows:
    return {name: {**summary(values), "configured": sentences[name]} for name, values in rates.items()}


def where_time_goes(plan: Plan) -> dict[str, float]:
    """Microseconds of each of our stages, per sample on one thread."""
    plan.steps(1)("stages")
    return stages.measure(plan.sets.reencoded.beton, plan.recipe, _STAGES_PICTURES)
