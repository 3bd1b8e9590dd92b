"""What every evaluation loads first: a pretrained encoder, and its training and test sets."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from models.encoders import build_encoder
from pipelines import Backend, open_set
from pipelines.recipe import Recipe, evaluation
from training.evaluate import check_labels
from training.export import Backbone, load_backbone
from training.precision import PrecisionName


@dataclass(frozen=True)
class PretrainedConfig:
    """Evaluate a pretrained encoder."""

    data: tyro.conf.Positional[Path]
    """Labelled training set: compiled, a folder of class folders, or a folder that holds train/ and val/."""
    pretrained: Path
    """Checkpoint, backbone.safetensors or published .pth.tar. `train_pretrain.py --epochs 0` exports an
    untrained encoder for comparison."""
    val: Path | None = None
    """Labelled test set; by default DATA/val."""
    out: Annotated[Path, tyro.conf.arg(aliases=["--exp-path"])] = dataclasses.field(kw_only=True)
    """Folder of the run."""
    arch: Annotated[str | None, tyro.conf.arg(aliases=["-a"])] = None
    """Encoder; needed if the file does not name it; must agree with the file if it does."""
    small_stem: bool | None = None
    """3 × 3 first convolution without max-pool; needed if the file does not say."""
    crop_px: int | None = None
    """Side of a view; by default as in the encoder's training, or 224 if the file does not say."""
    seed: int = 0
    """Seed of the classifier, the order and the crops."""
    precision: PrecisionName = "auto"
    """Number format of the encoder; the classifier is always in fp32."""
    backend: Backend = "auto"
    """Decoder of the training set, as in train_pretrain.py; the format of the test set determines its
    decoder."""
    num_threads: int = 0
    """Decoding threads; 0 uses all cores."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""

    def sets(self) -> tuple[Path, Path]:
        """The training and the test set. Raises ValueError if there is no test set."""
        if self.val is not None:
            return self.data, self.val
        train, val = self.data / "train", self.data / "val"
        if not (train.is_dir() and val.is_dir()):
            raise ValueError(
                f"no test set: give --val, or a folder with train/ and val/ in place of {self.data}"
            )
        return train, val


@dataclass(frozen=True)
class LabelledSets:
    """A training and a test set of the same classes."""

    train: Path
    val: Path
    num_classes: int
    val_fingerprint: str
    """Fingerprint of the test set's content."""


def labelled_sets(config: PretrainedConfig) -> LabelledSets:
    """The sets of a config. Raises ValueError unless all images have labels, of the same classes in both."""
    train, val = config.sets()
    sets = [open_set(path) for path in (train, val)]
    names, others = (images.classes for images in sets)
    if names and others and names != others:
        first = next((pair for pair in zip(names, others, strict=False) if pair[0] != pair[1]), None)
        detail = f"{first[0]!r} in place of {first[1]!r}" if first else "one set has more"
        raise ValueError(
            f"the {len(names)} classes of {train} and the {len(others)} of {val} differ: {detail}; "
            "make both sets from folders of the same classes"
        )
    labels = [torch.from_numpy(images.labels(np.arange(images.count))) for images in sets]
    num_classes = len(names) or (int(labels[0].max()) + 1 if len(labels[0]) else 0)
    for path, label_N in zip((train, val), labels, strict=True):
        check_labels(str(path), label_N, num_classes)
    return LabelledSets(train, val, num_classes, sets[1].fingerprint)


@dataclass(frozen=True)
class Pretrained:
    """An encoder from a file, and the view for evaluating it."""

    encoder: nn.Module
    feature_dim: int
    view: Recipe
    """Recipe of the evaluation's view."""
    backbone: Backbone
    """Content of the file; values that its meta lacks are filled in."""


def load_pretrained(config: PretrainedConfig, device: torch.device) -> Pretrained:
    """Load the encoder to a device, in channels_last.

    Raises:
        ValueError: if the file and the flags disagree on the architecture, or neither names it.
        CheckpointError: for a file that cannot be read.
    """
    backbone = load_backbone(config.pretrained)
    meta = backbone.meta
    arch = config.arch or meta.arch
    if arch is None:
        raise ValueError(f"{config.pretrained} does not name its architecture; give --arch")
    if meta.arch not in (None, arch):
        raise ValueError(f"{config.pretrained} holds a {meta.arch}, --arch says {arch}; leave out --arch")
    small_stem = bool(meta.small_stem) if config.small_stem is None else config.small_stem
    encoder, feature_dim = build_encoder(arch, small_stem=small_stem)
    if differences := _state_differences(encoder.state_dict(), backbone.state):
        raise ValueError(
            f"{config.pretrained} is not a {arch}{' with the small stem' if small_stem else ''}: "
            f"{differences}; check --arch and --small-stem"
        )
    encoder.load_state_dict(backbone.state)
    view = evaluation(
        Recipe(
            crop_px=config.crop_px or meta.crop_px or Recipe.crop_px,
            center_share=meta.eval_center_share or Recipe.center_share,
            mean=meta.mean or Recipe.mean,
            std=meta.std or Recipe.std,
        )
    )
    encoder.to(device)
    encoder.to(memory_format=torch.channels_last)
    complete = dataclasses.replace(
        meta,
        arch=arch,
        feature_dim=feature_dim,
        small_stem=small_stem,
        crop_px=view.crop_px,
        eval_center_share=view.center_share,
        mean=view.mean,
        std=view.std,
    )
    return Pretrained(encoder, feature_dim, view, backbone._replace(meta=complete))


def _state_differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How a state dict differs from the expected one, in words; empty if it does not."""
    shapes = (
        f"{name} {tuple(found[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    )
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another shape": list(shapes),
    }
    return "; ".join(
        f"{len(names)} of its tensors are {kind}, such as {', '.join(names[:2])}"
        for kind, names in kinds.items()
        if names
    )
