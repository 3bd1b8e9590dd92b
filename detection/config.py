"""The command line and config of a detector's run, made to fit this machine."""

import argparse
from pathlib import Path

import torch
import yaml  # type: ignore[import-untyped]
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser

from detection.foreign_files import config_files
from detection.heads import Res5ROIHeadsExtraNorm
from training.cli import console

_WITH_A_NORM = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


def parse(argv: list[str], description: str | None) -> argparse.Namespace:
    """Detectron2's own command line."""
    parser: argparse.ArgumentParser = default_argument_parser(description)
    return parser.parse_args(argv)


def configure(args: argparse.Namespace, *, telling: bool = False) -> CfgNode:
    """The config of a command line, made to fit this machine.

    telling: say what was made to fit.
    Raises FileNotFoundError for files that are missing, and ValueError for what is no config, or would run
    code of others or fetch files.
    """
    if not args.config_file:
        raise ValueError("give --config-file, such as detection/configs/pascal_voc_R_50_C4_24k.yaml")
    config_files(Path(args.config_file))
    cfg = get_cfg()
    try:
        cfg.merge_from_file(args.config_file, allow_unsafe=False)
        cfg.merge_from_list(args.opts)
    except (KeyError, AssertionError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"the config is refused: {error}; {args.config_file} must be YAML with Detectron2's options, and "
            "further options pairs, such as SOLVER.MAX_ITER 1000"
        ) from error
    file = "" if resumes(cfg, args) else cfg.MODEL.WEIGHTS
    if "://" in file:
        raise ValueError(f"MODEL.WEIGHTS is {file}; fetch the file, and give its path")
    if file and not Path(file).is_file():
        raise FileNotFoundError(f"there is no {file}; check the path, MODEL.WEIGHTS")
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu":
        use_plain_bn(cfg, telling=telling)
    cfg.freeze()
    return cfg


def use_plain_bn(cfg: CfgNode, *, telling: bool) -> None:
    """Put BatchNorm in place of SyncBN, which only GPUs have."""
    changed = [part for part in _WITH_A_NORM if getattr(cfg.MODEL, part).NORM == "SyncBN"]
    for part in changed:
        getattr(cfg.MODEL, part).NORM = "BN"
    if changed and telling:
        console.print(
            f"on a CPU: plain BatchNorm in place of SyncBN in {', '.join(changed)}; statistics are of "
            f"{cfg.SOLVER.IMS_PER_BATCH} pictures"
        )


def resumes(cfg: CfgNode, args: argparse.Namespace) -> bool:
    """Whether a run goes on from a checkpoint of its own, in place of MODEL.WEIGHTS.

    Raises as `last_checkpoint` does.
    """
    return bool(args.resume) and last_checkpoint(cfg.OUTPUT_DIR) is not None


def last_checkpoint(folder: str) -> Path | None:
    """The checkpoint that a run's folder names as its last, None if it names none.

    Raises ValueError if that is not one of Detectron2's own in the same folder.
    """
    note = Path(folder) / "last_checkpoint"
    if not note.is_file():
        return None
    name = note.read_text(errors="replace").strip()
    if Path(name).name != name or not name.endswith(".pth"):
        raise ValueError(
            f"{note} names {name!r}, a run's own checkpoint is a .pth in the same folder; write the name of "
            "the newest there, or leave --resume out"
        )
    return note.with_name(name)


def check_config(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Raise ValueError for options that cannot go together, or not on this machine."""
    gpus, num_processes = torch.cuda.device_count(), args.num_gpus * args.num_machines
    if not 1 <= args.num_gpus <= max(gpus, 1):
        told = f"give 1 … {gpus}" if gpus else "leave it out on a CPU"
        raise ValueError(f"--num-gpus is {args.num_gpus}, this machine shows {gpus}; {told}")
    if args.num_machines < 1:
        raise ValueError(f"--num-machines is {args.num_machines}; give at least 1")
    if cfg.SOLVER.IMS_PER_BATCH % num_processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {num_processes} processes cannot "
            "share evenly; give a multiple"
        )
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS is on, and Detectron2 reads proposals from pickles, which can run code; "
            "set it to False, and the detector makes its own"
        )
    depth, head = cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.ROI_HEADS.NAME
    if not (cfg.DATASETS.TRAIN or args.eval_only):
        raise ValueError("DATASETS.TRAIN is empty; name at least one set, see detection/datasets.py")
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(
            f"DATASETS.TEST has {len(cfg.DATASETS.TEST)} sets, {list(cfg.DATASETS.TEST)}; give exactly one, "
            "and evaluate on others with --eval-only"
        )
    if depth in (18, 34) and head.startswith("Res5ROIHeads"):
        raise ValueError(
            f"MODEL.RESNETS.DEPTH is {depth}, and {head} always builds the bottleneck blocks of 50 and more; "
            "take detection/configs/coco_R_50_FPN_1x.yaml with MODEL.RESNETS.RES2_OUT_CHANNELS 64"
        )
    if depth in (18, 34) and cfg.MODEL.RESNETS.RES2_OUT_CHANNELS != 64:
        raise ValueError(
            f"MODEL.RESNETS.RES2_OUT_CHANNELS is {cfg.MODEL.RESNETS.RES2_OUT_CHANNELS}, and "
            f"MODEL.RESNETS.DEPTH {depth} has 64; give MODEL.RESNETS.RES2_OUT_CHANNELS 64"
        )
    if head == Res5ROIHeadsExtraNorm.__name__ and not cfg.MODEL.RESNETS.NORM:
        raise ValueError(
            f"MODEL.RESNETS.NORM is empty, but {head} ends in a norm; give SyncBN or BN, or take "
            "MODEL.ROI_HEADS.NAME Res5ROIHeads"
        )
