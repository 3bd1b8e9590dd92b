"""Contrastive losses against a queue of negatives, as pure functions.

Shape letters: N batch, D embedding, K queue. All embeddings are L2-normalised rows. Everything is computed in
float32 (float64 stays), whatever autocast says: at temperature 0.07 half-precision logits are off by 0.05.
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
    """Compute products of float32 in float32 and not in TF32; the setting is as before at the end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _rows_of_a_block(device: torch.device) -> int:
    """Queue rows a block of logits spans: on a CPU it stays in the cache, on a GPU it fills the device."""
    return 4096 if device.type == "cpu" else 16384


class _NegativeLogSumExp(torch.autograd.Function):
    """Row-wise log Σ exp(q·queueᵀ / T), never holding more than a block of the N × K logits.

    The gradient by q is (softmax · queue) / T, an N × D matrix. The forward pass makes it while each block of
    logits is at hand, so the backward pass needs neither logits nor queue: nothing of size N × K is kept, and
    the queue may be overwritten in between. The queue receives no gradient.
    """

    @staticmethod
    def forward(ctx: Any, q_ND: Tensor, queue_KD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(N,) log-sum-exp and (N,) maximum of the logits, which carries no gradient."""
        wants_gradient = ctx.needs_input_grad[0]
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
            if wants_gradient:
                weighted_ND.mul_(rescale_N[:, None]).addmm_(weights_NC, block_CD)
            max_N = new_max_N
        if wants_gradient:
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
    """(N,) log-sum-exp and (N,) maximum of each query's logits against the queue.

    Only the first carries a gradient, only to the queries, and only once (no second derivatives).
    """
    # A compiler cannot follow the setting; it finds what the run has set, see training.precision.
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
    """(N,) −log of the positive's share: log(exp(pos) + exp(lse)) − pos, without the cancellation."""
    return F.softplus(negative_lse_N - positive_N)


def info_nce(q_ND: Tensor, k_ND: Tensor, negative_lse_N: Tensor, temperature: float) -> Tensor:
    """Mean of CE(q, k) against the queue, a scalar (MoCo, eq. 1).

    negative_lse_N: of the same queries, from `negative_logsumexp`. Keys receive no gradient.
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
    """Mean of λ·CE(q_m, k) + (1 − λ)·CE(q_m, k[π]), a scalar (MixMask, arXiv 2210.11456; Un-Mix).

    qm_ND: embedded mixed views; k_ND: clean keys; partner_N: int64, whose pixels fill view i; lam_N in
    [0, 1]: share of the anchor's own pixels. Both terms have the same negatives, so one log-sum-exp serves.
    """
    k_ND = k_ND.detach()
    own_N = cross_entropy(positive_logit(qm_ND, k_ND, temperature), negative_lse_N)
    partners_N = cross_entropy(positive_logit(qm_ND, k_ND[partner_N], temperature), negative_lse_N)
    return (lam_N * own_N + (1 - lam_N) * partners_N).mean()
