"""Features, effective rank, kNN and linear classifiers, against NumPy, scikit-learn and closed forms."""

import functools
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.classifier import new_classifier
from training.evaluate import (
    Accuracy,
    Features,
    LinearSetting,
    accuracies,
    check_labels,
    count_hits,
    effective_rank,
    extract_features,
    knn_top1,
    queue_health,
    train_linear,
)
from training.optim import lr_at
from training.precision import Precision

# ======================================================================================================
# Features
# ======================================================================================================


def test_features_keep_their_order() -> None:
    precision = Precision.choose("bf16", torch.device("cpu"))
    layer = torch.nn.Linear(2, 3)
    images = torch.randn(10, 2)
    batches = [(images[start : start + 4], torch.arange(10)[start : start + 4]) for start in (0, 4, 8)]
    features, labels = extract_features(layer, batches, precision)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert torch.equal(labels, torch.arange(10))
    torch.testing.assert_close(features, layer(images).detach(), rtol=0.02, atol=0.02)
    nothing = extract_features(layer, [], precision)
    assert nothing.feature_ND.shape == (0, 0) and nothing.label_N.shape == (0,)


def test_labels_out_of_range_are_named() -> None:
    check_labels("a.beton", torch.tensor([0, 3]), 4)
    with pytest.raises(ValueError, match=r"a.beton has label 4, but the 4 classes are 0 … 3"):
        check_labels("a.beton", torch.tensor([0, 4]), 4)
    with pytest.raises(ValueError, match=r"2 of the 3 images of a.beton have no label"):
        check_labels("a.beton", torch.tensor([-1, 4, -1]), 4)
    with pytest.raises(ValueError, match=r"b.beton is empty"):
        check_labels("b.beton", torch.zeros(0, dtype=torch.int64), 4)


# ======================================================================================================
# Health of a contrastive run
# ======================================================================================================


def test_equally_used_orthogonal_directions_have_full_rank() -> None:
    assert effective_rank(torch.eye(16) * 3) == pytest.approx(16)
    assert effective_rank(torch.eye(16)[:5]) == pytest.approx(5, rel=1e-4)


def test_one_vector_has_rank_one() -> None:
    assert effective_rank(torch.ones(50, 8)) == pytest.approx(1, abs=1e-4)


def test_effective_rank_is_that_of_the_singular_values() -> None:
    features = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 13)
    singular = np.linalg.svd(features.double().numpy(), compute_uv=False)
    share = singular / singular.sum()
    assert effective_rank(features) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-8)


def test_features_without_content_are_refused() -> None:
    for features in (torch.zeros(4, 3), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="have no rank"):
            effective_rank(features)


@given(st.integers(0, 30), st.integers(1, 20), st.integers(1, 50))
def test_the_queues_age_is_that_of_its_oldest_key(steps: int, keys_per_step: int, queue_len: int) -> None:
    queue: deque[int] = deque(maxlen=queue_len)
    for step in range(steps):
        queue.extend([step] * keys_per_step)
    health = queue_health(steps, keys_per_step, queue_len)
    assert health["queue_filled"] == pytest.approx(len(queue) / queue_len)
    assert health["queue_age"] == (steps - 1 - queue[0] if queue else 0)


# ======================================================================================================
# kNN
# ======================================================================================================


def _clusters(seed: int, samples: int) -> Features:
    """Overlapping classes, so that the votes matter and the accuracy is neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (samples,), generator=generator)
    centres = torch.eye(5, 12) * 1.5
    noise = torch.randn(samples, 12, generator=generator)
    return Features((centres[labels] + noise) * 3, labels)


@pytest.mark.parametrize("k", [1, 5, 50, 150])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_against_scikit_learn(k: int, temperature: float) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, test = _clusters(0, 150), _clusters(1, 90)
    classifier = neighbors.KNeighborsClassifier(
        k, weights=lambda d: np.exp((1 - d) / temperature), metric="cosine", algorithm="brute"
    )
    classifier.fit(bank.feature_ND.double().numpy(), bank.label_N.numpy())
    want = classifier.score(test.feature_ND.double().numpy(), test.label_N.numpy())
    got = knn_top1(bank, test, k=k, temperature=temperature, chunk=32)
    assert 0.3 < want < 1 and got == pytest.approx(want, abs=1e-9)


def test_leave_one_out_against_a_loop() -> None:
    features, labels = _clusters(0, 60)
    unit = features.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    correct = 0
    for i in range(60):
        similarity = unit @ unit[i]
        similarity[i] = -np.inf
        votes = np.zeros(5)
        for j in np.argsort(-similarity)[:7]:
            votes[labels[j]] += np.exp(similarity[j] / 0.1)
        correct += votes.argmax() == labels[i].item()
    bank = Features(features, labels)
    assert knn_top1(bank, k=7, chunk=13) == pytest.approx(correct / 60)
    assert knn_top1(bank, bank, k=1) == 1  # its own neighbour


def test_sharp_temperatures_do_not_overflow() -> None:
    bank = _clusters(0, 60)
    assert knn_top1(bank, bank, k=10, temperature=1e-3) == 1


def test_a_larger_k_than_the_bank_uses_all_neighbours() -> None:
    bank, test = _clusters(0, 30), _clusters(1, 40)
    assert knn_top1(bank, test, k=200) == knn_top1(bank, test, k=30)
    assert knn_top1(bank, k=200) == knn_top1(bank, k=29)


@pytest.mark.parametrize(
    ("options", "message"), [({"k": 0}, "k is 0"), ({"temperature": 0.0}, "temperature 0.0")]
)
def test_values_out_of_range_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knn_top1(_clusters(0, 60), **options)


def test_sets_without_labels_or_samples_are_refused() -> None:
    features, labels = _clusters(0, 60)
    unlabelled = Features(features, labels.index_fill(0, torch.tensor(3), -1))
    labelled = Features(features, labels)
    for sets, name in (((unlabelled, labelled), "the bank"), ((labelled, unlabelled), "the test set")):
        with pytest.raises(ValueError, match=f"1 of the 60 images of {name} have no label"):
            knn_top1(*sets)
    with pytest.raises(ValueError, match="the test set is empty"):
        knn_top1(_clusters(0, 60), Features(features[:0], labels[:0]))
    with pytest.raises(ValueError, match="a single sample"):
        knn_top1(Features(features[:1], labels[:1]))


# ======================================================================================================
# Linear classifiers
# ======================================================================================================


SETTINGS = [LinearSetting(lr, wd) for lr in (0.03, 1.0) for wd in (0.0, 1e-2)]


def _bank() -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (50,), generator=generator)
    return Features(torch.eye(3, 6)[labels] + torch.randn(50, 6, generator=generator), labels)


def _alone(bank: Features, setting: LinearSetting, epochs: int, batch_size: int, seed: int) -> nn.Linear:
    """A classifier trained alone, with torch's default SGD."""
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


def test_classifiers_trained_together_equal_those_trained_alone() -> None:
    bank, steps = _bank(), []
    heads = train_linear(
        bank,
        functools.partial(new_classifier, 6, 3),
        SETTINGS,
        epochs=5,
        batch_size=16,
        seed=3,
        device=torch.device("cpu"),
        on_step=lambda: steps.append(1),
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
