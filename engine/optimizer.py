"""The optimizer of every training."""

from collections.abc import Sequence

import torch
from torch import nn


def sgd(module: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with momentum over what a module trains, see `sgd_groups`."""
    return sgd_groups([(module, lr)], momentum, weight_decay)


def sgd_groups(
    groups: Sequence[tuple[nn.Module, float]], momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """SGD with momentum over what modules train, as one kernel that asks the host for nothing.

    groups: modules and their learning rates, which also stand as ``initial_lr`` in the parameter groups.
    Momentum begins as zeros, which gives the same first step as beginning with the first gradient. It must
    not be left to the first step: under fp16 that step is most often skipped, by the kernel itself, and what
    the buffers were allocated with would count as momentum.
    """
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr": lr, "initial_lr": lr}
            for module, lr in groups
        ],
        momentum=momentum,
        weight_decay=weight_decay,
        fused=True,
    )
    if momentum:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
