"""The whole workflow once: sample sets → pretraining → probes → loader figures → preview.

    make demo

Every step runs one of the project's programs as a user would. The sets stay in data/ and are reused.
runs/demo receives the run's files, summary.json and preview.png.
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
from benchmarks.programs import FASHION_PICTURES, fashion_sets, has_compiled, probe, run_python
from training import cli
from training.cli import console
from training.files import write_json

_METRICS = {"knn_top1": "kNN", "linear_top1": "linear"}


@dataclass(frozen=True)
class Demo:
    """Show the whole workflow, from images to a probed encoder."""

    out: Path = Path("runs/demo")
    """Folder of the run; an earlier demo there is replaced."""
    data: Path = Path("data")
    """Folder of the sample sets."""
    photographs: int = 2000
    """Images in the set of photographs."""
    fashion: int = FASHION_PICTURES
    """Training images of Fashion-MNIST, of 60,000."""
    epochs: int = 2
    """Passes of the pretraining over Fashion-MNIST."""
    loader_seconds: float = 3.0
    """Length of one measurement of a loader; each of the two loaders is measured six times."""


def main(config: Demo) -> None:
    """Run the demo. Raises ValueError if a step fails, or if pretraining did not improve the encoder."""
    start = time.perf_counter()
    _banner("1  Sample sets: photographs cut from installed packages, and Fashion-MNIST")
    photographs, train, test = _make_sets(config)
    _banner("2  Pretraining with MixMask on Fashion-MNIST, without its labels")
    encoders = _pretrain(config, train)
    _banner("3  Probing: nearest neighbours and a linear classifier on frozen features")
    probes = {name: probe(console, train, test, folder) for name, folder in encoders.items()}
    _banner("4  Loading the photographs at 224 px, compared with torchvision")
    rates = _measure_loader(config)
    _banner("5  Views and mixtures of the photographs")
    preview = config.out / "preview.png"
    run_python(console, "-m", "dataset_tools", "preview", photographs, preview)

    summary: dict[str, Any] = {
        **{f"{metric}_{name}": probes[name][metric] for metric in _METRICS for name in probes},
        "loader_samples_per_s": rates[OURS]["median"],
        "torchvision_samples_per_s": rates[TORCHVISION_PIL]["median"],
        "data_wait_fraction": _data_wait_fraction(encoders["mixmask"] / "metrics.jsonl"),
        "knn_k": probes["mixmask"]["knn_k"],
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment(),
    }
    path = config.out / "summary.json"
    write_json(path, summary)
    _print_summary(summary)
    console.print(f"figures: {path}\npreview: {preview}")
    console.print("next, with your own images: make convert DATA=<folder>")
    if config == Demo(out=config.out, data=config.data):
        worse = [name for name in _METRICS if summary[f"{name}_mixmask"] <= summary[f"{name}_random"]]
        if worse:
            raise ValueError(f"the pretrained encoder does not beat the random one in {' and '.join(worse)}")


def _banner(title: str) -> None:
    console.print(f"\n[bold]{title}[/]")


def _make_sets(config: Demo) -> tuple[Path, Path, Path]:
    """Compile the sets that do not exist: photographs, and Fashion-MNIST's training and test set."""
    files = config.data / "photographs"
    photographs = config.data / "photographs.beton"
    if not has_compiled(photographs, config.photographs):
        count = ("--count", config.photographs)
        run_python(console, "-m", "dataset_tools", "photographs", files, *count, "--overwrite")
        run_python(console, "-m", "dataset_tools", "convert", files / "train", photographs, "--overwrite")
    train, test = fashion_sets(console, config.data, config.fashion)
    console.print(f"sets: {photographs}, {train}, {test}")
    return photographs, train, test


def _pretrain(config: Demo, train: Path) -> dict[str, Path]:
    """Pretrain an encoder, and save the same encoder before its first step; returns both runs' folders."""
    folders = {"random": config.out / "random", "mixmask": config.out / "pretrain"}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
    command = ("train_pretrain.py", train, "--preset", "fashion")
    run_python(console, *command, "--out", folders["mixmask"], "--epochs", config.epochs)
    run_python(console, *command, "--out", folders["random"], "--epochs", 0)
    return folders


def _measure_loader(config: Demo) -> dict[str, dict[str, float]]:
    """Measure our loader and torchvision's with MoCo v2's recipe; returns samples/s by loader."""
    figures = config.out / "loader.json"
    run_python(
        console,
        *("-m", "benchmarks.loader", "--data", config.data, "--pictures", config.photographs),
        *("--parts", "pass-through-recipe", "--peers", "torchvision-pil"),
        *("--seconds", config.loader_seconds, "--batch-size", 32, "--json", figures),
    )
    rates: dict[str, dict[str, float]] = json.loads(figures.read_text())["tables"]["pass_through"]["recipe"]
    return rates


def _data_wait_fraction(metrics: Path) -> float:
    """Share of the pretraining's time spent waiting for data, without the steps of the first row.

    The first row includes the first batch; most of its time is compilation.
    """
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps: list[dict[str, float]] = [row for row in rows if row["kind"] == "step"][1:]
    if not steps:
        raise ValueError(f"{metrics} has too few rows to compute the waiting time; train for longer")
    num = [row["step"] - row["first_step"] + 1 for row in steps]
    time_s = [n / row["samples_per_s"] for n, row in zip(num, steps, strict=True)]
    waited = [t * row["wait_percent"] / 100 for t, row in zip(time_s, steps, strict=True)]
    return sum(waited) / sum(time_s)


def _print_summary(summary: dict[str, Any]) -> None:
    table = Table(title="Fashion-MNIST, frozen encoder")
    for heading in ("top-1", "random encoder", "pretrained with MixMask"):
        table.add_column(heading, justify="left" if heading == "top-1" else "right")
    for metric, name in _METRICS.items():
        label = f"{name} (k = {summary['knn_k']})" if name == "kNN" else name
        values = (summary[f"{metric}_{encoder}"] for encoder in ("random", "mixmask"))
        table.add_row(label, *(f"{100 * value:.1f} %" for value in values))
    console.print("\n", table)
    ours, theirs = summary["loader_samples_per_s"], summary["torchvision_samples_per_s"]
    console.print(
        f"loader {ours:.0f} samples/s, torchvision {theirs:.0f} samples/s on the same images: "
        f"{ours / theirs:.1f} ×; {100 * summary['data_wait_fraction']:.1f} % of the pretraining was "
        f"waiting for data; {summary['seconds']:.0f} s in all"
    )


if __name__ == "__main__":
    cli.program(Demo, main)
