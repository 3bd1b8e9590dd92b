"""Who learns more from Fashion-MNIST in the same minutes: our MoCo v2 and MixMask beside lightly's MoCo v2.

    python -m benchmarks.race --json benchmarks/results/race.json

All train the same small encoder from the same initial weights, with the same head, queue, batch, temperature,
momenta, optimizer and distribution of views, on all cores and for the same wall time, one after the other.
The cosine schedule runs by the wall time too. Each clock starts when the first batch has arrived; judging by
nearest neighbours, before and after, does not count.
"""

import dataclasses
import functools
import importlib.metadata
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.environment import environment, write_figures
from benchmarks.race_ours import Runner, Setting, Stint, knn, ours, train
from benchmarks.run_options import RunOptions
from engine import cli
from pipelines.cores import usable_cores

console = Console(highlight=False, soft_wrap=True)

OURS, MIXMASK, LIGHTLY = "ours, MoCo v2", "ours, MixMask", "lightly, MoCo v2"
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
    workers: int = 2
    """Processes of lightly's DataLoader."""
    torch_threads: int = 0
    """Threads of torch's operators while lightly trains; 0 takes all cores, as ours does."""


def main(config: Race) -> dict[str, Any]:
    """Race, print a table, write the JSON; returns what was written.

    Raises:
        ValueError: for settings that measure nothing, or where the sets cannot be made.
        ImportError: if lightly is missing.
    """
    seconds = _seconds(config)
    RunOptions(quick=config.quick, json=config.json).keep_full_figures()
    lightly = _import_lightly()
    train_set, test_set = _sets(config.data)
    setting = Setting()
    torch_threads = config.torch_threads or torch.get_num_threads()
    builds: dict[str, Build] = {
        OURS: functools.partial(ours, "moco", setting, train_set),
        MIXMASK: functools.partial(ours, "mixmask", setting, train_set),
        LIGHTLY: lambda seed: lightly(setting, train_set, seed, config.workers, torch_threads),
    }
    judge = functools.partial(
        knn, setting=setting, train_set=train_set, test_set=test_set, limit=6000 if config.quick else None
    )
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in builds}
    with _progress() as progress:
        for seed in config.seeds:
            for name, build in builds.items():
                told = f"{name}, seed {seed}" if len(config.seeds) > 1 else name
                runs[name].append(_run(build(seed), setting, seconds, judge, progress, told))
    result = {
        "benchmark": "race",
        "quick": config.quick,
        "race": figures(runs, _configured(setting, config.workers, torch_threads)),
        "config": _facts(config, setting, seconds),
        "environment": _environment(),
    }
    _print(result)
    if config.json:
        write_figures(config.json, result, console)
    return result


def _seconds(config: Race) -> float:
    seconds = (4.0 if config.quick else 240.0) if config.seconds is None else config.seconds
    if seconds <= 0 or not config.seeds or config.workers < 0:
        raise ValueError(
            f"{seconds} s, seeds {config.seeds} and {config.workers} workers make no race; take some "
            "seconds, at least one seed, and 0 workers or more"
        )
    return seconds


def _import_lightly() -> Callable[..., Runner]:
    try:
        from benchmarks.race_lightly import lightly
    except ImportError as error:
        raise ImportError(
            f"the race is against the package lightly, which cannot be imported ({error}); `make setup` "
            "installs it, or by hand `pip install '.[bench]' --constraint constraints.txt`"
        ) from error
    return lightly


def _sets(folder: Path) -> tuple[Path, Path]:
    """The compiled training and test pictures, made if they are missing."""
    train_set, test_set = (folder / f"fashion-mnist-{split}.beton" for split in ("train", "test"))
    if not (train_set.is_file() and test_set.is_file()):
        words = ("fashion-mnist", folder, "--download-to", folder, "--overwrite")
        done = subprocess.run([sys.executable, "-m", "dataset_tools", *map(str, words)], check=False)
        if done.returncode:
            raise ValueError("Fashion-MNIST could not be compiled; mend what the lines above say")
    return train_set, test_set


def _run(
    runner: Runner,
    setting: Setting,
    seconds: float,
    judge: Callable[..., float],
    progress: Progress,
    name: str,
) -> dict[str, float]:
    """Judge, train, judge; the figures of one runner and seed."""
    task = progress.add_task(name, total=seconds, rate="judging")
    before = judge(runner.encoder)

    def show(done: Stint) -> None:
        progress.update(task, completed=done.seconds, rate=f"{done.samples / done.seconds:,.0f} samples/s")

    progress.update(task, rate="starting")
    stint = train(runner, setting, seconds, show)
    progress.update(task, rate="judging")
    after = judge(runner.encoder)
    progress.remove_task(task)
    rate = stint.samples / stint.seconds
    console.print(f"{name}: {rate:,.0f} samples/s, kNN {100 * before:.1f} → {100 * after:.1f} %")
    return {
        "samples_per_s": rate,
        "samples": stint.samples,
        "seconds": stint.seconds,
        "knn_before": before,
        "knn_after": after,
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


# --------------------------------------------------------------------------------------------------- figures


def figures(runs: dict[str, list[dict[str, float]]], configured: dict[str, str]) -> dict[str, Any]:
    """The JSON's ``race``: means over seeds with their spread, and ours against lightly.

    Args:
        runs: of each runner, by seed; kNN as a share in [0, 1].
        configured: how each runner is set up.
    """
    means = {
        name: {key: statistics.fmean(run[key] for run in seeds) for key in seeds[0]}
        for name, seeds in runs.items()
    }
    theirs = means[LIGHTLY]
    ratios = {}
    for prefix, name in (("", OURS), ("mixmask_", MIXMASK)):
        mine = means[name]
        ratios[f"{prefix}samples_per_s_vs_lightly"] = mine["samples_per_s"] / theirs["samples_per_s"]
        ratios[f"{prefix}knn_gain_over_lightly"] = 100 * (mine["knn_after"] - theirs["knn_after"])
    runners = {
        name: {**means[name], "spread": _spread(seeds), "runs": seeds, "configured": configured[name]}
        for name, seeds in runs.items()
    }
    return {**ratios, "runners": runners}


def _spread(seeds: list[dict[str, float]]) -> dict[str, float] | None:
    """Standard deviations over seeds; None for a single one."""
    if len(seeds) < 2:
        return None
    return {key: statistics.stdev(run[key] for run in seeds) for key in ("samples_per_s", "knn_after")}


def _configured(setting: Setting, workers: int, torch_threads: int) -> dict[str, str]:
    loop = (
        f"the compiled set by our loader, all cores, channels_last, BN over {setting.bn_splits} parts of the "
        "batch and keys dealt anew"
    )
    return {
        OURS: loop,
        MIXMASK: f"{loop}; one block mask per image on a grid of {setting.mixing.grid_size}",
        LIGHTLY: (
            "MoCoV2Transform with the recipe's numbers, MoCoProjectionHead, NTXentLoss with its memory bank, "
            "update_momentum, as in the documentation's example; PIL images made from pixels in memory, a "
            f"DataLoader of {workers} lasting workers, {torch_threads} threads in torch, contiguous memory, "
            "BN over the whole batch (the example has no other)"
        ),
    }


def _facts(config: Race, setting: Setting, seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "seeds": list(config.seeds),
        "threads": usable_cores(0),
        "knn": {"k": 200, "temperature": 0.1, "bank": 6000 if config.quick else "all training pictures"},
        "schedule": "cosine by the share of the wall time gone",
        "clock": "from the arrival of the first batch; kNN does not count",
        "precision": "fp32",
        **dataclasses.asdict(setting),
    }


def _environment() -> dict[str, Any]:
    known = environment()
    return {**known, "versions": known["versions"] | {"lightly": importlib.metadata.version("lightly")}}


def _print(result: dict[str, Any]) -> None:
    race, config = result["race"], result["config"]
    table = Table(title=f"Fashion-MNIST, {config['seconds']:g} s of training on {config['threads']} cores")
    for column in ("", "samples/s", "samples", "kNN before", "kNN after"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in race["runners"].items():
        spread = row["spread"] or {}
        table.add_row(
            name,
            f"{row['samples_per_s']:,.0f}" + (f" ± {spread['samples_per_s']:,.0f}" if spread else ""),
            f"{row['samples']:,.0f}",
            f"{100 * row['knn_before']:.1f} %",
            f"{100 * row['knn_after']:.1f}" + (f" ± {100 * spread['knn_after']:.1f} %" if spread else " %"),
        )
    console.print(table)
    for prefix, name in (("", OURS), ("mixmask_", MIXMASK)):
        console.print(
            f"{name}: {race[f'{prefix}samples_per_s_vs_lightly']:.1f} × lightly's samples/s, "
            f"{race[f'{prefix}knn_gain_over_lightly']:+.1f} points of kNN"
        )


if __name__ == "__main__":
    cli.run(functools.partial(lambda argv: main(tyro.cli(Race, args=argv)), sys.argv[1:]))
