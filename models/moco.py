"""MoCo with masked mixtures: a query encoder, its momentum copy, and a queue of past keys.

Sources: MoCo (arXiv 1911.05722), MoCo v2 (arXiv 2003.04297), Un-Mix (arXiv 2003.05438), MixMask
(arXiv 2210.11456).

Shape letters: N batch on this rank, M keys of all ranks, S side, D embedding, K queue, F features.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models import losses
from models.batchnorm import (
    SplitBatchNorm2d,
    deal_over_splits,
    shuffle_across_ranks,
    undeal_over_splits,
    unshuffle_across_ranks,
)
from models.encoders import EncoderFactory, NormLayer, backbone_features

Method = Literal["moco", "mixmask", "unmix", "both", "erase"]

NUM_MIXTURES: dict[Method, int] = {"moco": 0, "mixmask": 1, "unmix": 1, "both": 2, "erase": 1}
"""Mixtures a batch must bring for each method. Each weighs as much as the clean term."""


class MixtureLike(Protocol):
    """What the model reads of a mixture."""

    @property
    def images(self) -> Tensor:
        """(N, 3, S, S) mixed or erased query views."""

    @property
    def partner(self) -> Tensor:
        """(N,) int64, whose pixels fill each view."""

    @property
    def lam(self) -> Tensor:
        """(N,) float32, share of the anchor's own pixels."""


class BatchLike(Protocol):
    """What the model reads of a batch."""

    @property
    def query(self) -> Tensor:
        """(N, 3, S, S)."""

    @property
    def key(self) -> Tensor:
        """(N, 3, S, S)."""

    @property
    def mixtures(self) -> Sequence[MixtureLike]:
        """As many as `NUM_MIXTURES` says."""


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


class MoCo(nn.Module):
    """Momentum contrast; ``forward(batch)`` returns the loss to minimise and the metrics of the step.

    The state dict has ``encoder_q.*``, ``encoder_k.*`` (heads in ``.fc``), ``queue_KD`` and ``queue_ptr``.
    Only ``encoder_q`` has trainable parameters. Under DDP queue and pointer are left out of the broadcast:
    keys are gathered in rank order, so every rank's queue is the same already.

    The loss first rises while the queue fills with real keys in place of the noise it starts from.
    """

    def __init__(
        self,
        encoder_factory: EncoderFactory,
        *,
        method: Method = "moco",
        dim: int = 128,
        queue_len: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        mlp: bool = True,
        bn_splits: int = 8,
        queue_seed: int = 0,
    ) -> None:
        """Build both encoders and a queue of noise.

        encoder_factory: called once, with ``norm_layer``; returns a ResNet and its feature dimension F.
        method: which mixtures a batch brings; "erase" takes the plain loss for them, others weigh it by λ.
        dim: D. queue_len: K, at least 1, independent of the batch size.
        momentum: share of the key encoder that stays at each step, in [0, 1].
        temperature: divides the cosine similarities, above 0.
        mlp: head F-F-D with a ReLU (MoCo v2) or one linear layer F-D (v1).
        bn_splits: parts the batch is split into for BN statistics, on every rank; it must divide the batch.
            With one rank, 1 is plain BN, which lets the positive pair be told by its company and costs about
            4 points at long schedules. With several ranks keys are dealt out over the ranks and 1 is enough.
        queue_seed: of the noise; the same on all ranks.
        Raises ValueError for a value out of range.
        """
        super().__init__()
        _check(method in NUM_MIXTURES, f"method is {method!r}; choose one of {', '.join(NUM_MIXTURES)}")
        _check(dim >= 1, f"dim is {dim}; it must be at least 1")
        _check(queue_len >= 1, f"queue_len is {queue_len}; it must be at least 1")
        _check(0 <= momentum <= 1, f"momentum is {momentum}; it must lie in [0, 1]")
        _check(temperature > 0, f"temperature is {temperature}; it must be above 0")
        _check(bn_splits >= 1, f"bn_splits is {bn_splits}; it must be at least 1 (1 is plain BatchNorm)")
        self.method: Method = method
        self.momentum = momentum
        self.temperature = temperature
        self.bn_splits = bn_splits
        norm_layer: NormLayer = nn.BatchNorm2d
        if bn_splits > 1:
            norm_layer = functools.partial(SplitBatchNorm2d, num_splits=bn_splits)
        self.encoder_q, self.feature_dim = encoder_factory(norm_layer=norm_layer)
        self.encoder_q.fc = self._head(self.feature_dim, dim, mlp)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)

        noise_KD = torch.randn(queue_len, dim, generator=torch.Generator().manual_seed(queue_seed))
        self.queue_KD: Tensor
        self.register_buffer("queue_KD", F.normalize(noise_KD, dim=1))
        self.queue_ptr: Tensor
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        # DDP reads this name when it wraps the module.
        self._ddp_params_and_buffers_to_ignore = ["queue_KD", "queue_ptr"]

    @staticmethod
    def _head(feature_dim: int, dim: int, mlp: bool) -> nn.Module:
        if not mlp:
            return nn.Linear(feature_dim, dim)
        return nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.ReLU(), nn.Linear(feature_dim, dim))

    def forward(self, batch: BatchLike) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar) and metrics (0-d, detached, on the device) of one batch.

        In training mode it also moves the key encoder (before the keys are made) and the queue (last).
        Loss: CE(q, k) + Σ over mixtures of λ·CE(q_m, k) + (1 − λ)·CE(q_m, k[π]); for "erase" CE(q_e, k).
        Metrics: loss, loss_clean, acc1 (share of queries whose key beats the whole queue), pos_sim and
        neg_sim (mean cosine), feature_std (spread of the queries per dimension; 1 is even, 0 collapsed), and
        with mixtures loss_mix (their sum) and lam (mean).
        Raises ValueError if the batch does not bring the mixtures of the method.
        """
        _check(
            len(batch.mixtures) == NUM_MIXTURES[self.method],
            f"method {self.method!r} takes {NUM_MIXTURES[self.method]} mixtures, the batch brings "
            f"{len(batch.mixtures)}; build the loader with the same method as the model",
        )
        _check(
            len(batch.query) == len(batch.key),
            f"the batch has {len(batch.query)} query and {len(batch.key)} key views; take a recipe of two",
        )
        if self.training:
            self._update_key_encoder()
        k_ND = self._embed_keys(batch.key)
        q_ND = self._embed(self.encoder_q, batch.query)

        lse_N, hardest_N = losses.negative_logsumexp(q_ND, self.queue_KD, self.temperature)
        positive_N = losses.positive_logit(q_ND, k_ND, self.temperature)
        loss_clean = losses.cross_entropy(positive_N, lse_N).mean()
        mixture_terms = [self._mixture_term(mixture, k_ND) for mixture in batch.mixtures]
        loss = loss_clean + sum(mixture_terms)

        metrics = self._contrast_metrics(q_ND.detach(), positive_N.detach(), hardest_N)
        metrics |= {"loss": loss.detach(), "loss_clean": loss_clean.detach()}
        if mixture_terms:
            metrics["loss_mix"] = torch.stack(mixture_terms).detach().sum()
            metrics["lam"] = torch.stack([mixture.lam for mixture in batch.mixtures]).mean()
        if self.training:
            self._enqueue(k_ND)
        return loss, metrics

    def backbone_features(self, images_N3SS: Tensor) -> Tensor:
        """(N, F) features of the query encoder before its head, for kNN and the linear probe."""
        return backbone_features(self.encoder_q, images_N3SS)

    @staticmethod
    def _embed(encoder: nn.Module, images_N3SS: Tensor) -> Tensor:
        return F.normalize(encoder(images_N3SS).float(), dim=1)

    @torch.no_grad()
    def _embed_keys(self, images_N3SS: Tensor) -> Tensor:
        """Keys, made in other company than their queries wherever BN statistics are taken from the batch."""
        if not self.training:
            return self._embed(self.encoder_k, images_N3SS)
        across_ranks, across_splits = _num_ranks() > 1, self.bn_splits > 1
        if across_ranks:
            images_N3SS = shuffle_across_ranks(images_N3SS)
        if across_splits:
            images_N3SS = deal_over_splits(images_N3SS, self.bn_splits)
        k_ND = self._embed(self.encoder_k, images_N3SS)
        if across_splits:
            k_ND = undeal_over_splits(k_ND, self.bn_splits)
        return unshuffle_across_ranks(k_ND) if across_ranks else k_ND

    def _mixture_term(self, mixture: MixtureLike, k_ND: Tensor) -> Tensor:
        qm_ND = self._embed(self.encoder_q, mixture.images)
        if self.method == "erase":
            return losses.info_nce(qm_ND, k_ND, self.queue_KD, self.temperature)
        return losses.mixture_loss(qm_ND, k_ND, mixture.partner, mixture.lam, self.queue_KD, self.temperature)

    @torch.no_grad()
    def _contrast_metrics(self, q_ND: Tensor, positive_N: Tensor, hardest_N: Tensor) -> dict[str, Tensor]:
        return {
            "acc1": (positive_N > hardest_N).float().mean(),
            "pos_sim": positive_N.mean() * self.temperature,
            "neg_sim": q_ND.mean(0) @ self.queue_KD.mean(0),
            "feature_std": q_ND.std(0, correction=0).mean() * q_ND.shape[1] ** 0.5,
        }

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        """k ← m·k + (1 − m)·q over all parameters; BN buffers of the key encoder are its own."""
        torch._foreach_lerp_(
            list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.momentum
        )

    @torch.no_grad()
    def _enqueue(self, k_ND: Tensor) -> None:
        """Write the keys of all ranks, in rank order, over the oldest rows; without a host sync."""
        keys_MD = k_ND
        if (num_ranks := _num_ranks()) > 1:
            keys_MD = k_ND.new_empty(num_ranks * k_ND.shape[0], k_ND.shape[1])
            dist.all_gather_into_tensor(keys_MD, k_ND.contiguous())
        queue_len = len(self.queue_KD)
        newest_MD = keys_MD[-queue_len:]
        slots_M = (self.queue_ptr + torch.arange(len(newest_MD), device=keys_MD.device)) % queue_len
        self.queue_KD.index_copy_(0, slots_M, newest_MD)
        self.queue_ptr.add_(len(newest_MD)).remainder_(queue_len)
