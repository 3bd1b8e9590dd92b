"""The optimizer of every run, and its learning rate as a function of the step.

A resumed run needs no schedule state, because the learning rate depends only on the step.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

ScheduleKind = Literal["cosine", "step"]
MILESTONES = (0.6, 0.8)
"""Default drops of the step schedule, as shares of the run: epochs 120 and 160 of 200, 60 and 80 of 100."""


def sgd(module: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with momentum over the trainable parameters of a module; see `sgd_groups`."""
    return sgd_groups([(module, lr)], momentum, weight_decay)


def sgd_groups(
    groups: Sequence[tuple[nn.Module, float]], momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """Fused SGD with momentum, with one parameter group and learning rate for each module.

    The momentum buffers start as zeros, so that the first step equals that of plain SGD. They are allocated
    here, not in the first step: under fp16 the gradient scaler usually skips the first step inside the fused
    kernel, so buffers that this step allocated would stay uninitialised.

    Args:
        groups: modules and their base learning rates. A base rate is stored as ``initial_lr`` of its
            parameter group. ``lr`` is a 0-d float32 tensor on the parameters' device that `scale_lr` fills in
            place, so that a captured CUDA graph reads the current rate.
        momentum: 0 for none.
        weight_decay: L2 penalty on all parameters.
    """
    optimizer = torch.optim.SGD(
        [_parameter_group([p for p in module.parameters() if p.requires_grad], lr) for module, lr in groups],
        momentum=momentum,
        weight_decay=weight_decay,
        fused=True,
    )
    if momentum:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _parameter_group(parameters: list[nn.Parameter], lr: float) -> dict[str, Any]:
    rate = torch.tensor(lr, dtype=torch.float32, device=parameters[0].device)
    return {"params": parameters, "lr": rate, "initial_lr": lr}


def scale_lr(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set each group's learning rate to ``share`` of its ``initial_lr``, without a host sync."""
    for group in optimizer.param_groups:
        group["lr"].fill_(share * group["initial_lr"])


def lr_at(
    step: int,
    total_steps: int,
    base_lr: float,
    warmup_steps: int = 0,
    kind: ScheduleKind = "cosine",
    milestones: Sequence[float] = MILESTONES,
    gamma: float = 0.1,
) -> float:
    """The learning rate of a step.

    Args:
        step: 0 … total_steps − 1.
        total_steps: steps of the whole run.
        base_lr: the rate after the warm-up.
        warmup_steps: steps of a linear warm-up, in which the rate is ``base_lr`` · (step + 1) / warmup_steps.
        kind: "cosine" falls from ``base_lr`` along half a cosine that would reach 0 at ``total_steps``;
            "step" multiplies by ``gamma`` at each milestone.
        milestones: shares of ``total_steps`` in (0, 1), see `milestone_shares`.
        gamma: factor at a milestone.

    Raises:
        ValueError: for a step, a warm-up or a milestone out of range, and for an unknown kind.
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


def milestone_shares(milestones: Sequence[int], epochs: int) -> tuple[float, ...]:
    """Convert milestones in epochs to shares of a run of ``epochs``; `MILESTONES` if there are none.

    Raises:
        ValueError: unless the milestones increase and lie in [1, epochs).
    """
    increasing = all(low < high for low, high in itertools.pairwise(milestones))
    if not increasing or any(not 0 < milestone < epochs for milestone in milestones):
        raise ValueError(
            f"schedule is {' '.join(map(str, milestones))}; in a run of {epochs} epochs, give increasing "
            f"epochs from 1 to {epochs - 1}, or none for 60 % and 80 % of the run"
        )
    return tuple(milestone / epochs for milestone in milestones) or MILESTONES
