"""Evaluation of an encoder: features, effective rank, kNN, linear classifiers, accuracy.

Shape letters: N samples of the bank (the training set), M test samples, B a batch, D features, C classes,
H classifiers.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.losses import true_float32
from training.distributed import Launch
from training.optim import lr_at, scale_lr, sgd_groups
from training.precision import Precision

# ======================================================================================================
# Features
# ======================================================================================================


class Features(NamedTuple):
    """Features and labels of a set, in the order of the set."""

    feature_ND: Tensor
    """(N, D) float32; (0, 0) without samples."""
    label_N: Tensor
    """(N,) int64; −1 for a sample without a label."""


@torch.no_grad()
def extract_features(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    store: torch.device | None = None,
) -> Features:
    """Run ``encode`` over batches of (images, labels) and return the features in order.

    Args:
        encode: maps images to features (B, D). Its model must be in eval mode.
        batches: images (B, 3, S, S) and labels (B,).
        precision: of ``encode``; images are moved to its device.
        store: device on which features are kept, by default that of ``precision``. Use the CPU for features
            that do not fit there.
    """
    store = store or precision.device
    features, labels = list[Tensor](), list[Tensor]()
    for images, label in batches:
        with precision.autocast():
            encoded = encode(images.to(precision.device, non_blocking=True))
        features.append(encoded.float().to(store))
        labels.append(label.to(store))
    if not features:  # this process has no share of a small set
        return Features(torch.empty(0, 0, device=store), torch.empty(0, dtype=torch.int64, device=store))
    return Features(torch.cat(features), torch.cat(labels))


def gather_features(launch: Launch, own: Features) -> Features | None:
    """Concatenate the features of all processes by rank, on the main process; None on the others."""
    parts = [launch.gather_rows(part) for part in own]
    return Features(*(part for part in parts if part is not None)) if launch.is_main else None


def check_labels(name: str, label_N: Tensor, num_classes: int) -> None:
    """Raise ValueError unless the set ``name`` has samples and all labels are in 0 … num_classes − 1."""
    if not len(label_N):
        raise ValueError(f"{name} is empty; give a set with at least one image")
    unlabelled = int((label_N < 0).sum())
    if unlabelled:
        raise ValueError(
            f"{unlabelled} of the {len(label_N)} images of {name} have no label; give a set that was made "
            "from folders of classes"
        )
    high = int(label_N.max())
    if high >= num_classes:
        raise ValueError(
            f"{name} has label {high}, but the {num_classes} classes are 0 … {num_classes - 1}; give sets "
            "of the same classes"
        )


# ======================================================================================================
# Health of a contrastive run
# ======================================================================================================


def effective_rank(feature_ND: Tensor) -> float:
    """The number of directions that the features use, in [1, min(N, D)] (RankMe, arXiv 2210.02885, eq. 1).

    It is exp of the entropy of the singular values, each divided by their sum. Features are not centred. The
    value is 1 if all features are one vector, and D if all directions are used equally.

    Raises:
        ValueError: without features, and if all are zero.
    """
    gram_DD = feature_ND.double().T @ feature_ND.double()
    singular_D = torch.linalg.eigvalsh(gram_DD).clamp(min=0).sqrt()
    if not len(feature_ND) or not singular_D.sum() > 0:
        raise ValueError(f"{len(feature_ND)} features that are all zero have no rank")
    share_D = singular_D / singular_D.sum()
    return float(torch.special.entr(share_D).sum().exp())


def queue_health(steps: int, keys_per_step: int, queue_len: int) -> dict[str, float]:
    """The state of the queue of negatives after a number of steps.

    Returns:
        ``queue_filled``: share of the queue that holds real keys and not its initial noise, in [0, 1];
        ``queue_age``: age of its oldest real key in steps.
    """
    kept = -(-queue_len // keys_per_step)
    return {
        "queue_filled": min(1.0, steps * keys_per_step / queue_len),
        "queue_age": float(max(0, min(steps, kept) - 1)),
    }


# ======================================================================================================
# kNN
# ======================================================================================================


def knn_top1(
    bank: Features,
    test: Features | None = None,
    *,
    k: int = 200,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> float:
    """Weighted kNN accuracy in [0, 1] (Wu et al., arXiv 1805.01978).

    Features are L2-normalised here. Each of the ``k`` nearest neighbours in the bank votes for its class with
    weight exp(cosine / temperature). Bank and test features must be on one device, which does the work.

    Args:
        bank: N labelled samples, the candidates for neighbours.
        test: M labelled samples; None classifies each sample of the bank by the others (leave-one-out).
        k: neighbours that vote; all candidates if there are fewer.
        temperature: of the votes.
        chunk: test samples at a time; a chunk takes chunk × N floats of memory.

    Raises:
        ValueError: for k or a temperature out of range, samples without labels, and sets that are too small.
    """
    leave_one_out = test is None
    test = bank if test is None else test
    if k < 1 or not temperature > 0:
        raise ValueError(
            f"k is {k}, temperature {temperature}; k must be at least 1, the temperature more than 0"
        )
    labels = (bank.label_N, test.label_N)
    num_classes = max((int(label.max()) + 1 for label in labels if len(label)), default=0)
    for name, label in zip(("the bank", "the test set"), labels, strict=True):
        check_labels(name, label, num_classes)
    k = min(k, len(bank.label_N) - leave_one_out)
    if not k:
        raise ValueError("the bank has a single sample, which has no neighbours; give at least 2")
    bank_ND, test_MD = bank.feature_ND.float(), test.feature_ND.float()
    # The products are scaled, because memory may not hold a second, normalised bank.
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


# ======================================================================================================
# Linear classifiers
# ======================================================================================================


@dataclass(frozen=True)
class Accuracy:
    """Shares of a set's samples, in [0, 1]."""

    top1: float
    """Samples with the largest logit at their label."""
    top5: float
    """Samples with one of the five largest logits at their label; 1 for up to five classes."""

    @classmethod
    def of(cls, hits_3: Tensor) -> Self:
        """The accuracy from the sum of `count_hits` over batches."""
        top1, top5 = (hits_3[:2].double() / hits_3[2]).tolist()
        return cls(top1, top5)


def count_hits(logits_BC: Tensor, label_B: Tensor) -> Tensor:
    """Numbers of samples: correct at top-1, correct at top-5, all; (3,) int64, to be summed over batches."""
    hit_B5 = logits_BC.topk(min(5, logits_BC.shape[1])).indices == label_B[:, None]
    return torch.stack(
        [hit_B5[:, 0].sum(), hit_B5.sum(), hit_B5.new_full((), len(label_B), dtype=torch.int64)]
    )


@dataclass(frozen=True)
class LinearSetting:
    """How one linear classifier is trained."""

    lr: float
    weight_decay: float


def train_linear(
    bank: Features,
    new_head: Callable[[], nn.Linear],
    settings: Sequence[LinearSetting],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    on_step: Callable[[], None] = lambda: None,
) -> list[nn.Linear]:
    """Train one classifier for each setting, all on the same batches in one pass.

    Each result equals that of training the classifier alone: SGD with momentum 0.9 on the cross-entropy, a
    new order in each epoch, the rate divided by ten after 60 % and 80 % of the epochs. The last, smaller
    batch is dropped unless it is the only one.

    Args:
        bank: N labelled samples, on any device.
        new_head: makes a classifier with the initial weights of all; called once, under ``seed``.
        settings: H learning rates and weight decays.
        epochs: passes over the bank.
        batch_size: samples in a step.
        seed: of the initial weights and the order.
        device: on which classifiers are trained.
        on_step: called after each step.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        first = new_head().to(device)
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
            feature_BD, label_B = (part[rows].to(device) for part in bank)
            # Summed over classifiers, so that no gradient depends on their number.
            logits_BHC = _logits(heads, feature_BD)
            label_BH = label_B[:, None].expand(-1, len(heads))
            loss = F.cross_entropy(logits_BHC.flatten(0, 1), label_BH.flatten(), reduction="sum") / len(rows)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            on_step()
    return heads


def _logits(heads: Sequence[nn.Linear], feature_BD: Tensor) -> Tensor:
    """The logits of all classifiers (B, H, C), in one product."""
    weight_HCD, bias_HC = (torch.stack([getattr(head, n) for head in heads]) for n in ("weight", "bias"))
    return F.linear(feature_BD, weight_HCD.flatten(0, 1), bias_HC.flatten()).view(-1, *bias_HC.shape)


@torch.no_grad()
def accuracies(heads: Sequence[nn.Linear], test: Features, chunk: int = 4096) -> list[Accuracy]:
    """The accuracy of each classifier on the test samples, taken ``chunk`` at a time."""
    device = heads[0].weight.device
    hits_H3 = torch.zeros(len(heads), 3, dtype=torch.int64, device=device)
    for feature_BD, labels in zip(test.feature_ND.split(chunk), test.label_N.split(chunk), strict=True):
        label_B = labels.to(device)
        logits_BHC = _logits(heads, feature_BD.to(device))
        hits_H3 += torch.stack([count_hits(logits_BC, label_B) for logits_BC in logits_BHC.unbind(1)])
    return [Accuracy.of(hits_3) for hits_3 in hits_H3]
