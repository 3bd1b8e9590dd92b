"""Features keep their order, and labels out of range are named."""

import pytest
import torch

from training.features import check_labels, extract_features
from training.precision import Precision


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
    with pytest.raises(ValueError, match=r"a.beton has label 4, the 4 classes are 0 … 3"):
        check_labels("a.beton", torch.tensor([0, 4]), 4)
    with pytest.raises(ValueError, match=r"2 of the 3 pictures of a.beton have no label"):
        check_labels("a.beton", torch.tensor([-1, 4, -1]), 4)
    with pytest.raises(ValueError, match=r"b.beton is empty"):
        check_labels("b.beton", torch.zeros(0, dtype=torch.int64), 4)
