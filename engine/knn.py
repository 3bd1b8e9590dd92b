"""Is it learning? Weighted nearest-neighbour accuracy on frozen features.

Shape letters: N training samples, M test samples, D features, B test samples at a time, C classes.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.precision import Precision


def knn_top1(
    train_ND: Tensor,
    train_label_N: Tensor,
    test_MD: Tensor,
    test_label_M: Tensor,
    *,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
    chunk: int = 1024,
    leave_one_out: bool = False,
) -> float:
    """Share of test samples, in [0, 1], whose class wins the vote of their nearest neighbours.

    Features are L2-normalised here; each of ``k`` neighbours votes with weight exp(cosine / temperature)
    (Wu et al., arXiv 1805.01978). Labels are int64 in 0 … num_classes − 1.
    leave_one_out: the test set is the training set, in the same order, and no sample is its own neighbour.
    chunk: test samples at a time; memory is chunk × N floats.
    Raises ValueError if there are fewer than ``k`` candidates, for labels out of range, and for sets whose
    sizes do not fit each other.
    """
    candidates = len(train_ND) - leave_one_out
    _check(
        1 <= k <= candidates, f"k is {k}; with {candidates} training samples choose it in [1, {candidates}]"
    )
    for name, features, labels in (("training", train_ND, train_label_N), ("test", test_MD, test_label_M)):
        _check(len(features) == len(labels), f"{len(features)} {name} features have {len(labels)} labels")
        _check(len(labels) > 0, f"the {name} set is empty; nothing can be measured")
        low, high = int(labels.min()), int(labels.max())
        _check(
            low >= 0 and high < num_classes,
            f"{name} labels span {low} … {high}; num_classes {num_classes} allows 0 … {num_classes - 1} "
            "(−1 marks a sample without label, leave those out)",
        )
    _check(not leave_one_out or len(train_ND) == len(test_MD), "leave_one_out takes the training set twice")

    train_ND, test_MD = F.normalize(train_ND.float(), dim=1), F.normalize(test_MD.float(), dim=1)
    correct = torch.zeros((), dtype=torch.int64, device=test_MD.device)
    for start in range(0, len(test_MD), chunk):
        similarity_BN = test_MD[start : start + chunk] @ train_ND.T
        if leave_one_out:
            similarity_BN.diagonal(offset=start).fill_(-torch.inf)
        nearest_Bk, index_Bk = similarity_BN.topk(k, dim=1)
        # Weights relative to the nearest neighbour's: the vote is the same and exp cannot overflow.
        weight_Bk = ((nearest_Bk - nearest_Bk[:, :1]) / temperature).exp()
        votes_BC = weight_Bk.new_zeros(len(weight_Bk), num_classes)
        votes_BC.scatter_add_(1, train_label_N[index_Bk], weight_Bk)
        correct += (votes_BC.argmax(1) == test_label_M[start : start + chunk]).sum()
    return correct.item() / len(test_MD)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@torch.no_grad()
def extract_features(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    store: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``encode`` over (images, labels) batches; (N, D) float32 features and (N,) labels, in order.

    encode: put its model into eval mode first. precision: names the device the images are moved to.
    store: where features are kept, by default on that device; the CPU if they would not fit there.
    Raises ValueError if there is no batch.
    """
    store = store or precision.device
    features, labels = [], []
    for images, label in batches:
        with precision.autocast():
            encoded = encode(images.to(precision.device, non_blocking=True))
        features.append(encoded.float().to(store))
        labels.append(label.to(store))
    _check(bool(features), "the loader gave no batch; is the set smaller than one batch?")
    return torch.cat(features), torch.cat(labels)
