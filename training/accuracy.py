"""How often a classifier is right.

Shape letters: N samples, C classes.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Shares of a set's samples, in [0, 1]."""

    top1: float
    """Whose class has the largest logit."""
    top5: float
    """Whose class is among the five largest, or among all where there are fewer."""

    @classmethod
    def of(cls, hits_3: Tensor) -> Self:
        """From sums of `count_hits`."""
        top1, top5 = (hits_3[:2].double() / hits_3[2]).tolist()
        return cls(top1, top5)


def count_hits(logits_NC: Tensor, label_N: Tensor) -> Tensor:
    """(3,) int64: samples right at first, among the first five, and all of them; sums of it may be summed."""
    hit_N5 = logits_NC.topk(min(5, logits_NC.shape[1])).indices == label_N[:, None]
    return torch.stack(
        [hit_N5[:, 0].sum(), hit_N5.sum(), hit_N5.new_full((), len(label_N), dtype=torch.int64)]
    )
