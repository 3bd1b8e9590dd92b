"""The optimizer of every training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def sgd(module: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with momentum over what a module trains, see `sgd_groups`."""
    return sgd_groups([(module, lr)], momentum, weight_decay)


def sgd_groups(
    groups: Sequence[tuple[nn.Module, float]], momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """SGD with momentum over what modules train, as one kernel that asks the host for nothing.

    groups: modules and their learning rates, numbers, which stand as ``initial_lr`` in the parameter groups;
    ``lr`` is a 0-d float32 tensor on the parameters' device, which `training.schedule` fills in place, so
    that a CUDA graph of the step reads the present one.
    Momentum begins as zeros, which gives the same first step as beginning with the first gradient. It must
    not be left to the first step: under fp16 that step is most often skipped, by the kernel itself, and what
    the buffers were allocated with would count as momentum.
    """
    optimizer = torch.optim.SGD(
        [_group([p for p in module.parameters() if p.requires_grad], lr) for module, lr in groups],
        momentum=momentum,
        weight_decay=weight_decay,
        fused=True,
    )
    if momentum:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _group(parameters: list[nn.Parameter], lr: float) -> dict[str, Any]:
    rate = torch.tensor(lr, dtype=torch.float32, device=parameters[0].device)
    return {"params": parameters, "lr": rate, "initial_lr": lr}
