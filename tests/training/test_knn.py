"""kNN against scikit-learn and against a loop in NumPy."""

import numpy as np
import pytest
import torch

from training.features import Features
from training.knn import knn_top1


def _clusters(seed: int, samples: int) -> Features:
    """Overlapping classes, so that the vote matters and accuracy is neither 0 nor 1."""
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


def test_more_neighbours_than_there_are_are_all_of_them() -> None:
    bank, test = _clusters(0, 30), _clusters(1, 40)
    assert knn_top1(bank, test, k=200) == knn_top1(bank, test, k=30)
    assert knn_top1(bank, k=200) == knn_top1(bank, k=29)


@pytest.mark.parametrize(
    ("options", "message"), [({"k": 0}, "k is 0"), ({"temperature": 0.0}, "temperature 0.0")]
)
def test_values_out_of_range_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knn_top1(_clusters(0, 60), **options)


def test_sets_that_cannot_be_judged_are_refused() -> None:
    features, labels = _clusters(0, 60)
    unlabelled = Features(features, labels.index_fill(0, torch.tensor(3), -1))
    labelled = Features(features, labels)
    for sets, name in (((unlabelled, labelled), "the bank"), ((labelled, unlabelled), "the test set")):
        with pytest.raises(ValueError, match=f"1 of the 60 pictures of {name} have no label"):
            knn_top1(*sets)
    with pytest.raises(ValueError, match="the test set is empty"):
        knn_top1(_clusters(0, 60), Features(features[:0], labels[:0]))
    with pytest.raises(ValueError, match="a single sample"):
        knn_top1(Features(features[:1], labels[:1]))
