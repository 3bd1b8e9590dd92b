"""Reads the config of a detector from the command line, adapts it to this machine, and checks it."""

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from detectron2.config import CfgNode, configurable, get_cfg
from detectron2.engine import default_argument_parser
from detectron2.layers import get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads

from detection.foreign_files import config_files
from training.cli import console

_PARTS_WITH_NORM = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """The C4 detector's head with a norm after res5, as in MoCo's transfer (arXiv 1911.05722).

    Pretrained features are not normalised after res5; ``res5.norm`` does that.
    """

    @configurable
    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)

    @classmethod
    def from_config(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
        """Arguments of ``__init__`` from a config: those of Res5ROIHeads, with the norm added to res5."""
        parts: dict[str, Any] = super().from_config(cfg, input_shape)
        channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8
        parts["res5"].add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return parts


def parse(argv: list[str], description: str | None) -> argparse.Namespace:
    """Parse a command line with Detectron2's own parser."""
    parser: argparse.ArgumentParser = default_argument_parser(description)
    return parser.parse_args(argv)


def configure(args: argparse.Namespace, *, verbose: bool = False) -> CfgNode:
    """Build the config of a command line and adapt it to this machine.

    Args:
        args: from :func:`parse`.
        verbose: print what was adapted.

    Raises:
        FileNotFoundError: if the config or the weights are missing.
        ValueError: if the config is invalid, or would run foreign code or download files.
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
            "options on the command line must be pairs, such as SOLVER.MAX_ITER 1000"
        ) from error
    weights = "" if resumes(cfg, args) else cfg.MODEL.WEIGHTS
    if "://" in weights:
        raise ValueError(f"MODEL.WEIGHTS is {weights}; download the file and give its local path")
    if weights and not Path(weights).is_file():
        raise FileNotFoundError(f"there is no {weights}; check the path in MODEL.WEIGHTS")
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu":
        _use_plain_batchnorm(cfg, verbose)
    cfg.freeze()
    return cfg


def _use_plain_batchnorm(cfg: CfgNode, verbose: bool) -> None:
    """Replace SyncBN, which needs a GPU."""
    changed = [part for part in _PARTS_WITH_NORM if getattr(cfg.MODEL, part).NORM == "SyncBN"]
    for part in changed:
        getattr(cfg.MODEL, part).NORM = "BN"
    if changed and verbose:
        console.print(
            f"on a CPU: plain BatchNorm in place of SyncBN in {', '.join(changed)}; statistics are over "
            f"{cfg.SOLVER.IMS_PER_BATCH} images"
        )


def resumes(cfg: CfgNode, args: argparse.Namespace) -> bool:
    """Whether a run continues from its own checkpoint instead of MODEL.WEIGHTS.

    Raises ValueError as :func:`last_checkpoint` does.
    """
    return bool(args.resume) and last_checkpoint(cfg.OUTPUT_DIR) is not None


def last_checkpoint(folder: str) -> Path | None:
    """The last checkpoint of a run, as named by the file ``last_checkpoint``; None without that file.

    Raises:
        ValueError: if the name is not that of a .pth file in the same folder.
    """
    note = Path(folder) / "last_checkpoint"
    if not note.is_file():
        return None
    name = note.read_text(errors="replace").strip()
    if Path(name).name != name or not name.endswith(".pth"):
        raise ValueError(
            f"{note} names {name!r}, but a run's own checkpoint is a .pth in the same folder; write the name "
            "of the newest checkpoint into that file, or omit --resume"
        )
    return note.with_name(name)


def check_config(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Raise ValueError for options that cannot be combined, or that this machine cannot run."""
    _check_processes(cfg, args)
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS is on, but Detectron2 reads proposals from pickles, which can run code; "
            "set it to False, so that the detector computes its own proposals"
        )
    if not (cfg.DATASETS.TRAIN or args.eval_only):
        raise ValueError("DATASETS.TRAIN is empty; name at least one set, see detection/datasets.py")
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(
            f"DATASETS.TEST has {len(cfg.DATASETS.TEST)} sets, {list(cfg.DATASETS.TEST)}; give exactly one, "
            "and evaluate on others with --eval-only"
        )
    _check_resnet(cfg)


def _check_processes(cfg: CfgNode, args: argparse.Namespace) -> None:
    gpus, num_processes = torch.cuda.device_count(), args.num_gpus * args.num_machines
    if not 1 <= args.num_gpus <= max(gpus, 1):
        advice = f"give 1 … {gpus}" if gpus else "omit it on a CPU"
        raise ValueError(f"--num-gpus is {args.num_gpus}, this machine has {gpus}; {advice}")
    if args.num_machines < 1:
        raise ValueError(f"--num-machines is {args.num_machines}; give at least 1")
    if cfg.SOLVER.IMS_PER_BATCH % num_processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {num_processes} processes cannot "
            "share evenly; give a multiple"
        )


def _check_resnet(cfg: CfgNode) -> None:
    resnets, head = cfg.MODEL.RESNETS, cfg.MODEL.ROI_HEADS.NAME
    if resnets.DEPTH in (18, 34) and head.startswith("Res5ROIHeads"):
        raise ValueError(
            f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}, but {head} always builds bottleneck blocks, as "
            "ResNets from 50 on; use detection/configs/coco_R_50_FPN_1x.yaml with "
            "MODEL.RESNETS.RES2_OUT_CHANNELS 64"
        )
    if resnets.DEPTH in (18, 34) and resnets.RES2_OUT_CHANNELS != 64:
        raise ValueError(
            f"MODEL.RESNETS.RES2_OUT_CHANNELS is {resnets.RES2_OUT_CHANNELS}, but a ResNet-"
            f"{resnets.DEPTH} has 64; give MODEL.RESNETS.RES2_OUT_CHANNELS 64"
        )
    if head == Res5ROIHeadsExtraNorm.__name__ and not resnets.NORM:
        raise ValueError(
            f"MODEL.RESNETS.NORM is empty, but {head} ends in a norm; give SyncBN or BN, or set "
            "MODEL.ROI_HEADS.NAME to Res5ROIHeads"
        )
