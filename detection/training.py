"""One run of a detector: checks, then training, evaluation, result.json."""

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

__all__ = ["launch", "parse", "prepare", "run"]

FORMATS = ("JPEG", "PNG")
"""Formats that pictures of a set may have."""
BEGUN_FROM = "begun_from.json"
"""Beside a run's checkpoints: what it began from."""


class Mapper(DatasetMapper):
    """Detectron2's, for pictures of our FORMATS only: by itself it starts Ghostscript for PostScript."""

    def __call__(self, dataset_dict: dict[str, Any]) -> Any:
        """One picture with its boxes. Raises UnidentifiedImageError for another format."""
        for name in ("file_name", "sem_seg_file_name"):
            if name in dataset_dict:
                Image.open(dataset_dict[name], formats=FORMATS).close()
        return super().__call__(dataset_dict)


class Trainer(DefaultTrainer):
    """Detectron2's trainer, evaluated as the set's own kind wants it, reading nothing that could run code."""

    def resume_or_load(self, resume: bool = True) -> None:
        """Begin from MODEL.WEIGHTS, or go on from the last checkpoint."""
        model = self.checkpointer.model  # type: ignore[has-type, unused-ignore]
        self.checkpointer = weights.Checkpointer(model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        super().resume_or_load(resume)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Detectron2's, with our mapper."""
        return build_detection_train_loader(cfg, mapper=Mapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's, with our mapper."""
        return build_detection_test_loader(cfg, dataset_name, mapper=Mapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> Any:
        """COCO's or VOC's evaluator."""
        if MetadataCatalog.get(dataset_name).evaluator_type == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        folder = output_folder or str(Path(cfg.OUTPUT_DIR) / "inference")
        # Named, so that a detector that finds nothing has figures too, though none are numbers.
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        # The fast one needs Detectron2's compiled part, and promises the same figures.
        return COCOEvaluator(dataset_name, tasks, output_dir=folder, use_fast_impl=False)


def prepare(args: argparse.Namespace) -> None:
    """Check what a run is made of, once, before any of its processes is started.

    Raises FileNotFoundError for files that are missing, ValueError for a config, sets or weights that cannot
    be run, and CheckpointError for weights that cannot be read.
    """
    cfg = configure(args, telling=True)
    check_config(cfg, args)
    train, test = _sets(cfg, args)
    datasets.register((*train, *test))
    datasets.check(train, test, cfg.MODEL.ROI_HEADS.NUM_CLASSES, masks=cfg.MODEL.MASK_ON)
    if resumes(cfg, args):
        _check_begun_from(cfg)
    else:
        weights.check(cfg, whole=args.eval_only)


def _begun_from(cfg: CfgNode) -> dict[str, Any]:
    """What the run in OUTPUT_DIR began from: ``weights``, and ``encoder_sha256`` where the file said it."""
    path = Path(cfg.OUTPUT_DIR) / BEGUN_FROM
    begun: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return begun


def _check_begun_from(cfg: CfgNode) -> None:
    begun, now = _begun_from(cfg).get("encoder_sha256"), weights.said_of_encoder(cfg.MODEL.WEIGHTS)
    if begun and now.get("encoder_sha256", begun) != begun:
        raise ValueError(
            f"{cfg.OUTPUT_DIR} holds a run from another encoder than that of {cfg.MODEL.WEIGHTS}; take "
            "another OUTPUT_DIR"
        )


def _sets(cfg: CfgNode, args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the sets to train and to evaluate on."""
    return () if args.eval_only else tuple(cfg.DATASETS.TRAIN), tuple(cfg.DATASETS.TEST)


def run(args: argparse.Namespace) -> None:
    """Train and evaluate, or evaluate alone, what `prepare` has checked.

    Leaves the figures in result.json, or of an evaluation alone in evaluation.json.

    Raises ValueError if the evaluation gives none.
    """
    cfg = configure(args)
    train, test = _sets(cfg, args)
    datasets.register((*train, *test))
    default_setup(cfg, args)
    if comm.is_main_process() and not args.eval_only and not resumes(cfg, args):
        said = weights.said_of_encoder(cfg.MODEL.WEIGHTS)
        encoder = {name: value for name, value in said.items() if name == "encoder_sha256"}
        write_json(Path(cfg.OUTPUT_DIR) / BEGUN_FROM, {"weights": cfg.MODEL.WEIGHTS, **encoder})
    figures = _evaluated(cfg, args.resume) if args.eval_only else _trained(cfg, args.resume)
    if not comm.is_main_process():
        return
    if not figures:
        raise ValueError(
            f"the evaluation on {test[0]} gave no figures; {cfg.OUTPUT_DIR}/log.txt says why, mend that and "
            "go on with --resume"
        )
    write_result(cfg, args, figures)


def _evaluated(cfg: CfgNode, resume: bool) -> Any:
    model = Trainer.build_model(cfg)
    weights.Checkpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return Trainer.test(cfg, model)


def _trained(cfg: CfgNode, resume: bool) -> Any:
    """Figures after the last iteration, on the main process."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    # It returns figures only where the config has TEST.EXPECTED_RESULTS. Its hook evaluates in any case, at
    # the end of training, which is at once where the last iteration was done before.
    trainer.train()
    return trainer._last_eval_results


def write_result(cfg: CfgNode, args: argparse.Namespace, figures: Mapping[str, Mapping[str, float]]) -> None:
    """Write the figures beside what they are of, null where one is not a number, and tell them."""
    plain = {
        task: {name: value if math.isfinite(value) else None for name, value in row.items()}
        for task, row in figures.items()
    }
    result = {
        "config": Path(args.config_file).stem,
        **({"weights": cfg.MODEL.WEIGHTS} if args.eval_only else _begun_from(cfg)),
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
            told = "  ".join(
                f"{name} {'none' if value is None else f'{value:.2f}'}" for name, value in row.items()
            )
            console.print(f"{task}: {told}  ({path})")
