"""Learning rates as a function of the step, so that a resumed run needs no schedule state."""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch

ScheduleKind = Literal["cosine", "step"]
MILESTONES = (0.6, 0.8)
"""Shares of a run at which a step schedule drops: epochs 120 and 160 of 200, 60 and 80 of a probe's 100."""


def shares(milestones: Sequence[int], epochs: int) -> tuple[float, ...]:
    """Milestones in epochs as shares of a run of ``epochs``, for `lr_at`; `MILESTONES` where none are given.

    Raises ValueError unless they rise and lie within the run, in [1, epochs).
    """
    rising = all(low < high for low, high in itertools.pairwise(milestones))
    if not rising or any(not 0 < milestone < epochs for milestone in milestones):
        raise ValueError(
            f"schedule is {' '.join(map(str, milestones))}; in a run of {epochs} epochs, give rising epochs "
            f"from 1 to {epochs - 1}, or none for 60 % and 80 % of the run"
        )
    return tuple(milestone / epochs for milestone in milestones) or MILESTONES


def lr_at(
    step: int,
    total_steps: int,
    base_lr: float,
    warmup_steps: int = 0,
    kind: ScheduleKind = "cosine",
    milestones: Sequence[float] = MILESTONES,
    gamma: float = 0.1,
) -> float:
    """The learning rate of ``step`` (0 … total_steps − 1).

    Over the first ``warmup_steps`` it climbs linearly, (step + 1) / warmup_steps of ``base_lr``. Then
    cosine: half a period from ``base_lr`` towards 0, which step ``total_steps`` would reach.
    step: ``base_lr`` · gammaⁿ after n milestones, each a share of ``total_steps`` in (0, 1), see `shares`.
    Raises ValueError for a step, warm-up or milestone out of range and for an unknown kind.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step is {step}; a run of {total_steps} steps has steps 0 … {total_steps - 1}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps}; it must lie in [0, {total_steps}), the run's steps"
        )
    if kind not in ("cosine", "step"):
        raise ValueError(f"schedule is {kind!r}; choose cosine or step")
    if any(not 0 < milestone < 1 for milestone in milestones):
        raise ValueError(f"milestones are {tuple(milestones)}; each is a share of the run, in (0, 1)")
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    if kind == "cosine":
        done = (step - warmup_steps) / (total_steps - warmup_steps)
        return base_lr * 0.5 * (1 + math.cos(math.pi * done))
    # Rounded, because 0.6 · 100 000 need not be a whole number in floating point.
    passed = sum(step >= round(milestone * total_steps) for milestone in milestones)
    return base_lr * gamma**passed


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Fill every parameter group's learning rate, a 0-d tensor, with ``lr``; nothing waits for the device."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


def scale_lr(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Fill every parameter group's learning rate with this share of its ``initial_lr``; see `set_lr`."""
    for group in optimizer.param_groups:
        group["lr"].fill_(share * group["initial_lr"])
