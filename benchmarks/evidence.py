"""Does masked mixing help? Every method, several seeds, on Fashion-MNIST, each run pretrained and probed.

    python -m benchmarks.evidence --json benchmarks/results/evidence.json

Every method has the same encoder, head, queue, schedule and number of epochs (preset ``fashion``), so a
mixing method takes longer than MoCo: it embeds more views of each picture. Runs stay in --out; stopped at any
moment and started again, it goes on with the run it was in, from that run's last checkpoint.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.environment import environment, write_figures
from benchmarks.programs import FASHION_PICTURES, fashion_sets, keep_settings, probe, run_python
from benchmarks.run_options import RunOptions
from training import cli
from training.checkpoint import latest
from training.cli import console
from training.files import write_json

RANDOM = "random"
METHODS = ("moco", "erase", "unmix", "mixmask", "both")
PROBES = ("knn_top1", "linear_top1")
_CURVES = ("loss", "loss_clean", "pos_sim", "neg_sim", "feature_std", "acc1")
"""Metrics of the steps of which a curve is kept, as means over an epoch."""


@dataclass(frozen=True)
class Evidence:
    """Pretrain and probe every method with several seeds on Fashion-MNIST."""

    epochs: int = 4
    """Passes of each pretraining."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initialisation, order, views and probe."""
    methods: tuple[str, ...] = (RANDOM, *METHODS)
    """What is compared; random is the encoder as it is initialised."""
    out: Path = Path("runs/evidence")
    """Folder of the runs; what is finished there is not run again."""
    data: Path = Path("data")
    """Folder of the two compiled sets, made there if they are missing."""
    fashion: int = FASHION_PICTURES
    """Training pictures of Fashion-MNIST, of 60,000."""
    json: Path | None = None
    """Where the figures go."""

    @property
    def quick(self) -> bool:
        """Whether this is too little for figures."""
        return self.fashion < FASHION_PICTURES or self.epochs < type(self).epochs

    def __post_init__(self) -> None:
        unknown = set(self.methods) - {RANDOM, *METHODS}
        if unknown or not self.methods or not self.seeds or self.epochs < 1:
            raise ValueError(
                f"methods {self.methods}, seeds {self.seeds}, {self.epochs} epochs: take methods of "
                f"{', '.join((RANDOM, *METHODS))}, at least one seed and one epoch"
            )


def main(config: Evidence) -> dict[str, Any]:
    """Run what is not finished yet, print a table, write the JSON; returns what was written."""
    RunOptions(quick=config.quick, json=config.json).keep_full_figures()
    train, test = fashion_sets(console, config.data, config.fashion)
    # Seed by seed, so that whoever stops early has seen all methods equally often.
    wanted = [(method, seed) for seed in config.seeds for method in config.methods]
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in config.methods}
    for number, (method, seed) in enumerate(wanted, start=1):
        console.print(f"\n[bold]run {number} of {len(wanted)}: {method}, seed {seed}[/]")
        runs[method].append(_run(config, method, seed, train, test))
    evidence = {method: _summary(done) for method, done in runs.items()}
    result = {
        "benchmark": "evidence",
        "quick": config.quick,
        "evidence": evidence,
        "config": {"epochs": config.epochs, "seeds": config.seeds, "pictures": config.fashion},
        "environment": environment(),
    }
    _print(evidence)
    if config.json:
        write_figures(config.json, result, console)
    return result


def _run(config: Evidence, method: str, seed: int, train: Path, test: Path) -> dict[str, Any]:
    """Pretrain and probe once, or read what an earlier start left."""
    out = config.out / f"{method}-{seed}"
    finished = out / "run.json"
    asked = {"method": method, "seed": seed, "epochs": config.epochs, "pictures": config.fashion}
    keep_settings(out, asked)
    if finished.is_file():
        run: dict[str, Any] = json.loads(finished.read_text())
        console.print(f"finished before: {finished}")
        return run
    mixing = ("--method", "moco", "--epochs", 0) if method == RANDOM else ("--method", method)
    backbone = out / "backbone.safetensors"
    if not backbone.is_file():
        run_python(
            console,
            *("train_pretrain.py", train, "--preset", "fashion", "--epochs", config.epochs, *mixing),
            *("--seed", seed, "--val", test, "--out", out),
            *(("--resume",) if latest(out) else ()),
        )
    probed = probe(console, train, test, out, seed)
    run = asked | {name: probed[name] for name in PROBES} | _curves(out / "metrics.jsonl")
    write_json(finished, run)
    return run


def _curves(metrics: Path) -> dict[str, Any]:
    """How a pretraining went, epoch by epoch, and how fast."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    curve: list[dict[str, float]] = []
    for evaluated in (row for row in rows if row["kind"] == "eval"):
        epoch = [row for row in steps if row["epoch"] == evaluated["epoch"] - 1]
        num = [row["step"] - row["first_step"] + 1 for row in epoch]
        means = {
            name: sum(n * row[name] for n, row in zip(num, epoch, strict=True)) / sum(num) for name in _CURVES
        }
        curve.append({name: evaluated[name] for name in ("epoch", "knn_top1", "rankme")} | means)
    rates = [row["samples_per_s"] for row in steps]
    return {"curve": curve, "samples_per_s": round(statistics.median(rates), 1) if rates else None}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of one method's runs, and the runs."""
    return {**{name: _mean_and_spread([run[name] for run in runs]) for name in PROBES}, "runs": runs}


def _mean_and_spread(values: list[float]) -> dict[str, float]:
    """The sample's standard deviation is 0 for a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 5), "std": round(spread, 5)}


def _print(evidence: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(title="Fashion-MNIST, frozen encoder, top-1 in %, mean ± standard deviation")
    for heading in ("method", "kNN", "linear", "samples/s", "runs"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, summary in evidence.items():
        rates = [run["samples_per_s"] for run in summary["runs"] if run["samples_per_s"]]
        table.add_row(
            method,
            *(f"{100 * summary[name]['mean']:.2f} ± {100 * summary[name]['std']:.2f}" for name in PROBES),
            f"{statistics.median(rates):.0f}" if rates else "–",
            str(len(summary["runs"])),
        )
    console.print(table)


if __name__ == "__main__":
    cli.program(Evidence, main)
