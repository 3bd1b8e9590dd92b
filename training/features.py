"""A set seen through a frozen encoder.

Shape letters: N samples, D features.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from training.distributed import Launch
from training.precision import Precision


class Features(NamedTuple):
    """Features and labels of a set, in its order."""

    feature_ND: Tensor
    """(N, D) float32; (0, 0) where there are no samples."""
    label_N: Tensor
    """(N,) int64, −1 for a sample without label."""


@torch.no_grad()
def extract_features(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    store: torch.device | None = None,
) -> Features:
    """Run ``encode`` over (images, labels) batches; the features, in order.

    encode: put its model into eval mode first. precision: names the device the images are moved to.
    store: where features are kept, by default on that device; the CPU if they would not fit there.
    """
    store = store or precision.device
    features, labels = list[Tensor](), list[Tensor]()
    for images, label in batches:
        with precision.autocast():
            encoded = encode(images.to(precision.device, non_blocking=True))
        features.append(encoded.float().to(store))
        labels.append(label.to(store))
    if not features:  # the process has no share of a small set
        return Features(torch.empty(0, 0, device=store), torch.empty(0, dtype=torch.int64, device=store))
    return Features(torch.cat(features), torch.cat(labels))


def gathered(launch: Launch, mine: Features) -> Features | None:
    """The features of all processes' shares, in the order of their ranks; None but on the main process."""
    parts = [launch.gather_rows(part) for part in mine]
    return Features(*(part for part in parts if part is not None)) if launch.is_main else None


def check_labels(name: str, label_N: Tensor, num_classes: int) -> None:
    """Raise ValueError unless all labels are in 0 … num_classes − 1; ``name``: whose they are."""
    if not len(label_N):
        raise ValueError(f"{name} is empty; nothing can be measured")
    unlabelled = int((label_N < 0).sum())
    if unlabelled:
        raise ValueError(
            f"{unlabelled} of the {len(label_N)} pictures of {name} have no label; give a set that was made "
            "from folders of classes"
        )
    high = int(label_N.max())
    if high >= num_classes:
        raise ValueError(
            f"{name} has label {high}, the {num_classes} classes are 0 … {num_classes - 1}; give sets of the "
            "same classes"
        )
