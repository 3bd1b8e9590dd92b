"""Does masked mixing help? Pretrain and probe every method with several seeds on Fashion-MNIST.

    python -m benchmarks.evidence --json benchmarks/results/evidence.json

All methods have the same encoder, head, queue, schedule and number of epochs (preset ``fashion``). A mixing
method takes longer than MoCo, because it embeds more views of each image. Runs stay in --out; started again,
the program skips finished runs and resumes the unfinished one from its last checkpoint.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.programs import FASHION_PICTURES, fashion_sets, keep_settings, probe, run_python
from benchmarks.run_options import finish_benchmark, keep_full_figures, mean_and_std, print_table
from training import cli
from training.checkpoint import latest
from training.cli import console
from training.files import write_json

RANDOM = "random"
METHODS = ("moco", "erase", "unmix", "mixmask", "both")
PROBES = ("knn_top1", "linear_top1")
_CURVES = ("loss", "loss_clean", "pos_sim", "neg_sim", "feature_std", "acc1")
"""Step metrics that are kept as means over each epoch."""


@dataclass(frozen=True)
class FashionStudy:
    """How much of Fashion-MNIST, how long, and where the figures go."""

    epochs: int = 4
    """Epochs of each training."""
    fashion: int = FASHION_PICTURES
    """Training images of Fashion-MNIST, of 60,000."""
    data: Path = Path("data")
    """Folder of the two compiled sets, made there if they are missing."""
    json: Path | None = None
    """Where the figures go."""

    @property
    def quick(self) -> bool:
        """Whether this is too little for figures."""
        return self.fashion < FASHION_PICTURES or self.epochs < type(self).epochs

    def sets(self) -> tuple[Path, Path]:
        """The training and the test set; raises ValueError if a full run's figures would be lost."""
        keep_full_figures(self.quick, self.json)
        return fashion_sets(console, self.data, self.fashion)


@dataclass(frozen=True)
class Evidence(FashionStudy):
    """Pretrain and probe every method with several seeds on Fashion-MNIST."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of initialisation, order, views and probe."""
    methods: tuple[str, ...] = (RANDOM, *METHODS)
    """What is compared; random is an encoder without training."""
    out: Path = Path("runs/evidence")
    """Folder of the runs; what is finished there is not run again."""

    def __post_init__(self) -> None:
        unknown = set(self.methods) - {RANDOM, *METHODS}
        if unknown or not self.methods or not self.seeds or self.epochs < 1:
            raise ValueError(
                f"methods {self.methods}, seeds {self.seeds}, {self.epochs} epochs: take methods of "
                f"{', '.join((RANDOM, *METHODS))}, at least one seed and one epoch"
            )


def main(config: Evidence) -> dict[str, Any]:
    """Run what is not finished yet, print a table, write the JSON; returns what was written."""
    train, test = config.sets()
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in config.methods}
    # Seed by seed, so that a study that is stopped early has as many seeds of every method.
    order = [(method, seed) for seed in config.seeds for method in config.methods]
    for number, (method, seed) in enumerate(order, start=1):
        console.print(f"\n[bold]run {number} of {len(order)}: {method}, seed {seed}[/]")
        runs[method].append(_run(config, method, seed, train, test))
    evidence: dict[str, dict[str, Any]] = {}
    rows = {}
    for method, done in runs.items():
        found = {name: mean_and_std([run[name] for run in done], 5) for name in PROBES}
        rates = [run["samples_per_s"] for run in done if run["samples_per_s"]]
        knn, linear = (f"{100 * found[name]['mean']:.2f} ± {100 * found[name]['std']:.2f}" for name in PROBES)
        rate = f"{statistics.median(rates):.0f}" if rates else "–"
        rows[method] = {"kNN": knn, "linear": linear, "samples/s": rate, "runs": str(len(done))}
        evidence[method] = {**found, "runs": done}
    print_table("Fashion-MNIST, frozen encoder, top-1 in %, mean ± standard deviation", rows)
    facts = {"epochs": config.epochs, "seeds": config.seeds, "pictures": config.fashion}
    return finish_benchmark("evidence", config.quick, config.json, evidence=evidence, config=facts)


def _run(config: Evidence, method: str, seed: int, train: Path, test: Path) -> dict[str, Any]:
    """Pretrain and probe once, or read the result of an earlier start."""
    out = config.out / f"{method}-{seed}"
    finished = out / "run.json"
    settings = {"method": method, "seed": seed, "epochs": config.epochs, "pictures": config.fashion}
    keep_settings(out, settings)
    if finished.is_file():
        run: dict[str, Any] = json.loads(finished.read_text())
        console.print(f"finished before: {finished}")
        return run
    if not (out / "backbone.safetensors").is_file():
        run_python(
            console,
            *("train_pretrain.py", train, "--preset", "fashion", "--epochs", config.epochs),
            *(("--method", "moco", "--epochs", 0) if method == RANDOM else ("--method", method)),
            *("--seed", seed, "--val", test, "--out", out),
            *(("--resume",) if latest(out) else ()),
        )
    probed = probe(console, train, test, out, seed)
    run = settings | {name: probed[name] for name in PROBES} | _curves(out / "metrics.jsonl")
    write_json(finished, run)
    return run


def _curves(metrics: Path) -> dict[str, Any]:
    """The metrics of a pretraining by epoch, and its median rate."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    curve = []
    for evaluated in (row for row in rows if row["kind"] == "eval"):
        epoch = [row for row in steps if row["epoch"] == evaluated["epoch"] - 1]
        num = [row["step"] - row["first_step"] + 1 for row in epoch]
        means = {name: statistics.fmean([row[name] for row in epoch], num) for name in _CURVES}
        curve.append({name: evaluated[name] for name in ("epoch", "knn_top1", "rankme")} | means)
    rates = [row["samples_per_s"] for row in steps]
    return {"curve": curve, "samples_per_s": round(statistics.median(rates), 1) if rates else None}


if __name__ == "__main__":
    cli.program(Evidence, main)
