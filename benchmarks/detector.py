"""Does pretraining help to find objects? A detector from pretrained and from random weights, on drawn shapes.

    python -m benchmarks.detector --json benchmarks/results/detector.json

A ResNet-18 is pretrained by MixMask on pictures of shapes, whose labels it does not see; then a Mask R-CNN
with a feature pyramid is trained on a few labelled ones, from it and from random weights, and evaluated on
others every --eval-every iterations. Runs stay in --out; started again, it goes on with the one it was in.
With --json the table in docs/evaluation.md is written anew.
"""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, tell_on_page
from benchmarks.marked_block import MarkedBlock
from benchmarks.programs import is_compiled, keep_settings, run_python
from benchmarks.run_options import RunOptions
from benchmarks.shapes import CLASSES, write_coco
from training import cli
from training.checkpoint import latest
from training.cli import console
from training.export import fingerprint, load_backbone

PAGE = Path("docs/evaluation.md")
BLOCK = MarkedBlock("<!-- detector: begin -->", "<!-- detector: end -->")
STARTS = ("random", "pretrained")
SIDE_PX = 128
_AMOUNTS = ("unlabelled", "epochs", "labelled", "test", "iterations")
"""Settings of which less is too little for figures."""
_SEED_OF_TRAIN, _SEED_OF_TEST = 10_000_000, 20_000_000  # pictures that nothing else has drawn


@dataclass(frozen=True)
class Detector:
    """Train a small detector from pretrained and from random weights."""

    unlabelled: int = 6000
    """Pictures of the pretraining."""
    epochs: int = 15
    """Passes over them."""
    labelled: int = 200
    """Pictures of the detector's training."""
    test: int = 200
    """Pictures it is evaluated on."""
    iterations: int = 800
    """Steps of the detector's training, of four pictures."""
    eval_every: int = 100
    """Steps between evaluations."""
    seeds: tuple[int, ...] = (1,)
    """Of the detector's head, its order and its proposals."""
    out: Path = Path("runs/detector")
    """Folder of pictures and runs."""
    json: Path | None = None
    """Where the figures go."""

    @property
    def quick(self) -> bool:
        """Whether this is too little for figures."""
        less = any(getattr(self, name) < getattr(type(self), name) for name in _AMOUNTS)
        return less or len(self.seeds) < len(type(self).seeds)

    def __post_init__(self) -> None:
        if self.iterations % self.eval_every or not self.seeds:
            raise ValueError(
                f"{self.iterations} iterations, an evaluation every {self.eval_every}, seeds {self.seeds}: "
                "take iterations that end with an evaluation, and at least one seed"
            )


def main(config: Detector) -> dict[str, Any]:
    """Run what is not finished yet, print the table, write the JSON; returns what was written."""
    RunOptions(quick=config.quick, json=config.json).keep_full_figures()
    sets = draw_sets(config)
    weights = {"random": "", "pretrained": str(pretrain(config))}
    runs: dict[str, list[list[dict[str, float]]]] = {start: [] for start in STARTS}
    for seed in config.seeds:
        for start in STARTS:
            runs[start].append(train(config, weights[start], f"{start}-{seed}", seed, *sets))
    result = {
        "benchmark": "detector",
        "quick": config.quick,
        "detector": {start: {"runs": curves, "mean": _mean(curves)} for start, curves in runs.items()},
        "config": {
            **{name: getattr(config, name) for name in (*_AMOUNTS, "eval_every", "seeds")},
            "side_px": SIDE_PX,
        },
        "environment": environment(),
    }
    tell_on_page(result, block(result), BLOCK, PAGE, config.json, console)
    return result


def draw_sets(config: Detector) -> tuple[str, str]:
    """Names of the labelled training and the test set, drawn if they are not there."""
    names = []
    for split, count, seed in (
        ("train", config.labelled, _SEED_OF_TRAIN),
        ("test", config.test, _SEED_OF_TEST),
    ):
        folder = config.out / f"{split}-{count}"
        file = folder / "instances.json"
        if not file.is_file():
            with console.status(f"drawing {count} pictures into {folder}"):
                write_coco(folder, count, SIDE_PX, seed)
        names.append(f"coco:{file}:{folder}")
    return names[0], names[1]


def pretrain(config: Detector) -> Path:
    """Weights for Detectron2 of an encoder pretrained on unlabelled pictures."""
    pictures, out = config.out / f"unlabelled-{config.unlabelled}", config.out / "pretrained"
    keep_settings(out, {"unlabelled": config.unlabelled, "epochs": config.epochs})
    compiled, weights = pictures.with_suffix(".beton"), out / "detectron2.pth"
    if not is_compiled(compiled, config.unlabelled):
        with console.status(f"drawing {config.unlabelled} pictures into {pictures}"):
            write_coco(pictures, config.unlabelled, SIDE_PX, seed=0)
        (pictures / "instances.json").unlink()
        run_python(console, "-m", "dataset_tools", "convert", pictures, compiled, "--overwrite")
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


def train(
    config: Detector, weights: str, name: str, seed: int, train_set: str, test_set: str
) -> list[dict[str, float]]:
    """One detector's AP after every few iterations."""
    out = config.out / name
    encoder = weights and fingerprint(load_backbone(Path(weights).with_name("backbone.safetensors")).state)
    wanted = ("labelled", "test", "iterations", "eval_every")
    keep_settings(out, {"encoder_sha256": encoder} | {name: getattr(config, name) for name in wanted})
    if not (out / "result.json").is_file():
        at = [str(config.iterations * share // 10) for share in (7, 9)]
        words = {
            "MODEL.WEIGHTS": weights,
            "OUTPUT_DIR": out,
            "SEED": seed,
            "DATASETS.TRAIN": f"('{train_set}',)",
            "DATASETS.TEST": f"('{test_set}',)",
            "DATALOADER.NUM_WORKERS": 0,
            "INPUT.MIN_SIZE_TRAIN": f"({SIDE_PX},)",
            "INPUT.MIN_SIZE_TEST": SIDE_PX,
            "MODEL.RESNETS.DEPTH": 18,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
            "MODEL.FPN.OUT_CHANNELS": 64,
            "MODEL.ROI_BOX_HEAD.FC_DIM": 256,
            "MODEL.ROI_MASK_HEAD.CONV_DIM": 64,
            "MODEL.ANCHOR_GENERATOR.SIZES": "[[8], [16], [32], [64], [128]]",
            "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 500,
            "MODEL.RPN.POST_NMS_TOPK_TRAIN": 200,
            "MODEL.RPN.PRE_NMS_TOPK_TEST": 200,
            "MODEL.RPN.POST_NMS_TOPK_TEST": 100,
            "MODEL.ROI_HEADS.NUM_CLASSES": len(CLASSES),
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64,
            "SOLVER.IMS_PER_BATCH": 4,
            "SOLVER.BASE_LR": 0.02,
            "SOLVER.MAX_ITER": config.iterations,
            "SOLVER.STEPS": f"({', '.join(at)})",
            "SOLVER.WARMUP_ITERS": min(50, config.iterations - 1),
            "SOLVER.CHECKPOINT_PERIOD": config.eval_every,
            "TEST.EVAL_PERIOD": config.eval_every,
            "TEST.PRECISE_BN.NUM_ITER": 20,
            "TEST.DETECTIONS_PER_IMAGE": 20,
        }
        run_python(
            console,
            *("-m", "detection.train_net", "--resume"),
            *("--config-file", "detection/configs/coco_R_50_FPN_1x.yaml"),
            *(word for pair in words.items() for word in pair),
        )
    rows = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    # Rows are counted from 0, but that after the last step is not.
    every = config.eval_every
    evaluated = {-(-row["iteration"] // every) * every: row for row in rows if "bbox/AP" in row}
    return [
        {"iteration": done, **{f"{task}_AP": _ap(row[f"{task}/AP"]) for task in ("bbox", "segm")}}
        for done, row in sorted(evaluated.items())
    ]


def _ap(value: float) -> float:
    """Detectron2 says that it is not a number where nothing is found."""
    return 0.0 if math.isnan(value) else value


def _mean(curves: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Mean and standard deviation over runs, after each evaluation."""
    found = []
    for rows in zip(*curves, strict=True):
        row = {"iteration": rows[0]["iteration"]}
        for name in ("bbox_AP", "segm_AP"):
            values = [one[name] for one in rows]
            row[name] = round(statistics.fmean(values), 3)
            row[f"{name}_std"] = round(statistics.stdev(values) if len(values) > 1 else 0.0, 3)
        found.append(row)
    return found


def block(result: Mapping[str, Any]) -> str:
    """The table in Markdown, with the line breaks that part it from the comments."""
    means = {start: result["detector"][start]["mean"] for start in STARTS}
    num_seeds = len(result["config"]["seeds"])
    lines = [
        "| iterations | box AP, random | box AP, pretrained | mask AP, random | mask AP, pretrained |",
        "|---:|---:|---:|---:|---:|",
    ]
    for rows in zip(*means.values(), strict=True):
        cells = (_cell(row, name, num_seeds) for name in ("bbox_AP", "segm_AP") for row in rows)
        lines.append(f"| {rows[0]['iteration']:.0f} | " + " | ".join(cells) + " |")
    config, where = result["config"], result["environment"]
    runs = "one seed" if num_seeds == 1 else f"mean ± standard deviation over {num_seeds} seeds"
    said = (
        f"Mask R-CNN, ResNet-18 with a feature pyramid, {config['labelled']} labelled pictures of "
        f"{config['side_px']} px with drawn shapes, four a step, evaluated on {config['test']} others; "
        f"{runs}. Pretrained: MixMask, {config['epochs']} epochs on {config['unlabelled']:,} pictures "
        f"without labels. {where['processor']}, {where['cores']} cores."
    )
    return "\n" + "\n".join([*lines, "", said]) + "\n"


def _cell(row: Mapping[str, float], name: str, num_seeds: int) -> str:
    return f"{row[name]:.1f}" + (f" ± {row[f'{name}_std']:.1f}" if num_seeds > 1 else "")


if __name__ == "__main__":
    cli.program(Detector, main)
