"""Linear classifiers on cached features: many learning rates and weight decays in one pass over them.

Shape letters: N samples, B a batch of them, F features, C classes, H classifiers.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.accuracy import Accuracy, count_hits
from training.features import Features
from training.optimizer import sgd_groups
from training.schedule import lr_at, scale_lr


@dataclass(frozen=True)
class LinearSetting:
    """With what one classifier is trained."""

    lr: float
    weight_decay: float


def train_linear(
    bank: Features,
    new: Callable[[], nn.Linear],
    settings: Sequence[LinearSetting],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> list[nn.Linear]:
    """Train a classifier with each setting, all on the same batches, each begun by ``new`` with the seed.

    Each is as it would be alone: SGD with momentum 0.9 on the cross-entropy, a new order every epoch, the
    rate dropping to a tenth after 60 % and 80 % of them. A last, smaller batch is left out, unless it is the
    only one. ``bank``: N labelled samples, on any device. ``advance`` is called after each step.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        first = new().to(device)
    heads = [copy.deepcopy(first) for _ in settings]
    optimizer = sgd_groups([(head, s.lr) for head, s in zip(heads, settings, strict=True)], 0.9, 0.0)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group["weight_decay"] = setting.weight_decay
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, len(bank.label_N) // batch_size)
    for epoch in range(epochs):
        scale_lr(optimizer, lr_at(epoch, epochs, 1.0, kind="step"))
        order_N = torch.randperm(len(bank.label_N), generator=generator).to(bank.label_N.device)
        for rows in order_N.split(batch_size)[:steps]:
            feature_BF, label_B = (part[rows].to(device) for part in bank)
            # A sum over classifiers, so that no one's gradient depends on how many there are.
            logits_BHC = _logits(heads, feature_BF)
            label_BH = label_B[:, None].expand(-1, len(heads))
            loss = F.cross_entropy(logits_BHC.flatten(0, 1), label_BH.flatten(), reduction="sum") / len(rows)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            advance()
    return heads


def _logits(heads: Sequence[nn.Linear], feature_BF: Tensor) -> Tensor:
    """(B, H, C), as one product."""
    weight_HCF, bias_HC = (torch.stack([getattr(head, n) for head in heads]) for n in ("weight", "bias"))
    return F.linear(feature_BF, weight_HCF.flatten(0, 1), bias_HC.flatten()).view(-1, *bias_HC.shape)


@torch.no_grad()
def accuracies(heads: Sequence[nn.Linear], test: Features, chunk: int = 4096) -> list[Accuracy]:
    """Of each classifier on the test samples."""
    device = heads[0].weight.device
    hits_H3 = torch.zeros(len(heads), 3, dtype=torch.int64, device=device)
    for feature_BF, labels in zip(test.feature_ND.split(chunk), test.label_N.split(chunk), strict=True):
        label_B = labels.to(device)
        logits_BHC = _logits(heads, feature_BF.to(device))
        hits_H3 += torch.stack([count_hits(logits_BC, label_B) for logits_BC in logits_BHC.unbind(1)])
    return [Accuracy.of(hits_3) for hits_3 in hits_H3]
