"""kNN against scikit-learn and against a loop in NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.knn import extract_features, knn_top1
from engine.precision import Precision


def _clusters(seed: int, samples: int) -> tuple[Tensor, Tensor]:
    """Overlapping classes, so that the vote matters and accuracy is neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (samples,), generator=generator)
    centres = torch.eye(5, 12) * 1.5
    noise = torch.randn(samples, 12, generator=generator)
    return (centres[labels] + noise) * 3, labels


@pytest.mark.parametrize("k", [1, 5, 50, 150])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_against_scikit_learn(k: int, temperature: float) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    (train, train_label), (test, test_label) = _clusters(0, 150), _clusters(1, 90)
    classifier = neighbors.KNeighborsClassifier(
        k, weights=lambda d: np.exp((1 - d) / temperature), metric="cosine", algorithm="brute"
    )
    classifier.fit(train.double().numpy(), train_label.numpy())
    want = classifier.score(test.double().numpy(), test_label.numpy())
    got = knn_top1(
        train, train_label, test, test_label, num_classes=5, k=k, temperature=temperature, chunk=32
    )
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
    got = knn_top1(features, labels, features, labels, num_classes=5, k=7, chunk=13, leave_one_out=True)
    assert got == pytest.approx(correct / 60)
    assert knn_top1(features, labels, features, labels, num_classes=5, k=1) == 1  # its own neighbour


def test_sharp_temperatures_do_not_overflow() -> None:
    features, labels = _clusters(0, 60)
    assert knn_top1(features, labels, features, labels, num_classes=5, k=10, temperature=1e-3) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 61}, r"k is 61; with 60 training samples choose it in \[1, 60\]"),
        ({"k": 60, "leave_one_out": True}, "k is 60; with 59 training samples"),
        ({"k": 0}, "k is 0"),
        ({"k": 5, "num_classes": 4}, r"training labels span 0 … 4; num_classes 4 allows 0 … 3"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    features, labels = _clusters(0, 60)
    with pytest.raises(ValueError, match=message):
        knn_top1(features, labels, features, labels, **({"num_classes": 5} | options))


def test_unlabelled_and_unequal_sets_are_refused() -> None:
    features, labels = _clusters(0, 60)
    with pytest.raises(ValueError, match=r"test labels span -1"):
        knn_top1(
            features, labels, features, labels.clone().index_fill_(0, torch.tensor(3), -1), num_classes=5, k=5
        )
    with pytest.raises(ValueError, match="60 test features have 59 labels"):
        knn_top1(features, labels, features, labels[1:], num_classes=5, k=5)


def test_features_keep_their_order_and_need_a_batch() -> None:
    precision = Precision.choose("bf16", torch.device("cpu"))
    layer = torch.nn.Linear(2, 3)
    images = torch.randn(10, 2)
    batches = [(images[start : start + 4], torch.arange(10)[start : start + 4]) for start in (0, 4, 8)]
    features, labels = extract_features(layer, batches, precision)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert torch.equal(labels, torch.arange(10))
    torch.testing.assert_close(features, layer(images).detach(), rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="gave no batch"):
        extract_features(layer, [], precision)
