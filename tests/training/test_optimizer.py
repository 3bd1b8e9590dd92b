"""SGD as one kernel against the plain one, and under a gradient scaler that skips the first step."""

import copy

import pytest
import torch
from torch import nn

from training.optimizer import sgd


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_plain_sgd(momentum: float) -> None:
    ours = nn.Linear(5, 3)
    plain = copy.deepcopy(ours)
    one = sgd(ours, 0.1, momentum, 1e-2)
    other = torch.optim.SGD(plain.parameters(), 0.1, momentum=momentum, weight_decay=1e-2, foreach=False)
    for step in range(4):
        images = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        for module, optimizer in ((ours, one), (plain, other)):
            optimizer.zero_grad()
            module(images).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(ours.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device")])],
)  # fmt: skip
def test_a_first_step_that_the_scaler_skips_leaves_nothing_behind(device: str) -> None:
    module = nn.Linear(5, 3).to(device)
    before = copy.deepcopy(module.state_dict())
    optimizer = sgd(module, 0.1, 0.9, 0.0)
    scaler = torch.amp.GradScaler(device)
    for spoilt in (True, False):
        optimizer.zero_grad()
        loss = module(torch.ones(2, 5, device=device)).sum() * (float("inf") if spoilt else 0.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    # The second step's gradients are zero and so is its momentum.
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
