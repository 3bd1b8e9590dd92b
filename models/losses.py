"""Contrastive losses against a queue of negatives, as pure functions.

All embeddings are L2-normalised rows. All arithmetic is float32 (float64 stays float64), also under autocast:
at temperature 0.07, logits in half precision are off by 0.05.

Shape letters: N batch, D embedding, K queue, C rows of a block of the queue.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@contextlib.contextmanager
def true_float32() -> Iterator[None]:
    """Compute float32 products in float32, not in TF32, inside the ``with`` block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _rows_of_a_block(device: torch.device) -> int:
    """C. On a CPU a block of logits must fit into the cache; on a GPU it must occupy all multiprocessors."""
    return 4096 if device.type == "cpu" else 16384


class _NegativeLogSumExp(torch.autograd.Function):
    """log Σ exp(q·queueᵀ / T) of each row, with only one block of the N × K logits in memory at a time.

    The gradient with respect to q is (softmax · queue) / T, an N × D matrix. The forward pass computes it
    block by block, so the backward pass needs neither the logits nor the queue, and the queue may be
    overwritten before it. The queue receives no gradient.
    """

    @staticmethod
    def forward(ctx: Any, q_ND: Tensor, queue_KD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the (N,) log-sum-exp and the (N,) maximum of the logits, which has no gradient."""
        needs_gradient = ctx.needs_input_grad[0]
        max_N = q_ND.new_full((len(q_ND),), -torch.inf)
        sum_N = torch.zeros_like(max_N)
        weighted_ND = torch.zeros_like(q_ND)
        scaled_ND = q_ND / temperature
        for block_CD in queue_KD.split(_rows_of_a_block(q_ND.device)):
            logits_NC = scaled_ND @ block_CD.T
            new_max_N = torch.maximum(max_N, logits_NC.amax(1))
            rescale_N = (max_N - new_max_N).exp()
            weights_NC = logits_NC.sub_(new_max_N[:, None]).exp_()
            sum_N = sum_N * rescale_N + weights_NC.sum(1)
            if needs_gradient:
                weighted_ND.mul_(rescale_N[:, None]).addmm_(weights_NC, block_CD)
            max_N = new_max_N
        if needs_gradient:
            ctx.save_for_backward(weighted_ND / (sum_N[:, None] * temperature))
        ctx.mark_non_differentiable(max_N)
        return max_N + sum_N.log(), max_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope_ND,) = ctx.saved_tensors
        return grads[0][:, None] * slope_ND, None, None


def _full_precision(*tensors: Tensor) -> Sequence[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def negative_logsumexp(q_ND: Tensor, queue_KD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and maximum of each query's logits q·queueᵀ / T.

    Args:
        q_ND: queries.
        queue_KD: negatives; they receive no gradient.
        temperature: T.

    Returns:
        (N,) log-sum-exp, which can be differentiated once with respect to the queries, and (N,) maximum,
        which has no gradient.
    """
    # torch.compile cannot trace a change of this setting. Compiled code uses the setting of the run.
    exact = contextlib.nullcontext() if torch.compiler.is_compiling() else true_float32()
    with torch.autocast(q_ND.device.type, enabled=False), exact:
        q_ND, queue_KD = _full_precision(q_ND, queue_KD)
        lse_N, max_N = _NegativeLogSumExp.apply(q_ND, queue_KD.detach(), temperature)
    return lse_N, max_N


def positive_logit(q_ND: Tensor, k_ND: Tensor, temperature: float) -> Tensor:
    """(N,) logits q·k / T of each query with its own key."""
    q_ND, k_ND = _full_precision(q_ND, k_ND)
    return (q_ND * k_ND).sum(1) / temperature


def cross_entropy(positive_N: Tensor, negative_lse_N: Tensor) -> Tensor:
    """(N,) −log softmax of the positive: log(exp(pos) + exp(lse)) − pos, in a numerically stable form."""
    return F.softplus(negative_lse_N - positive_N)


def info_nce(q_ND: Tensor, k_ND: Tensor, negative_lse_N: Tensor, temperature: float) -> Tensor:
    """Mean of CE(q, k) against the queue (MoCo, arXiv 1911.05722, eq. 1).

    Args:
        q_ND: queries.
        k_ND: their keys, which receive no gradient.
        negative_lse_N: log-sum-exp over the negatives, from `negative_logsumexp` of the same queries.
        temperature: T.

    Returns:
        Scalar.
    """
    return cross_entropy(positive_logit(q_ND, k_ND.detach(), temperature), negative_lse_N).mean()


def mixture_loss(
    qm_ND: Tensor,
    k_ND: Tensor,
    partner_N: Tensor,
    lam_N: Tensor,
    negative_lse_N: Tensor,
    temperature: float,
) -> Tensor:
    """Mean of λ·CE(q_m, k) + (1 − λ)·CE(q_m, k[π]) (MixMask, arXiv 2210.11456; Un-Mix, arXiv 2003.05438).

    Both terms have the same negatives, so they share one log-sum-exp.

    Args:
        qm_ND: embeddings of the mixed views.
        k_ND: keys of the clean views, which receive no gradient.
        partner_N: int64 π; mixed view i consists of images i and partner_N[i].
        lam_N: λ in [0, 1], the share of image i in mixed view i.
        negative_lse_N: log-sum-exp over the negatives, from `negative_logsumexp` of ``qm_ND``.
        temperature: T.

    Returns:
        Scalar.
    """
    k_ND = k_ND.detach()
    own_N = cross_entropy(positive_logit(qm_ND, k_ND, temperature), negative_lse_N)
    partners_N = cross_entropy(positive_logit(qm_ND, k_ND[partner_N], temperature), negative_lse_N)
    return (lam_N * own_N + (1 - lam_N) * partners_N).mean()
