"""How far the fast probe is from the published one, on encoders of `make evidence`.

    python -m benchmarks.probes --json benchmarks/results/probes.json

Each encoder is probed twice on all of Fashion-MNIST: by the published protocol, with random crops through
the encoder in each of 100 epochs and lr 30, and from features cached once, with every learning rate and
weight decay of ``--cached``. Runs stay in --out; started again, the program resumes the unfinished one. With
--json a full run also rewrites the table in docs/evaluation.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence import FashionStudy
from benchmarks.programs import keep_settings, run_python
from benchmarks.run_options import finish_with_table
from training import cli
from training.cli import console
from training.export import fingerprint, load_backbone


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
    return finish_with_table("probes", config.quick, config.json, probes=rows, config=facts)


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


if __name__ == "__main__":
    cli.program(Probes, main)
