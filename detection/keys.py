"""What Detectron2 calls the tensors of a torchvision ResNet."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
"""Encoders that Detectron2 builds alike, and its MODEL.RESNETS.DEPTH for them."""

_OF_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_RULES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"conv1\.weight", r"stem.conv1.weight"),
        (rf"bn1\.{_OF_NORM}", r"stem.conv1.norm.\1"),
        (r"layer([1-4])\.(\d+)\.conv([1-3])\.weight", r"res<\1>.\2.conv\3.weight"),
        (rf"layer([1-4])\.(\d+)\.bn([1-3])\.{_OF_NORM}", r"res<\1>.\2.conv\3.norm.\4"),
        (r"layer([1-4])\.(\d+)\.downsample\.0\.weight", r"res<\1>.\2.shortcut.weight"),
        (rf"layer([1-4])\.(\d+)\.downsample\.1\.{_OF_NORM}", r"res<\1>.\2.shortcut.norm.\3"),
    )
]


def detectron2_keys(names: Iterable[str]) -> dict[str, str]:
    """torchvision's name → Detectron2's, for every name. Raises ValueError naming what has none."""
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


def to_detectron2(state: dict[str, Tensor], arch: str | None) -> tuple[dict[str, Tensor], int]:
    """A torchvision ResNet's tensors by Detectron2's names, and the depth of its config.

    arch: as the file says it, None where it does not; the tensors must agree.
    Raises ValueError for another architecture, for a small stem, and for keys that are missing or unknown.
    """
    known = ", ".join(DEPTHS)
    if arch is not None and arch not in DEPTHS:
        raise ValueError(f"the file holds a {arch}, which Detectron2 does not build alike; known are {known}")
    depth = _depth(state)
    if depth is None:
        raise ValueError(f"the tensors are of none of {known}, which Detectron2 builds alike")
    if arch is not None and DEPTHS[arch] != depth:
        raise ValueError(
            f"the file says it holds a {arch}, its tensors are those of a ResNet-{depth}; export it again"
        )
    if state["conv1.weight"].shape != (64, 3, 7, 7):
        raise ValueError(
            f"the first convolution is {tuple(state['conv1.weight'].shape)}, Detectron2's stem has "
            "(64, 3, 7, 7); an encoder with the small stem cannot be used there"
        )
    return {new: state[name] for name, new in detectron2_keys(state).items()}, depth


def _depth(state: dict[str, Tensor]) -> int | None:
    """Of the ResNet with just these names and shapes, but for the first convolution's; None for another."""
    from torchvision.models import get_model

    found = {name: tensor.shape for name, tensor in state.items()}
    for arch, depth in DEPTHS.items():
        with torch.device("meta"):
            expected = get_model(arch, weights=None).state_dict()
        shapes = {name: tensor.shape for name, tensor in expected.items() if not name.startswith("fc.")}
        if found.keys() == shapes.keys() and found | {"conv1.weight": shapes["conv1.weight"]} == shapes:
            return depth
    return None
