"""Classifiers trained together are those trained alone; accuracies against NumPy."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.classifier import new_classifier
from training.accuracy import Accuracy, count_hits
from training.features import Features
from training.linear import LinearSetting, accuracies, train_linear
from training.schedule import lr_at

SETTINGS = [LinearSetting(lr, wd) for lr in (0.03, 1.0) for wd in (0.0, 1e-2)]


def _bank() -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (50,), generator=generator)
    return Features(torch.eye(3, 6)[labels] + torch.randn(50, 6, generator=generator), labels)


def _alone(bank: Features, setting: LinearSetting, epochs: int, batch_size: int, seed: int) -> nn.Linear:
    """The plain way, with torch's default SGD."""
    torch.manual_seed(seed)
    head = new_classifier(6, 3)
    optimizer = torch.optim.SGD(
        head.parameters(), setting.lr, momentum=0.9, weight_decay=setting.weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(epoch, epochs, setting.lr, kind="step")
        order = torch.randperm(50, generator=generator)
        for start in range(0, 50 - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            loss = F.cross_entropy(head(bank.feature_ND[rows]), bank.label_N[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head


def test_trained_together_as_alone() -> None:
    bank, steps = _bank(), []
    heads = train_linear(
        bank,
        functools.partial(new_classifier, 6, 3),
        SETTINGS,
        epochs=5,
        batch_size=16,
        seed=3,
        device=torch.device("cpu"),
        advance=lambda: steps.append(1),
    )
    assert len(steps) == 5 * 3
    for head, setting in zip(heads, SETTINGS, strict=True):
        expected = _alone(bank, setting, epochs=5, batch_size=16, seed=3)
        torch.testing.assert_close(head.weight, expected.weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(head.bias, expected.bias, rtol=1e-4, atol=1e-6)
    assert len({head.weight[0, 0].item() for head in heads}) == len(SETTINGS)


def test_accuracies_against_numpy() -> None:
    generator = torch.Generator().manual_seed(1)
    heads = [new_classifier(6, 8) for _ in range(3)]
    test = Features(torch.randn(37, 6, generator=generator), torch.randint(8, (37,), generator=generator))
    for head, found in zip(heads, accuracies(heads, test, chunk=10), strict=True):
        logits = head(test.feature_ND).detach().double().numpy()
        ranks = np.argsort(-logits, axis=1)
        label = test.label_N.numpy()[:, None]
        assert found == Accuracy((ranks[:, :1] == label).any(1).mean(), (ranks[:, :5] == label).any(1).mean())


def test_fewer_than_five_classes() -> None:
    hits = count_hits(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1]))
    assert Accuracy.of(hits) == Accuracy(0.5, 1.0)
