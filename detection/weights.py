"""Reading MODEL.WEIGHTS safely, and checking that they fit the detector."""

from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from detection.config import last_checkpoint
from detection.foreign_files import read_pickled_weights
from training.checkpoint import CheckpointError, read_safely

TOLERANCE_GREY = 0.5
"""Largest difference between the pixel mean or deviation of config and encoder, for pixels in 0 … 255."""

_BACKBONE = ("backbone.", "roi_heads.res5.")
_NEVER_PRETRAINED = ("backbone.fpn_", "roi_heads.res5.norm.")
_METADATA = ("pixel_mean", "pixel_std", "encoder_sha256")


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, restricted to local files and to loading without running code."""

    def _load_file(self, filename: str) -> dict[str, Any]:
        path = Path(filename)
        if path.suffix == ".pkl":
            return read_pickled_weights(path)
        content = read_safely(path)
        if isinstance(content, dict) and isinstance(content.get("model"), dict):
            return content
        if isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values()):
            return {"model": content}
        found = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} has an unknown layout: found {found}; give a file of detection.convert_to_detectron2 or "
            "a detector's checkpoint"
        )

    def get_checkpoint_file(self) -> str:
        """Path of the newest checkpoint in the run's folder. Raises ValueError if it is named elsewhere."""
        return str(last_checkpoint(self.save_dir) or "")


class _KeyRecorder(Checkpointer):
    """Stores the incompatible keys instead of logging them."""

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        self.incompatible = incompatible


def read_metadata(file: str) -> dict[str, Any]:
    """Read what our converter stored in a .pth: pixel_mean, pixel_std and encoder_sha256.

    Returns an empty dictionary for other files. Raises CheckpointError for a file that is damaged or could
    run code.
    """
    if not file.endswith(".pth") or not Path(file).is_file():
        return {}
    content = read_safely(Path(file))
    return {name: content[name] for name in _METADATA if name in content}


def check_weights(cfg: CfgNode, *, whole: bool = False) -> None:
    """Check that MODEL.WEIGHTS fit the detector and its pixel normalisation.

    Args:
        cfg: the detector's config.
        whole: whether the weights must be a whole detector, not only its encoder.

    Raises:
        ValueError: if they do not.
        CheckpointError: if the file cannot be read.
    """
    file = cfg.MODEL.WEIGHTS
    if file:
        _check_pixels(cfg, read_metadata(file))
        _check_keys(cfg, file, whole)
    elif whole:
        raise ValueError(
            "MODEL.WEIGHTS is empty, there is nothing to evaluate; give a trained detector's file"
        )


def _check_pixels(cfg: CfgNode, metadata: dict[str, Any]) -> None:
    for name, given in (("pixel_mean", cfg.MODEL.PIXEL_MEAN), ("pixel_std", cfg.MODEL.PIXEL_STD)):
        expected = [round(value, 3) for value in metadata.get(name, given)]
        if any(abs(a - b) > TOLERANCE_GREY for a, b in zip(expected, given, strict=True)):
            option = f"MODEL.{name.upper()}"
            raise ValueError(
                f"{option} is {list(given)}, the encoder of {cfg.MODEL.WEIGHTS} was trained with {expected}; "
                f"give {option} '{expected}'"
            )


def _check_keys(cfg: CfgNode, file: str, whole: bool) -> None:
    on_cpu = cfg.clone()
    on_cpu.defrost()
    on_cpu.MODEL.DEVICE = "cpu"
    checkpointer = _KeyRecorder(build_model(on_cpu))
    checkpointer.load(file, checkpointables=[])
    absent = checkpointer.incompatible.missing_keys
    if whole and absent:
        raise ValueError(
            f"{file} lacks {len(absent)} tensors of the detector, the first are {absent[:3]}; to evaluate "
            "give a trained detector's file, such as OUTPUT_DIR/model_final.pth"
        )
    missing = [key for key in absent if key.startswith(_BACKBONE) and not key.startswith(_NEVER_PRETRAINED)]
    # Files of published converters hold a classifier, and frozen norms have no num_batches_tracked.
    unexpected = [
        key
        for key in checkpointer.incompatible.unexpected_keys
        if not key.startswith("stem.fc.") and not key.endswith(".num_batches_tracked")
    ]
    for keys, problem in (
        (missing, f"of the backbone's tensors are not in {file}"),
        (unexpected, f"tensors of {file} have no place in the detector"),
    ):
        if keys:
            raise ValueError(
                f"{len(keys)} {problem}, the first are {keys[:3]}; MODEL.RESNETS.DEPTH is "
                f"{cfg.MODEL.RESNETS.DEPTH}, give the one that detection.convert_to_detectron2 printed, or "
                "convert the encoder again"
            )
