"""Learning from Fashion-MNIST for the same wall time: our MoCo v2 and MixMask against lightly's MoCo v2.

    python -m benchmarks.race --json benchmarks/results/race.json

Every entry trains the encoder of the preset ``fashion`` from the same initial weights, with the same head,
queue, batch, temperature, momenta and optimizer, on all cores, one entry after the other. lightly is entered
twice: as its documentation shows it, with MoCoV2Transform's defaults and one worker process per core; and at
its best, with our views and the division of the cores that is fastest in short trials. The cosine schedule
follows the wall time too. The clock starts when the first batch arrives and leaves the kNN evaluations out.
"""

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from benchmarks.programs import fashion_sets
from benchmarks.run_options import finish_benchmark, keep_full_figures, print_table
from models.batch import Method
from models.encoders import backbone_features, build_encoder
from models.moco import MoCo
from pipelines import build_loader, evaluation_batches
from pipelines.device import keep_freed_memory
from pipelines.recipe import evaluation
from pipelines.workers import usable_cores
from presets import PretrainConfig, fashion
from training import cli
from training.cli import console
from training.evaluate import Features, extract_features, knn_top1
from training.optim import lr_at, scale_lr, sgd
from training.precision import Precision
from training.step import TrainStep

OURS, MIXMASK = "ours, MoCo v2", "ours, MixMask"
LIGHTLY, LIGHTLY_AT_BEST = "lightly as documented", "lightly at its best"
_PAIRS = tuple(
    (mine, prefix, theirs, suffix)
    for mine, prefix in ((OURS, ""), (MIXMASK, "mixmask_"))
    for theirs, suffix in ((LIGHTLY, "lightly"), (LIGHTLY_AT_BEST, "lightly_at_best"))
)
"""Which entries are compared, and how the JSON's keys of this comparison begin and end."""
_SMALL_BANK, _QUICK_IMAGES = 5000, 6000
"""Training images of the main kNN figure (among all 60,000 even a random encoder does well), and those that
--quick evaluates on."""
_SPREAD = ("samples_per_s", "knn_after")
_PRECISION = Precision.choose("fp32", torch.device("cpu"))
Batches = Generator[Any, None, None]


@dataclass(frozen=True)
class Race:
    """Race our MoCo v2 and MixMask against lightly's MoCo v2 on Fashion-MNIST."""

    seconds: float | None = None
    """Wall time of each training: 240, or 4 with --quick."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of initialisation, order and views; each is a race of its own."""
    quick: bool = False
    """A few seconds each, evaluated on 6,000 images; for a look, not for figures."""
    json: Path | None = None
    """Where the figures go."""
    data: Path = Path("data")
    """Folder of the two compiled sets, which are made there if they are missing."""
    hands: tuple[int, int] | None = None
    """Worker processes and torch threads of lightly's second entry; by default the fastest of several
    divisions of the cores in a short trial."""


@dataclass(frozen=True)
class Entry:
    """A training that takes part, freshly initialised."""

    preset: PretrainConfig
    model: nn.Module
    """Returns loss and metrics of a batch; updates the key encoder and the queue. kNN evaluates its
    ``encoder_q``."""
    batches: Batches
    """Endless; closing them frees what they hold."""
    torch_threads: int
    configured: str
    """How it is set up, in words."""


def main(config: Race) -> dict[str, Any]:
    """Race, print a table, write the JSON; returns what was written.

    Raises:
        ValueError: for settings that measure nothing, or if the sets cannot be made.
        ImportError: if lightly is missing.
    """
    seconds = (4.0 if config.quick else 240.0) if config.seconds is None else config.seconds
    workers, torch_threads = config.hands or (0, 1)
    if seconds <= 0 or not config.seeds or workers < 0 or torch_threads < 1:
        raise ValueError(
            f"{seconds} s, seeds {config.seeds} and hands {config.hands} make no race; give more than 0 s, "
            "at least one seed, and at least 0 workers and 1 thread"
        )
    keep_full_figures(config.quick, config.json)
    peer = _import_lightly()
    train_set, test_set = fashion_sets(console, config.data)
    preset = fashion(train_set)
    limit = _QUICK_IMAGES if config.quick else None
    runs: dict[str, list[dict[str, float]]] = {}
    words: dict[str, str] = {}
    with console.status("trying lightly") as status:
        trials = [] if config.hands else _try_divisions(peer, preset, min(10.0, seconds / 4))
        fastest = max(trials, key=lambda trial: trial["samples_per_s"], default={})
        best = config.hands or (fastest["workers"], fastest["torch_threads"])
        builds: dict[str, Callable[[int], Entry]] = {
            LIGHTLY: functools.partial(lightly, peer, peer.documented(preset), peer.documented_division()),
            LIGHTLY_AT_BEST: functools.partial(lightly, peer, preset, best),
            OURS: functools.partial(ours, with_method(preset, "moco")),
            MIXMASK: functools.partial(ours, preset),
        }
        for name, build in builds.items():
            if name == OURS:  # after lightly's entries, because it applies to the process from now on
                keep_freed_memory()
            runs[name] = []
            for seed in config.seeds:
                status.update(f"{name}, seed {seed}")
                entry = build(seed)
                before = evaluate_knn(entry, test_set, limit, "before")
                done = train(entry, seconds, status.update)
                run = done | before | evaluate_knn(entry, test_set, limit, "after")
                gain = f"{100 * run['knn_before']:.1f} → {100 * run['knn_after']:.1f} %"
                console.print(f"{name}, seed {seed}: {run['samples_per_s']:,.0f} samples/s, kNN {gain}")
                runs[name].append(run)
                words[name] = entry.configured
    race = figures(runs, words)
    facts = {"seconds": seconds, "lightly_trials": trials, **_facts(config, preset)}
    _print(race, facts)
    return finish_benchmark("race", config.quick, config.json, race=race, config=facts)


def _import_lightly() -> ModuleType:
    try:
        from benchmarks import race_lightly
    except ImportError as error:
        raise ImportError(
            f"the race is against the package lightly, which cannot be imported ({error}); `make setup` "
            "installs it, or by hand `pip install '.[bench]' --constraint constraints.txt`"
        ) from error
    return race_lightly


def with_method(preset: PretrainConfig, method: Method) -> PretrainConfig:
    """The preset with another method."""
    return dataclasses.replace(preset, mixing=dataclasses.replace(preset.mixing, method=method))


def _model_settings(preset: PretrainConfig) -> dict[str, Any]:
    """The preset's values by their names in `MoCo`."""
    names = {"dim": "moco_dim", "queue_len": "moco_k", "momentum": "moco_m", "temperature": "moco_t"}
    return {key: getattr(preset, name) for key, name in names.items()} | {"bn_splits": preset.splits(1)}


def ours(preset: PretrainConfig, seed: int) -> Entry:
    """Our training of a preset, as `train_pretrain` runs it."""
    torch.manual_seed(seed)
    method = preset.mixing.method
    build = functools.partial(build_encoder, preset.arch)
    model = MoCo(build, method=method, queue_seed=seed, **_model_settings(preset))
    model.to(memory_format=torch.channels_last)
    words = (
        f"the compiled set by our loader, all cores, channels_last, BN over {preset.bn_splits} parts of the "
        "batch and keys dealt anew, freed memory kept between steps"
    )
    if method != "moco":
        words += f"; one block mask per image on a grid of {preset.mixing.grid_size}"
    return Entry(preset, model, _our_batches(preset, seed), torch.get_num_threads(), words)


def _our_batches(preset: PretrainConfig, seed: int) -> Batches:
    loader = build_loader(preset.data, preset.recipe(), batch_size=preset.batch_size, seed=seed)
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def lightly(peer: ModuleType, preset: PretrainConfig, division: tuple[int, int], seed: int) -> Entry:
    """lightly's MoCo v2; ``division``: worker processes of its DataLoader, and torch threads."""
    workers, torch_threads = division
    torch.manual_seed(seed)
    batches, words = peer.endless_batches(preset, workers), peer.in_words(preset, workers, torch_threads)
    return Entry(preset, peer.LightlyMoCo(preset), batches, torch_threads, words)


def _try_divisions(peer: ModuleType, preset: PretrainConfig, seconds: float) -> list[dict[str, Any]]:
    """Samples/s of lightly by division; processes and threads compete for cores, so fewer may be faster."""
    cores, trials = usable_cores(0), []
    for division in dict.fromkeys([peer.documented_division(), (cores, 1), (1, 1), (0, cores)]):
        rate = train(lightly(peer, preset, division, 0), seconds)["samples_per_s"]
        trials.append({"workers": division[0], "torch_threads": division[1], "samples_per_s": rate})
    return trials


def train(entry: Entry, seconds: float, progress: Callable[[str], None] = lambda _: None) -> dict[str, float]:
    """Train for a wall time that starts when the first batch arrives."""
    preset = entry.preset
    optimizer = sgd(entry.model, preset.lr, preset.sgd_momentum, preset.weight_decay)
    step = TrainStep(entry.model, optimizer, _PRECISION)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(entry.torch_threads)
    entry.model.train()
    samples, elapsed = 0, 0.0
    with closing(entry.batches) as batches:
        batch = next(batches)
        start = time.perf_counter()
        while elapsed < seconds:
            scale_lr(optimizer, _lr_after(elapsed, seconds, 1.0))
            step(batch)
            batch = next(batches)
            samples += preset.batch_size
            elapsed = time.perf_counter() - start
            progress(f"{samples / elapsed:,.0f} samples/s")
    torch.set_num_threads(threads_before)
    return {"samples_per_s": samples / elapsed, "samples": samples, "seconds": elapsed}


def _lr_after(elapsed_s: float, total_s: float, base_lr: float) -> float:
    """The cosine schedule by wall time, in steps of a millisecond."""
    return lr_at(int(1000 * elapsed_s), math.ceil(1000 * total_s), base_lr)


def evaluate_knn(entry: Entry, test_set: Path, limit: int | None, when: str) -> dict[str, float]:
    """kNN top-1 (k = 200, t = 0.1) in [0, 1], with `_SMALL_BANK` training images and with all (``whole``).

    limit: draw this many training images and a sixth as many test images; None takes all.
    """
    encoder = entry.model.get_submodule("encoder_q").eval()
    encode = functools.partial(backbone_features, encoder)
    view = evaluation(entry.preset.recipe())
    bank, test = (
        extract_features(encode, evaluation_batches(images, view, limit=num), _PRECISION)
        for images, num in ((entry.preset.data, limit), (test_set, limit and limit // 6))
    )
    drawn = torch.randperm(len(bank.label_N), generator=torch.Generator().manual_seed(0))[:_SMALL_BANK]
    small = Features(bank.feature_ND[drawn], bank.label_N[drawn])
    return {f"knn_{when}": knn_top1(small, test), f"knn_whole_{when}": knn_top1(bank, test)}


def figures(runs: dict[str, list[dict[str, float]]], configured: dict[str, str]) -> dict[str, Any]:
    """The JSON's ``race`` from each entry's runs, by seed: means, deviations, and ours over lightly's."""
    rows: dict[str, dict[str, Any]] = {}
    for name, seeds in runs.items():
        values = {key: [run[key] for run in seeds] for key in seeds[0]}
        spread = {key: statistics.stdev(values[key]) for key in _SPREAD} if len(seeds) > 1 else None
        means = {key: statistics.fmean(each) for key, each in values.items()}
        rows[name] = {**means, "spread": spread, "runs": seeds, "configured": configured[name]}
    ratios: dict[str, float] = {}
    for name, prefix, peer, suffix in _PAIRS:
        mine, theirs = rows[name], rows[peer]
        gain = f"{prefix}knn_gain_over_{suffix}"
        ratios |= {
            f"{prefix}samples_per_s_vs_{suffix}": mine["samples_per_s"] / theirs["samples_per_s"],
            gain: 100 * (mine["knn_after"] - theirs["knn_after"]),
            f"{gain}_whole_bank": 100 * (mine["knn_whole_after"] - theirs["knn_whole_after"]),
        }
    return {**ratios, "runners": rows}


def _facts(config: Race, preset: PretrainConfig) -> dict[str, Any]:
    """The settings in the JSON's ``config``."""
    whole = _QUICK_IMAGES if config.quick else "all training pictures"
    same = ("arch", "batch_size", "lr", "sgd_momentum", "weight_decay")
    return {
        "seeds": list(config.seeds),
        "threads": usable_cores(0),
        "knn": {"k": 200, "temperature": 0.1, "bank": _SMALL_BANK, "whole_bank": whole},
        "schedule": "cosine by the share of the wall time gone",
        "clock": "from the arrival of the first batch; kNN does not count",
        "precision": "fp32",
        "recipe": dataclasses.asdict(with_method(preset, "moco").recipe()),
        "mixing": dataclasses.asdict(preset.mixing),
        **_model_settings(preset),
        **{name: getattr(preset, name) for name in same},
    }


def _print(race: dict[str, Any], facts: dict[str, Any]) -> None:
    """A table of all entries, and ours against lightly's."""
    rows = {}
    for name, row in race["runners"].items():
        rate, after = f"{row['samples_per_s']:,.0f}", f"{100 * row['knn_after']:.1f}"
        if row["spread"]:
            rate += f" ± {row['spread']['samples_per_s']:,.0f}"
            after += f" ± {100 * row['spread']['knn_after']:.1f}"
        rows[name] = {
            "samples/s": rate,
            "samples": f"{row['samples']:,.0f}",
            "kNN, %": f"{100 * row['knn_before']:.1f} → {after}",
            "… whole bank": f"{100 * row['knn_whole_before']:.1f} → {100 * row['knn_whole_after']:.1f}",
        }
    print_table(f"Fashion-MNIST, {facts['seconds']:g} s of training on {facts['threads']} cores", rows)
    for name, prefix, peer, suffix in _PAIRS:
        console.print(
            f"{name}: {race[f'{prefix}samples_per_s_vs_{suffix}']:.1f} × the samples/s of {peer}, "
            f"{race[f'{prefix}knn_gain_over_{suffix}']:+.1f} points of kNN"
        )


if __name__ == "__main__":
    cli.program(Race, main)
