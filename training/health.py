"""Is it learning? What tells so beside the loss, which does not.

Shape letters: N samples, D features.
"""

import torch
from torch import Tensor


def effective_rank(feature_ND: Tensor) -> float:
    """How many directions the features really use, in [1, min(N, D)] (RankMe, arXiv 2210.02885, eq. 1).

    exp of the entropy of the singular values, each divided by their sum; features are taken as they are,
    not centred. It is 1 where all features are one vector, and D where all directions are used alike.
    Raises ValueError if there are no features, or all are zero.
    """
    gram_DD = feature_ND.double().T @ feature_ND.double()
    singular_D = torch.linalg.eigvalsh(gram_DD).clamp(min=0).sqrt()
    if not len(feature_ND) or not singular_D.sum() > 0:
        raise ValueError(f"{len(feature_ND)} features, none of them other than zero, have no rank")
    share_D = singular_D / singular_D.sum()
    return float(torch.special.entr(share_D).sum().exp())


def queue_health(steps: int, keys_per_step: int, queue_len: int) -> dict[str, float]:
    """The state of the queue of negatives after so many steps.

    Returns:
        ``queue_filled``, share of the queue that is real keys and no longer the noise it began with, in
        [0, 1]; ``queue_age``, steps since its oldest real key was made.
    """
    kept = -(-queue_len // keys_per_step)
    return {
        "queue_filled": min(1.0, steps * keys_per_step / queue_len),
        "queue_age": float(max(0, min(steps, kept) - 1)),
    }
