"""Who learns more from Fashion-MNIST in the same minutes: our MoCo v2 and MixMask beside lightly's MoCo v2.

    python -m benchmarks.race --json benchmarks/results/race.json

All train the same small encoder from the same initial weights, with the same head, queue, batch, temperature,
momenta and optimizer, on all cores and for the same wall time, one after the other. lightly starts twice:
used as its documentation shows, with MoCoV2Transform as it comes and a process for each core; and at its
best, with the distribution of views that ours has and with the cores divided between its processes and
torch's threads as short trials show to be fastest. The cosine schedule runs by the wall time too. Each clock
starts when the first batch has arrived; judging by nearest neighbours, before and after, does not count.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.environment import environment, write_figures
from benchmarks.programs import fashion_sets
from benchmarks.race_figures import LIGHTLY, LIGHTLY_AT_BEST, MIXMASK, OURS, configured, figures, print_race
from benchmarks.race_ours import FEW, Runner, Setting, Stint, knn, ours, train
from benchmarks.run_options import RunOptions
from pipelines.workers import usable_cores
from training import cli
from training.cli import console

Build = Callable[[int], Runner]
"""A fresh runner of a seed."""


@dataclass(frozen=True)
class Race:
    """Race our MoCo v2 and MixMask against lightly's MoCo v2 on Fashion-MNIST."""

    seconds: float | None = None
    """Wall time of each training: 240, or 4 with --quick."""
    seeds: tuple[int, ...] = (0,)
    """Of initialisation, order and views; each is a race of its own."""
    quick: bool = False
    """A few seconds each, judged on 6,000 pictures; for a look, not for figures."""
    json: Path | None = None
    """Where the figures go."""
    data: Path = Path("data")
    """Folder of the two compiled sets, which are made there if they are missing."""
    hands: tuple[int, int] | None = None
    """How lightly's second start divides the cores: processes of its DataLoader, and threads of torch beside
    them; by default whichever of several divisions is the fastest in a short trial."""


def main(config: Race) -> dict[str, Any]:
    """Race, print a table, write the JSON; returns what was written.

    Raises:
        ValueError: for settings that measure nothing, or where the sets cannot be made.
        ImportError: if lightly is missing.
    """
    seconds = _seconds(config)
    RunOptions(quick=config.quick, json=config.json).keep_full_figures()
    theirs = _import_lightly()
    train_set, test_set = fashion_sets(console, config.data)
    setting = Setting()
    limit = 6000 if config.quick else None
    judge = functools.partial(knn, train_set=train_set, test_set=test_set, limit=limit)
    with _progress() as progress:
        best, trials = config.hands, {}
        if best is None:
            trials = _try_hands(theirs, setting, train_set, seconds, progress)
            best = max(trials, key=lambda tried: trials[tried])
        rivals = {
            LIGHTLY: (theirs.documented(setting), theirs.documented_hands()),
            LIGHTLY_AT_BEST: (setting, best),
        }
        # First, because our loader changes a setting of the C library for the whole process.
        builds: dict[str, tuple[Setting, Build]] = {
            **{
                name: (own, functools.partial(theirs.lightly, own, train_set, hands))
                for name, (own, hands) in rivals.items()
            },
            OURS: (setting, functools.partial(ours, "moco", setting, train_set)),
            MIXMASK: (setting, functools.partial(ours, "mixmask", setting, train_set)),
        }
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in builds}
        for name, (own, build) in builds.items():
            for seed in config.seeds:
                told = f"{name}, seed {seed}" if len(config.seeds) > 1 else name
                runs[name].append(_run(build(seed), own, seconds, judge, progress, told))
    result = {
        "benchmark": "race",
        "quick": config.quick,
        "race": figures(runs, configured(setting, rivals)),
        "config": _facts(config, setting, seconds, trials),
        "environment": environment(),
    }
    print_race(console, result)
    if config.json:
        write_figures(config.json, result, console)
    return result


def _seconds(config: Race) -> float:
    seconds = (4.0 if config.quick else 240.0) if config.seconds is None else config.seconds
    workers, torch_threads = config.hands or (0, 1)
    if seconds <= 0 or not config.seeds or workers < 0 or torch_threads < 1:
        raise ValueError(
            f"{seconds} s, seeds {config.seeds} and hands {config.hands} make no race; take some seconds, at "
            "least one seed, and 0 workers and 1 thread or more"
        )
    return seconds


def _import_lightly() -> ModuleType:
    try:
        from benchmarks import race_lightly
    except ImportError as error:
        raise ImportError(
            f"the race is against the package lightly, which cannot be imported ({error}); `make setup` "
            "installs it, or by hand `pip install '.[bench]' --constraint constraints.txt`"
        ) from error
    return race_lightly


def _try_hands(
    theirs: ModuleType, setting: Setting, data: Path, seconds: float, progress: Progress
) -> dict[tuple[int, int], float]:
    """Samples/s of lightly by its processes and threads, in trials of at most ten seconds."""
    task = progress.add_task("", total=None, rate="")
    told = functools.partial(progress.update, task)
    trials: dict[tuple[int, int], float] = theirs.try_hands(
        setting, data, min(10.0, seconds / 4), lambda what: told(description=what)
    )
    progress.remove_task(task)
    return trials


def _run(
    runner: Runner,
    setting: Setting,
    seconds: float,
    judge: Callable[..., dict[str, float]],
    progress: Progress,
    name: str,
) -> dict[str, float]:
    """Judge, train, judge; the figures of one runner and seed."""
    task = progress.add_task(name, total=seconds, rate="judging")
    before = judge(runner.encoder, setting)

    def show(done: Stint) -> None:
        progress.update(task, completed=done.seconds, rate=f"{done.samples / done.seconds:,.0f} samples/s")

    progress.update(task, rate="starting")
    stint = train(runner, setting, seconds, show)
    progress.update(task, rate="judging")
    after = judge(runner.encoder, setting)
    progress.remove_task(task)
    rate = stint.samples / stint.seconds
    told = f"{100 * before['knn']:.1f} → {100 * after['knn']:.1f} %"
    console.print(f"{name}: {rate:,.0f} samples/s, kNN {told}")
    return {
        "samples_per_s": rate,
        "samples": stint.samples,
        "seconds": stint.seconds,
        **{f"{kind}_before": share for kind, share in before.items()},
        **{f"{kind}_after": share for kind, share in after.items()},
    }


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    return Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True, refresh_per_second=2
    )


def _facts(
    config: Race, setting: Setting, seconds: float, trials: dict[tuple[int, int], float]
) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "seeds": list(config.seeds),
        "threads": usable_cores(0),
        "lightly_trials": [
            {"workers": workers, "torch_threads": threads, "samples_per_s": rate}
            for (workers, threads), rate in trials.items()
        ],
        "knn": {
            "k": 200,
            "temperature": 0.1,
            "bank": FEW,
            "whole_bank": 6000 if config.quick else "all training pictures",
        },
        "schedule": "cosine by the share of the wall time gone",
        "clock": "from the arrival of the first batch; kNN does not count",
        "precision": "fp32",
        **dataclasses.asdict(setting),
    }


if __name__ == "__main__":
    cli.program(Race, main)
