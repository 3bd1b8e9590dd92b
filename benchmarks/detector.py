"""Does pretraining help to find objects? A detector from pretrained and from random weights, on drawn shapes.

    python -m benchmarks.detector --json benchmarks/results/detector.json

MixMask pretrains a ResNet-18 on images of shapes without their labels. Then a Mask R-CNN (detector.yaml) is
trained on a few labelled images, once from these weights and once from random ones, and evaluated on other
images every --eval-every iterations. Runs stay in --out; started again, the program resumes the unfinished
one. With --json a full run also rewrites the table in docs/evaluation.md.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.programs import has_compiled, keep_settings, run_python
from benchmarks.run_options import finish_with_table, keep_full_figures, mean_and_std
from benchmarks.shapes import write_coco
from training import cli
from training.checkpoint import latest
from training.cli import console
from training.export import fingerprint, load_backbone

STARTS = ("random", "pretrained")
SIDE_PX = 128
_AMOUNTS = ("unlabelled", "epochs", "labelled", "test", "iterations")
"""Settings that must not be below their defaults in a full run."""
_APS = {"bbox_AP": "bbox/AP", "segm_AP": "segm/AP"}
"""Our names of the average precisions, and Detectron2's."""
_SEEDS = {"train": 10_000_000, "test": 20_000_000}
"""First seeds of the drawn images, so that no image is in two sets."""


@dataclass(frozen=True)
class Detector:
    """Train a small detector from pretrained and from random weights."""

    unlabelled: int = 6000
    """Images of the pretraining."""
    epochs: int = 15
    """Epochs of the pretraining."""
    labelled: int = 200
    """Images of the detector's training."""
    test: int = 200
    """Images it is evaluated on."""
    iterations: int = 800
    """Steps of the detector's training, of four images."""
    eval_every: int = 100
    """Steps between evaluations."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of the detector's head, order and proposals."""
    out: Path = Path("runs/detector")
    """Folder of images and runs."""
    json: Path | None = None
    """Where the figures go."""

    @property
    def quick(self) -> bool:
        """Whether this is too little for figures."""
        return any(getattr(self, name) < getattr(type(self), name) for name in _AMOUNTS)

    def __post_init__(self) -> None:
        if self.iterations % self.eval_every or not self.seeds:
            raise ValueError(
                f"{self.iterations} iterations, an evaluation every {self.eval_every}, seeds {self.seeds}: "
                "take iterations that end with an evaluation, and at least one seed"
            )


def main(config: Detector) -> dict[str, Any]:
    """Run what is not finished yet, print the table, write the JSON; returns what was written."""
    keep_full_figures(config.quick, config.json)
    sets = [_draw(config, "train", config.labelled), _draw(config, "test", config.test)]
    weights = {"random": "", "pretrained": str(pretrain(config))}
    runs: dict[str, list[list[dict[str, float]]]] = {start: [] for start in STARTS}
    for seed in config.seeds:
        for start in STARTS:
            runs[start].append(train(config, weights[start], config.out / f"{start}-{seed}", seed, sets))
    facts = {name: getattr(config, name) for name in (*_AMOUNTS, "eval_every", "seeds")}
    facts["side_px"] = SIDE_PX
    detector = {start: {"runs": curves, "mean": _mean(curves)} for start, curves in runs.items()}
    return finish_with_table("detector", config.quick, config.json, detector=detector, config=facts)


def _draw(config: Detector, split: str, count: int) -> str:
    """The name of a labelled set for `detection.datasets`; the set is drawn if it is missing."""
    folder = config.out / f"{split}-{count}"
    file = folder / "instances.json"
    if not file.is_file():
        with console.status(f"drawing {count} images into {folder}"):
            write_coco(folder, count, SIDE_PX, _SEEDS[split])
    return f"coco:{file}:{folder}"


def pretrain(config: Detector) -> Path:
    """Detectron2 weights of an encoder pretrained on unlabelled images."""
    images, out = config.out / f"unlabelled-{config.unlabelled}", config.out / "pretrained"
    keep_settings(out, {"unlabelled": config.unlabelled, "epochs": config.epochs})
    compiled, weights = images.with_suffix(".beton"), out / "detectron2.pth"
    if not has_compiled(compiled, config.unlabelled):
        with console.status(f"drawing {config.unlabelled} images into {images}"):
            write_coco(images, config.unlabelled, SIDE_PX, seed=0).unlink()
        run_python(console, "-m", "dataset_tools", "convert", images, compiled, "--overwrite")
    if not (out / "backbone.safetensors").is_file():
        run_python(
            console,
            *("train_pretrain.py", compiled, "--arch", "resnet18", "--crop-px", 32, "--grid-size", 4),
            *("--batch-size", 128, "--bn-splits", 4, "--moco-k", 2048, "--moco-m", 0.99, "--moco-t", 0.1),
            *("--lr", 0.03, "--wd", 5e-4, "--crop-min", 0.4),
            *("--epochs", config.epochs, "--knn-every-epochs", 3, "--out", out),
            *(("--resume",) if latest(out) else ()),
        )
    if not weights.is_file():
        run_python(console, "-m", "detection.convert_to_detectron2", out / "backbone.safetensors", weights)
    return weights


def train(config: Detector, weights: str, out: Path, seed: int, sets: list[str]) -> list[dict[str, float]]:
    """AP of one detector after each evaluation; ``sets`` are the names of its training and test set."""
    encoder = weights and fingerprint(load_backbone(Path(weights).with_name("backbone.safetensors")).state)
    keep_settings(
        out,
        {"encoder_sha256": encoder, "labelled": config.labelled, "test": config.test}
        | {"iterations": config.iterations, "eval_every": config.eval_every},
    )
    if not (out / "result.json").is_file():
        options = {
            "MODEL.WEIGHTS": weights,
            "OUTPUT_DIR": out,
            "SEED": seed,
            "DATASETS.TRAIN": f"('{sets[0]}',)",
            "DATASETS.TEST": f"('{sets[1]}',)",
            "SOLVER.MAX_ITER": config.iterations,
            "SOLVER.STEPS": f"({config.iterations * 7 // 10}, {config.iterations * 9 // 10})",
            "SOLVER.WARMUP_ITERS": min(50, config.iterations - 1),
            "SOLVER.CHECKPOINT_PERIOD": config.eval_every,
            "TEST.EVAL_PERIOD": config.eval_every,
        }
        run_python(
            console,
            *("-m", "detection.train_net", "--resume", "--config-file", "benchmarks/detector.yaml"),
            *(word for pair in options.items() for word in pair),
        )
    rows = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    # Rows count iterations from 0, except the one after the last step.
    every = config.eval_every
    evaluated = {-(-row["iteration"] // every) * every: row for row in rows if "bbox/AP" in row}
    return [
        # Detectron2 reports NaN where nothing is found.
        {"iteration": done} | {name: 0.0 if math.isnan(row[key]) else row[key] for name, key in _APS.items()}
        for done, row in sorted(evaluated.items())
    ]


def _mean(curves: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Mean and standard deviation over runs, after each evaluation."""
    found = []
    for rows in zip(*curves, strict=True):
        row = {"iteration": rows[0]["iteration"]}
        for name in _APS:
            row[name], row[f"{name}_std"] = mean_and_std([one[name] for one in rows], 3).values()
        found.append(row)
    return found


if __name__ == "__main__":
    cli.program(Detector, main)
