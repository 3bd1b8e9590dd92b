"""Fused SGD against torch's plain SGD, schedules against closed forms and torch's schedulers."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from training.optim import MILESTONES, lr_at, milestone_shares, scale_lr, sgd, sgd_groups


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
def test_a_first_step_that_the_scaler_skips_leaves_zero_momentum(device: str) -> None:
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


def test_cosine_without_warmup_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert lr_at(step, 50, 0.3) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_warmup_climbs_to_the_base_and_meets_the_cosine() -> None:
    rates = [lr_at(step, 100, 2.0, warmup_steps=10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("total", [100, 200, 1000, 100_000])
def test_steps_drop_exactly_at_their_share(total: int) -> None:
    for step, want in [(0, 30), (total * 6 // 10 - 1, 30), (total * 6 // 10, 3), (total * 8 // 10, 0.3)]:
        assert lr_at(step, total, 30, kind="step") == pytest.approx(want)


@pytest.mark.parametrize(("epochs", "per_epoch"), [(200, 5004), (7, 3), (1000, 97), (3, 1)])
def test_milestones_in_epochs_drop_at_the_first_step_of_their_epoch(epochs: int, per_epoch: int) -> None:
    milestones = (1, epochs - 1)
    total, at = epochs * per_epoch, milestone_shares(milestones, epochs)
    for step in {*range(per_epoch + 1), *range(total - per_epoch - 1, total)}:
        # The definition: a tenth for each milestone that the step's epoch has reached.
        want = 0.1 ** sum(step // per_epoch >= milestone for milestone in milestones)
        assert lr_at(step, total, 1.0, kind="step", milestones=at) == pytest.approx(want)


def test_published_milestones_are_the_default() -> None:
    assert (
        milestone_shares((120, 160), 200)
        == milestone_shares((60, 80), 100)
        == milestone_shares((), 0)
        == MILESTONES
    )


@pytest.mark.parametrize("milestones", [(0, 5), (5, 10), (7, 5), (5, 5), (-1,)])
def test_milestones_outside_the_run_are_named(milestones: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"schedule is {milestones[0]}.* run of 10 epochs.* from 1 to 9"):
        milestone_shares(milestones, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 10}, r"step is 10; a run of 10 steps has steps 0 … 9"),
        ({"step": -1}, "step is -1"),
        ({"warmup_steps": 10}, r"warmup_steps is 10"),
        ({"kind": "linear"}, "schedule is 'linear'; choose cosine or step"),
        ({"kind": "step", "milestones": (60, 80)}, r"milestones are \(60, 80\)"),
    ],
)
def test_values_out_of_range_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lr_at(**({"step": 0, "total_steps": 10, "base_lr": 1.0} | arguments))


def test_every_group_gets_its_share_and_keeps_its_tensor() -> None:
    optimizer = sgd_groups([(torch.nn.Linear(1, 1), lr) for lr in (1.0, 2.0)], 0.9, 0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    scale_lr(optimizer, 0.25)
    assert [float(rate) for rate in rates] == [0.25, 0.5]
    # Filled in place: a captured step reads the tensors it was captured with.
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
