"""The optimizer of every pretraining."""

import torch
from torch import nn


def sgd(module: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with momentum over what a module trains, as one kernel that asks the host for nothing.

    Momentum begins as zeros, which gives the same first step as beginning with the first gradient. It must
    not be left to the first step: under fp16 that step is most often skipped, by the kernel itself, and what
    the buffers were allocated with would count as momentum.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    if momentum:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
