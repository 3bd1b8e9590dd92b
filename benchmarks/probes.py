"""How far the fast probe is from the published one, on encoders of `make evidence`.

    python -m benchmarks.probes --json benchmarks/results/probes.json

Each encoder is probed twice on all of Fashion-MNIST: by the published protocol, with random crops through
the encoder in each of 100 epochs and lr 30, and from features cached once, with every learning rate and
weight decay of ``--cached``. Runs stay in --out; started again, the program resumes the unfinished one. With
--json a full run also rewrites the table in docs/evaluation.md.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence import FashionStudy
from benchmarks.marked_block import MarkedBlock
from benchmarks.programs import keep_settings, run_python
from benchmarks.run_options import finish_benchmark
from training import cli
from training.cli import console
from training.export import fingerprint, load_backbone

PAGE = Path("docs/evaluation.md")
BLOCK = MarkedBlock("<!-- probes: begin -->", "<!-- probes: end -->")


@dataclass(frozen=True)
class Probes(FashionStudy):
    """Compare the fast probe with the published one."""

    epochs: int = 100
    """Epochs of both protocols."""
    encoders: tuple[str, ...] = ("random-0", "both-0")
    """Names of runs of the evidence."""
    evidence: Path = Path("runs/evidence")
    """Folder of the evidence's runs."""
    out: Path = Path("runs/probes")
    """Folder of the probes."""


def main(config: Probes) -> dict[str, Any]:
    """Probe what is not probed yet, print the table, write the JSON; returns what was written.

    Raises:
        ValueError: if an encoder is missing.
    """
    train, test = config.sets()
    rows = {name: _row(config, name, train, test) for name in config.encoders}
    facts = {"epochs": config.epochs, "pictures": config.fashion}
    result = finish_benchmark("probes", config.quick, config.json, probes=rows, config=facts)
    console.print(block(result))
    if config.json and not config.quick:
        BLOCK.rewrite(PAGE, block(result))
    return result


def _row(config: Probes, name: str, train: Path, test: Path) -> dict[str, Any]:
    """The figures of one encoder; both probes are run unless an earlier start has finished them."""
    backbone, out = config.evidence / name / "backbone.safetensors", config.out / name
    if not backbone.is_file():
        raise ValueError(f"there is no {backbone}; run `make evidence` first")
    encoder = fingerprint(load_backbone(backbone).state)
    keep_settings(out, {"encoder_sha256": encoder, "epochs": config.epochs, "pictures": config.fashion})
    results = []
    for file, options in (("cached.json", ("--cached",)), ("result.json", ("--no-knn", "--resume"))):
        if not (out / file).is_file():
            run_python(
                console,
                *("train_lincls.py", train, "--val", test, "--pretrained", backbone, "--out", out),
                *("--epochs", config.epochs, *options),
            )
        results.append(json.loads((out / file).read_text()))
    cached, published = results
    cached["settings"] = [
        {key: setting[key] for key in ("lr", "weight_decay", "top1")} for setting in cached["linear_settings"]
    ]
    names = ("linear_top1", "linear_lr", "linear_weight_decay", "seconds", "settings")
    return {
        "published": {name: published[name] for name in ("linear_top1", "linear_best_top1", "seconds")},
        "cached": {name: cached[name] for name in names},
    }


def block(result: Mapping[str, Any]) -> str:
    """The table in Markdown, with a line break before and after it."""
    lines = [
        "| encoder | published | cached, lr 30 | cached, best setting | difference | published | cached |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    gaps = []
    for name, row in result["probes"].items():
        published, cached = row["published"], row["cached"]
        # The cached probe with the published learning rate and weight decay.
        same = next(s["top1"] for s in cached["settings"] if s["lr"] == 30 and s["weight_decay"] == 0)
        gaps.append(100 * (cached["linear_top1"] - published["linear_top1"]))
        lines.append(
            f"| {name} | {100 * published['linear_top1']:.2f} % | {100 * same:.2f} % "
            f"| {100 * cached['linear_top1']:.2f} % "
            f"(lr {cached['linear_lr']:g}, weight decay {cached['linear_weight_decay']:g}) "
            f"| {gaps[-1]:+.2f} | {published['seconds']:,.0f} s | {cached['seconds']:,.0f} s |"
        )
    config, where = result["config"], result["environment"]
    caption = (
        f"Fashion-MNIST, {config['pictures']:,} pictures, {config['epochs']} epochs of both, encoders of "
        f"`make evidence`, one seed; {where['processor']}, {where['cores']} cores. The fast way's answer "
        f"lies {min(gaps):+.2f} … {max(gaps):+.2f} points from the published one."
    )
    return "\n" + "\n".join([*lines, "", caption]) + "\n"


if __name__ == "__main__":
    cli.program(Probes, main)
