"""One run of a detector: checks, then training, evaluation and result.json."""

import argparse
import json
import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, default_setup, launch
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.utils import comm
from PIL import Image

from detection import datasets, weights
from detection.config import check_config, configure, parse, resumes
from training.cli import console
from training.files import write_json

__all__ = ["check_run", "launch", "parse", "train_and_evaluate"]

IMAGE_FORMATS = ("JPEG", "PNG")
"""Image formats that a set may contain."""
BEGUN_FROM = "begun_from.json"
"""File in a run's folder that records its initial weights."""


class Mapper(DatasetMapper):
    """Detectron2's mapper, restricted to IMAGE_FORMATS: Pillow runs Ghostscript on PostScript files."""

    def __call__(self, dataset_dict: dict[str, Any]) -> Any:
        """Read an image with its boxes. Raises UnidentifiedImageError for another format."""
        for name in ("file_name", "sem_seg_file_name"):
            if name in dataset_dict:
                Image.open(dataset_dict[name], formats=IMAGE_FORMATS).close()
        return super().__call__(dataset_dict)


class Trainer(DefaultTrainer):
    """Detectron2's trainer with our mapper and checkpointer, and the evaluator of the test set's kind."""

    def resume_or_load(self, resume: bool = True) -> None:
        """Load MODEL.WEIGHTS, or continue from the last checkpoint."""
        model = self.checkpointer.model  # type: ignore[has-type, unused-ignore]
        self.checkpointer = weights.Checkpointer(model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        super().resume_or_load(resume)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Build Detectron2's loader with our mapper."""
        return build_detection_train_loader(cfg, mapper=Mapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build Detectron2's loader with our mapper."""
        return build_detection_test_loader(cfg, dataset_name, mapper=Mapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> Any:
        """Build COCO's or VOC's evaluator."""
        if MetadataCatalog.get(dataset_name).evaluator_type == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        folder = output_folder or str(Path(cfg.OUTPUT_DIR) / "inference")
        # With task names, a detector that finds nothing gets NaN; without them, it gets no figures at all.
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        # The fast implementation needs Detectron2's compiled part, and gives the same figures.
        return COCOEvaluator(dataset_name, tasks, output_dir=folder, use_fast_impl=False)


def check_run(args: argparse.Namespace) -> None:
    """Check config, sets and weights once, before any process is started.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the config, a set or the weights cannot be used.
        CheckpointError: if the weights cannot be read.
    """
    cfg = configure(args, verbose=True)
    check_config(cfg, args)
    train, test = _register_sets(cfg, args)
    datasets.check_sets(train, test, cfg.MODEL.ROI_HEADS.NUM_CLASSES, masks=cfg.MODEL.MASK_ON)
    if resumes(cfg, args):
        _check_same_encoder(cfg)
    else:
        weights.check_weights(cfg, whole=args.eval_only)


def train_and_evaluate(args: argparse.Namespace) -> None:
    """Train and evaluate, or only evaluate, after :func:`check_run` has checked the arguments.

    Writes the figures to result.json, or to evaluation.json with --eval-only.

    Raises:
        ValueError: if the evaluation gives no figures.
    """
    cfg = configure(args)
    _, test = _register_sets(cfg, args)
    default_setup(cfg, args)
    if comm.is_main_process() and not args.eval_only and not resumes(cfg, args):
        about = weights.read_metadata(cfg.MODEL.WEIGHTS)
        encoder = {name: value for name, value in about.items() if name == "encoder_sha256"}
        write_json(Path(cfg.OUTPUT_DIR) / BEGUN_FROM, {"weights": cfg.MODEL.WEIGHTS, **encoder})
    figures = _evaluate(cfg, args.resume) if args.eval_only else _train(cfg, args.resume)
    if not comm.is_main_process():
        return
    if not figures:
        raise ValueError(
            f"the evaluation on {test[0]} gave no figures; {cfg.OUTPUT_DIR}/log.txt says why, correct that "
            "and continue with --resume"
        )
    write_result(cfg, args, figures)


def write_result(cfg: CfgNode, args: argparse.Namespace, figures: Mapping[str, Mapping[str, float]]) -> None:
    """Write the figures with their settings, and print them. A figure that is not finite becomes null."""
    plain = {
        task: {name: value if math.isfinite(value) else None for name, value in row.items()}
        for task, row in figures.items()
    }
    result = {
        "config": Path(args.config_file).stem,
        **({"weights": cfg.MODEL.WEIGHTS} if args.eval_only else _read_begun_from(cfg)),
        "test": list(cfg.DATASETS.TEST),
        "iterations": cfg.SOLVER.MAX_ITER,
        "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
        "seed": cfg.SEED,
        "figures": plain,
    }
    path = Path(cfg.OUTPUT_DIR) / ("evaluation.json" if args.eval_only else "result.json")
    write_json(path, result)
    for task in ("bbox", "segm"):
        if task in plain:
            row = {name: plain[task][name] for name in ("AP", "AP50", "AP75")}
            line = "  ".join(
                f"{name} {'none' if value is None else f'{value:.2f}'}" for name, value in row.items()
            )
            console.print(f"{task}: {line}  ({path})")


def _register_sets(cfg: CfgNode, args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Register the sets to train and to evaluate on; returns their names."""
    train, test = () if args.eval_only else tuple(cfg.DATASETS.TRAIN), tuple(cfg.DATASETS.TEST)
    datasets.register((*train, *test))
    return train, test


def _read_begun_from(cfg: CfgNode) -> dict[str, Any]:
    """Initial weights of the run in OUTPUT_DIR: ``weights``, and ``encoder_sha256`` where it is known."""
    path = Path(cfg.OUTPUT_DIR) / BEGUN_FROM
    begun: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return begun


def _check_same_encoder(cfg: CfgNode) -> None:
    begun = _read_begun_from(cfg).get("encoder_sha256")
    now = weights.read_metadata(cfg.MODEL.WEIGHTS).get("encoder_sha256", begun)
    if begun and now != begun:
        raise ValueError(
            f"{cfg.OUTPUT_DIR} holds a run from another encoder than the one in {cfg.MODEL.WEIGHTS}; use "
            "another OUTPUT_DIR"
        )


def _evaluate(cfg: CfgNode, resume: bool) -> Any:
    model = Trainer.build_model(cfg)
    weights.Checkpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return Trainer.test(cfg, model)


def _train(cfg: CfgNode, resume: bool) -> Any:
    """Train; returns the figures after the last iteration, on the main process."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    # train() returns figures only if TEST.EXPECTED_RESULTS is set. The evaluation hook always runs at the
    # end of training, also when a resumed run has no iterations left.
    trainer.train()
    return trainer._last_eval_results
