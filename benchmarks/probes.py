"""How far the fast probe lies from the published one, on encoders of `make evidence`.

    python -m benchmarks.probes --json benchmarks/results/probes.json

Each encoder is probed twice on all of Fashion-MNIST: by the published protocol (random crops through the
encoder in each of 100 epochs, lr 30) and from features cached once, with every learning rate and weight decay
that ``--cached`` tries. Runs stay in --out; started again, it goes on with the one it was in. With --json the
table in docs/evaluation.md is written anew.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, tell_on_page
from benchmarks.marked_block import MarkedBlock
from benchmarks.programs import FASHION_PICTURES, fashion_sets, keep_settings, run_python
from benchmarks.run_options import RunOptions
from training import cli
from training.cli import console
from training.export import fingerprint, load_backbone

PAGE = Path("docs/evaluation.md")
BLOCK = MarkedBlock("<!-- probes: begin -->", "<!-- probes: end -->")
EPOCHS = 100


@dataclass(frozen=True)
class Probes:
    """Compare the fast probe with the published one."""

    encoders: tuple[str, ...] = ("random-0", "both-0")
    """Runs of the evidence."""
    evidence: Path = Path("runs/evidence")
    """Folder of the evidence's runs."""
    out: Path = Path("runs/probes")
    """Folder of the probes."""
    data: Path = Path("data")
    """Folder of the two compiled sets, made there if they are missing."""
    fashion: int = FASHION_PICTURES
    """Training pictures of Fashion-MNIST, of 60,000."""
    epochs: int = EPOCHS
    """Of both protocols."""
    json: Path | None = None
    """Where the figures go."""

    @property
    def quick(self) -> bool:
        """Whether this is too little for figures."""
        return self.fashion < FASHION_PICTURES or self.epochs < EPOCHS


def main(config: Probes) -> dict[str, Any]:
    """Probe what is not probed yet, print the table, write the JSON; returns what was written.

    Raises ValueError if an encoder is not there.
    """
    RunOptions(quick=config.quick, json=config.json).keep_full_figures()
    train, test = fashion_sets(console, config.data, config.fashion)
    rows = {}
    for name in config.encoders:
        backbone = config.evidence / name / "backbone.safetensors"
        if not backbone.is_file():
            raise ValueError(f"there is no {backbone}; run `make evidence` first")
        rows[name] = _row(*_probed(config, config.out / name, backbone, train, test))
    result = {
        "benchmark": "probes",
        "quick": config.quick,
        "probes": rows,
        "config": {"epochs": config.epochs, "pictures": config.fashion},
        "environment": environment(),
    }
    tell_on_page(result, block(result), BLOCK, PAGE, config.json, console)
    return result


def _probed(config: Probes, out: Path, backbone: Path, train: Path, test: Path) -> list[dict[str, Any]]:
    """Results of the fast and of the published probe of one encoder, made now if an earlier start has not."""
    encoder = fingerprint(load_backbone(backbone).state)
    keep_settings(out, {"encoder_sha256": encoder, "epochs": config.epochs, "pictures": config.fashion})
    results = []
    for file, more in (("cached.json", ("--cached",)), ("result.json", ("--no-knn", "--resume"))):
        if not (out / file).is_file():
            run_python(
                console,
                *("train_lincls.py", train, "--val", test, "--pretrained", backbone, "--out", out),
                *("--epochs", config.epochs, *more),
            )
        results.append(json.loads((out / file).read_text()))
    return results


def _row(cached: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
    settings = [
        {name: setting[name] for name in ("lr", "weight_decay", "top1")}
        for setting in cached["linear_settings"]
    ]
    return {
        "published": {name: published[name] for name in ("linear_top1", "linear_best_top1", "seconds")},
        "cached": {
            **{name: cached[name] for name in ("linear_top1", "linear_lr", "linear_weight_decay", "seconds")},
            "settings": settings,
        },
    }


def _at_lr_30(cached: Mapping[str, Any]) -> float:
    """The cached probe's top-1 with the published rate and weight decay."""
    settings = cached["settings"]
    return float(next(one["top1"] for one in settings if one["lr"] == 30 and one["weight_decay"] == 0))


def block(result: Mapping[str, Any]) -> str:
    """The table in Markdown, with the line breaks that part it from the comments."""
    lines = [
        "| encoder | published | cached, lr 30 | cached, best setting | difference | published | cached |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    gaps = []
    for name, row in result["probes"].items():
        published, cached = row["published"], row["cached"]
        gaps.append(100 * (cached["linear_top1"] - published["linear_top1"]))
        lines.append(
            f"| {name} | {100 * published['linear_top1']:.2f} % | {100 * _at_lr_30(cached):.2f} % "
            f"| {100 * cached['linear_top1']:.2f} % "
            f"(lr {cached['linear_lr']:g}, weight decay {cached['linear_weight_decay']:g}) "
            f"| {gaps[-1]:+.2f} | {published['seconds']:,.0f} s | {cached['seconds']:,.0f} s |"
        )
    config, where = result["config"], result["environment"]
    said = (
        f"Fashion-MNIST, {config['pictures']:,} pictures, {config['epochs']} epochs of both, encoders of "
        f"`make evidence`, one seed; {where['processor']}, {where['cores']} cores. The fast way's answer "
        f"lies {min(gaps):+.2f} … {max(gaps):+.2f} points from the published one."
    )
    return "\n" + "\n".join([*lines, "", said]) + "\n"


if __name__ == "__main__":
    cli.program(Probes, main)
