"""Is it learning? Weighted nearest-neighbour accuracy on frozen features.

Shape letters: N training samples, M test samples, D features, B test samples at a time, C classes.
"""

import torch
import torch.nn.functional as F

from models.losses import true_float32
from training.features import Features, check_labels


def knn_top1(
    bank: Features,
    test: Features | None = None,
    *,
    k: int = 200,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> float:
    """Share of test samples, in [0, 1], whose class wins the vote of their nearest neighbours in the bank.

    Features are L2-normalised here; each of ``k`` neighbours votes with weight exp(cosine / temperature)
    (Wu et al., arXiv 1805.01978). The work is done where the features are, both on one device.

    Args:
        bank: N labelled samples among which neighbours are looked for.
        test: M labelled samples; None for leave-one-out: those of the bank, none its own neighbour.
        k: neighbours that vote; all candidates where there are fewer.
        temperature: of the votes.
        chunk: test samples at a time; memory is chunk × N floats.

    Raises:
        ValueError: for k or a temperature out of range, samples without label, and sets that are too small.
    """
    leave_one_out = test is None
    test = bank if test is None else test
    if k < 1 or not temperature > 0:
        raise ValueError(f"k is {k} and the temperature {temperature}; take at least 1, and more than 0")
    labels = (bank.label_N, test.label_N)
    num_classes = max((int(label.max()) + 1 for label in labels if len(label)), default=0)
    for name, label in zip(("the bank", "the test set"), labels, strict=True):
        check_labels(name, label, num_classes)
    k = min(k, len(bank.label_N) - leave_one_out)
    if not k:
        raise ValueError("the bank has a single sample, which has no neighbour but itself")
    bank_ND, test_MD = bank.feature_ND.float(), test.feature_ND.float()
    # Scaled are products, for a second bank may not fit beside the first.
    inverse_norm_N = bank_ND.norm(dim=1).clamp_min(1e-12).reciprocal()
    correct = torch.zeros((), dtype=torch.int64, device=test_MD.device)
    for start in range(0, len(test_MD), chunk):
        with true_float32():
            similarity_BN = F.normalize(test_MD[start : start + chunk], dim=1) @ bank_ND.T
        similarity_BN *= inverse_norm_N
        if leave_one_out:
            similarity_BN.diagonal(offset=start).fill_(-torch.inf)
        nearest_Bk, index_Bk = similarity_BN.topk(k, dim=1)
        # Weights relative to the nearest neighbour's: the vote is the same and exp cannot overflow.
        weight_Bk = ((nearest_Bk - nearest_Bk[:, :1]) / temperature).exp()
        votes_BC = weight_Bk.new_zeros(len(weight_Bk), num_classes)
        votes_BC.scatter_add_(1, bank.label_N[index_Bk], weight_Bk)
        correct += (votes_BC.argmax(1) == test.label_N[start : start + chunk]).sum()
    return correct.item() / len(test_MD)
