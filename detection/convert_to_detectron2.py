"""Convert a pretrained encoder to weights for Detectron2.

    python -m detection.convert_to_detectron2 runs/mixmask/backbone.safetensors runs/mixmask/detectron2.pth

INPUT is one of our checkpoints or safetensors files, or a published .pth.tar. It must hold a ResNet-18, -34,
-50, -101 or -152 without the small stem. OUTPUT ends with .pth, or with .pkl for the format of the published
converter. If a tensor cannot be converted, nothing is written. A .pth also stores the mean and standard
deviation of the encoder's pixels, if INPUT has them; detection.train_net compares them with its config. Train
a detector with
    python -m detection.train_net --config-file detection/configs/coco_R_50_C4_2x.yaml MODEL.WEIGHTS OUTPUT
"""

import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torchvision.models import get_model

from training import cli
from training.checkpoint import save_tensors
from training.cli import console
from training.export import BackboneMeta, fingerprint, load_backbone
from training.files import write_atomically

DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
"""Architectures that are the same in torchvision and Detectron2, with their MODEL.RESNETS.DEPTH."""

_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_RULES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"conv1\.weight", r"stem.conv1.weight"),
        (rf"bn1\.{_NORM}", r"stem.conv1.norm.\1"),
        (r"layer([1-4])\.(\d+)\.conv([1-3])\.weight", r"res<\1>.\2.conv\3.weight"),
        (rf"layer([1-4])\.(\d+)\.bn([1-3])\.{_NORM}", r"res<\1>.\2.conv\3.norm.\4"),
        (r"layer([1-4])\.(\d+)\.downsample\.0\.weight", r"res<\1>.\2.shortcut.weight"),
        (rf"layer([1-4])\.(\d+)\.downsample\.1\.{_NORM}", r"res<\1>.\2.shortcut.norm.\3"),
    )
]


@dataclass(frozen=True)
class Conversion:
    """Input and output of the conversion."""

    input: tyro.conf.Positional[Path]
    """Checkpoint, backbone.safetensors or published .pth.tar."""
    output: tyro.conf.Positional[Path]
    """A .pth or .pkl file for MODEL.WEIGHTS."""


def main(config: Conversion) -> None:
    """Convert an encoder.

    Raises:
        ValueError: if OUTPUT has another suffix, or Detectron2 cannot build the encoder.
    """
    if config.output.suffix not in (".pth", ".pkl"):
        raise ValueError(
            f"{config.output} ends with neither .pth nor .pkl; Detectron2 recognises the format by the suffix"
        )
    backbone = load_backbone(config.input)
    state, depth = to_detectron2(backbone.state, backbone.meta.arch)
    about: dict[str, Any] = {
        "__author__": "maskmix",
        # With this, Detectron2 looks for res5 in the backbone or in a C4 model's heads, as the config
        # requires.
        "matching_heuristics": True,
        "encoder_sha256": fingerprint(backbone.state),
        **_pixel_statistics(backbone.meta),
    }
    if config.output.suffix == ".pkl":
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        write_atomically(config.output, lambda file: pickle.dump({"model": arrays, **about}, file))
    else:
        save_tensors(config.output, {"model": state, **about})
    narrow = ", MODEL.RESNETS.RES2_OUT_CHANNELS 64 and the FPN config" if depth < 50 else ""
    console.print(
        f"{config.input}: {len(state)} tensors of a ResNet-{depth} → {config.output}  "
        f"(for MODEL.WEIGHTS, with MODEL.RESNETS.DEPTH {depth}{narrow})"
    )


def to_detectron2(state: dict[str, Tensor], arch: str | None) -> tuple[dict[str, Tensor], int]:
    """Rename a torchvision ResNet's tensors to Detectron2's names.

    Args:
        state: the encoder's tensors, without the classifier.
        arch: the architecture that the file names; None if it names none.

    Returns:
        The renamed tensors, and the depth for MODEL.RESNETS.DEPTH.

    Raises:
        ValueError: for another architecture, a small stem, or keys that are missing or unknown.
    """
    known = ", ".join(DEPTHS)
    if arch is not None and arch not in DEPTHS:
        raise ValueError(f"the file holds a {arch}, which Detectron2 cannot build; give one of {known}")
    depth = _depth(state)
    if depth is None:
        raise ValueError(f"the tensors match none of {known}, which Detectron2 can build")
    if arch is not None and DEPTHS[arch] != depth:
        raise ValueError(f"the file names {arch}, but its tensors are a ResNet-{depth}'s; export it again")
    if state["conv1.weight"].shape != (64, 3, 7, 7):
        raise ValueError(
            f"the first convolution is {tuple(state['conv1.weight'].shape)}, Detectron2's stem has "
            "(64, 3, 7, 7); an encoder with the small stem cannot be used there"
        )
    return {new: state[name] for name, new in detectron2_keys(state).items()}, depth


def detectron2_keys(names: Iterable[str]) -> dict[str, str]:
    """Map torchvision's key names to Detectron2's. Raises ValueError if a name has no counterpart."""
    renamed, unknown = {}, []
    for name in names:
        rule = next(((match, new) for pattern, new in _RULES if (match := pattern.fullmatch(name))), None)
        if rule is None:
            unknown.append(name)
            continue
        match, new = rule
        # Detectron2 counts the stem as the first stage.
        renamed[name] = re.sub(r"<(\d)>", lambda stage: str(int(stage[1]) + 1), match.expand(new))
    if unknown:
        raise ValueError(
            f"{len(unknown)} keys of the backbone have no place in Detectron2's ResNet, the first are "
            f"{unknown[:3]}; it must be a torchvision ResNet without its fc"
        )
    return renamed


def _depth(state: dict[str, Tensor]) -> int | None:
    """Depth of the ResNet with these names and shapes, whatever the stem's; None if there is none."""
    found = {name: tensor.shape for name, tensor in state.items()}
    for arch, depth in DEPTHS.items():
        with torch.device("meta"):
            expected = get_model(arch, weights=None).state_dict()
        shapes = {name: tensor.shape for name, tensor in expected.items() if not name.startswith("fc.")}
        if found.keys() == shapes.keys() and found | {"conv1.weight": shapes["conv1.weight"]} == shapes:
            return depth
    return None


def _pixel_statistics(meta: BackboneMeta) -> dict[str, list[float]]:
    """Mean and standard deviation for pixels in 0 … 255, where the file has them."""
    known = {"pixel_mean": meta.mean, "pixel_std": meta.std}
    return {name: [255 * value for value in values] for name, values in known.items() if values is not None}


if __name__ == "__main__":
    cli.program(Conversion, main, __doc__)
