"""The whole way once: sample pictures → compiled sets → pretraining → probe → loader figures → preview.

    make demo

Every step is one of the house's own programs, run as a user would run it. Made data stays in data/ and is
used again; the run's files lie in runs/demo, summary.json and preview.png among them.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.environment import environment
from benchmarks.peers.contract import OURS, TORCHVISION_PIL
from benchmarks.programs import FASHION_PICTURES, fashion_sets, is_compiled, probe, run_python
from training import cli
from training.cli import console
from training.files import write_json

_KEYS = ("knn_top1", "linear_top1")


@dataclass(frozen=True)
class Demo:
    """Show the whole way, from pictures to a probed encoder."""

    out: Path = Path("runs/demo")
    """Folder of the run; an earlier demo there is replaced."""
    data: Path = Path("data")
    """Folder of the two sample sets."""
    photographs: int = 2000
    """Pictures in the set of photographs."""
    fashion: int = FASHION_PICTURES
    """Training pictures of Fashion-MNIST, of 60,000."""
    epochs: int = 2
    """Passes of the pretraining over Fashion-MNIST."""
    loader_seconds: float = 3.0
    """Length of one turn of a loader; there are six turns for each of two."""


def main(config: Demo) -> None:
    """Run the demo; see the top of this file."""
    start = time.perf_counter()
    for earlier in ("pretrain", "random"):
        shutil.rmtree(config.out / earlier, ignore_errors=True)
    files = config.data / "photographs"
    photographs = config.data / "photographs.beton"

    _banner("1  Sample sets: photographs cut from installed packages, and Fashion-MNIST")
    if not is_compiled(photographs, config.photographs):
        run_python(
            console,
            *("-m", "dataset_tools", "photographs", files, "--count", config.photographs, "--overwrite"),
        )
        run_python(console, "-m", "dataset_tools", "convert", files / "train", photographs, "--overwrite")
    train, test = fashion_sets(console, config.data, config.fashion)
    console.print(f"{photographs}, {train} and {test} are there")

    _banner("2  Pretraining with MixMask on Fashion-MNIST, labels unseen")
    pretrain = config.out / "pretrain"
    run = ("train_pretrain.py", train, "--preset", "fashion")
    run_python(console, *run, "--out", pretrain, "--epochs", config.epochs)
    # The same encoder before its first step, to compare with.
    run_python(console, *run, "--out", config.out / "random", "--epochs", 0)

    _banner("3  Probing: nearest neighbours and a linear classifier on frozen features")
    probes = {}
    for name, folder in (("random", config.out / "random"), ("mixmask", pretrain)):
        probes[name] = probe(console, train, test, folder)

    _banner("4  Loading the photographs at 224 px, beside torchvision")
    figures = config.out / "loader.json"
    run_python(
        console,
        *("-m", "benchmarks.loader", "--data", config.data, "--pictures", config.photographs),
        *("--parts", "pass-through-recipe", "--peers", "torchvision-pil"),
        *("--seconds", config.loader_seconds, "--batch-size", 32, "--json", figures),
    )
    rates = json.loads(figures.read_text())["tables"]["pass_through"]["recipe"]

    _banner("5  What the loader makes of the photographs")
    preview = config.out / "preview.png"
    run_python(console, "-m", "dataset_tools", "preview", photographs, preview)

    summary = {
        **{f"{key}_{name}": probes[name][key] for key in _KEYS for name in probes},
        "loader_samples_per_s": rates[OURS]["median"],
        "torchvision_samples_per_s": rates[TORCHVISION_PIL]["median"],
        "data_wait_fraction": _data_wait_fraction(pretrain / "metrics.jsonl"),
        "knn_k": probes["mixmask"]["knn_k"],
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment(),
    }
    path = config.out / "summary.json"
    write_json(path, summary)
    _print(summary)
    console.print(f"figures: {path}\npicture: {preview}")
    console.print("next, with your own pictures: make convert DATA=<folder>")
    if config == Demo(out=config.out, data=config.data):
        worse = [key for key in _KEYS if summary[f"{key}_mixmask"] <= summary[f"{key}_random"]]
        if worse:
            raise ValueError(f"the pretrained encoder does not beat the random one in {' and '.join(worse)}")


def _banner(title: str) -> None:
    console.print(f"\n[bold]{title}[/]")


def _data_wait_fraction(metrics: Path) -> float:
    """Share of the pretraining's time spent waiting for data, over all steps but those of the first row.

    The first row holds the first batch, whose time is the compiler's.
    """
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps: list[dict[str, float]] = [row for row in rows if row["kind"] == "step"][1:]
    if not steps:
        raise ValueError(f"{metrics} has too few rows to tell the waiting time; train for longer")
    num = [row["step"] - row["first_step"] + 1 for row in steps]
    time_s = [n / row["samples_per_s"] for n, row in zip(num, steps, strict=True)]
    waited = [t * row["wait_percent"] / 100 for t, row in zip(time_s, steps, strict=True)]
    return sum(waited) / sum(time_s)


def _print(summary: dict[str, Any]) -> None:
    table = Table(title="Fashion-MNIST, frozen encoder")
    for heading in ("top-1", "random encoder", "pretrained with MixMask"):
        table.add_column(heading, justify="left" if heading == "top-1" else "right")
    for key, name in zip(_KEYS, (f"kNN (k = {summary['knn_k']})", "linear"), strict=True):
        table.add_row(name, *(f"{100 * summary[f'{key}_{which}']:.1f} %" for which in ("random", "mixmask")))
    console.print("\n", table)
    ours, theirs = summary["loader_samples_per_s"], summary["torchvision_samples_per_s"]
    console.print(
        f"loader {ours:.0f} samples/s, torchvision {theirs:.0f} samples/s on the same pictures: "
        f"{ours / theirs:.1f} ×; {100 * summary['data_wait_fraction']:.1f} % of the pretraining was "
        f"waiting for data; {summary['seconds']:.0f} s in all"
    )


if __name__ == "__main__":
    cli.program(Demo, main)
