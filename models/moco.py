"""MoCo with masked mixtures: a query encoder, its momentum copy, and a queue of past keys.

Sources: MoCo (arXiv 1911.05722), MoCo v2 (arXiv 2003.04297), Un-Mix (arXiv 2003.05438), MixMask
(arXiv 2210.11456).

Shape letters: N batch on this rank, M keys of all ranks, S side, D embedding, K queue, F features.
"""

import copy
import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models import losses
from models.batch import NUM_MIXTURES, Batch, Method, Mixture, directions_of
from models.batchnorm import (
    SplitBatchNorm2d,
    join_branches,
    separate_branches,
    shuffle_across_ranks,
    shuffle_across_splits,
    unshuffle_across_ranks,
    unshuffle_across_splits,
)
from models.encoders import EncoderFactory, NormLayer, backbone_features


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class MoCo(nn.Module):
    """Momentum contrast; ``forward(batch)`` returns the loss to minimise and the metrics of the step.

    The state dict has ``encoder_q.*``, ``encoder_k.*`` (heads in ``.fc``), ``queue_KD`` and ``queue_ptr``.
    Only ``encoder_q`` has trainable parameters. DDP does not broadcast queue and pointer. They are the same
    on every rank, because every rank enqueues the keys of all ranks in rank order. At the start of training
    the loss rises, while keys replace the noise that the queue is initialised with.

    Args:
        encoder_factory: builds the query encoder; see `models.encoders.EncoderFactory`.
        method: which mixtures a batch has. Their loss terms are weighted by λ, except for "erase".
        dim: D, at least 1.
        queue_len: K, at least 1; independent of the batch size.
        momentum: share of the key encoder's parameters that a step keeps, in [0, 1].
        temperature: divides the cosine similarities, above 0.
        mlp: head F-F-D with a ReLU (MoCo v2), or one linear layer F-D (v1).
        bn_splits: number of parts of a rank's batch, each with its own BatchNorm statistics; it must divide
            the batch size of the rank. 1 is plain BatchNorm. With one rank, plain BatchNorm leaks which key
            matches which query, which costs about 4 points of accuracy at long schedules. With several ranks,
            keys are shuffled over the ranks, so 1 is enough.
        symmetric: use each view once as query and once as key. The loss is the sum of both directions, and
            the keys of both views are enqueued.
        joint_forward: encode all queries and mixtures as one batch with common BatchNorm statistics. By
            default each is encoded as a batch of its own, as published.
        queue_seed: seed of the initial noise; it must be the same on all ranks.

    Raises:
        ValueError: if a value is out of range.
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
        symmetric: bool = False,
        joint_forward: bool = False,
        queue_seed: int = 0,
    ) -> None:
        super().__init__()
        checks = {
            f"method is {method!r}; choose one of {', '.join(NUM_MIXTURES)}": method in NUM_MIXTURES,
            f"dim is {dim}; it must be at least 1": dim >= 1,
            f"queue_len is {queue_len}; it must be at least 1": queue_len >= 1,
            f"momentum is {momentum}; it must lie in [0, 1]": 0 <= momentum <= 1,
            f"temperature is {temperature}; it must be above 0": temperature > 0,
            f"bn_splits is {bn_splits}; it must be at least 1 (1 is plain BatchNorm)": bn_splits >= 1,
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(message)
        self.method: Method = method
        self.momentum = momentum
        self.temperature = temperature
        self.bn_splits = bn_splits
        self.symmetric = symmetric
        self.joint_forward = joint_forward
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
        # DistributedDataParallel reads this attribute when it wraps the module.
        self._ddp_params_and_buffers_to_ignore = ["queue_KD", "queue_ptr"]

    @staticmethod
    def _head(feature_dim: int, dim: int, mlp: bool) -> nn.Module:
        if not mlp:
            return nn.Linear(feature_dim, dim)
        return nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.ReLU(), nn.Linear(feature_dim, dim))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute loss and metrics of one batch.

        The loss is CE(q, k) + Σ over mixtures of λ·CE(q_m, k) + (1 − λ)·CE(q_m, k[π]); for "erase" each
        mixture adds CE(q_e, k). In training mode, the key encoder is updated before the keys are computed,
        and the keys are enqueued at the end.

        Args:
            batch: views and mixtures, as the loader makes them for the method.

        Returns:
            The scalar loss, and metrics as 0-d, detached tensors on the device: loss; loss_clean; acc1, the
            share of queries with a larger logit for their own key than for any key of the queue; pos_sim and
            neg_sim, the mean cosine with the own key and with the queue; feature_std, the standard deviation
            of the queries per dimension, times √D (1 for uniformly distributed queries, 0 for collapsed
            ones); and, with mixtures, loss_mix, the sum of their terms, and lam, the mean λ.

        Raises:
            ValueError: if the batch does not have the views and mixtures of the method.
        """
        directions = directions_of(batch, self.method, symmetric=self.symmetric)
        if self.training:
            self._update_key_encoder()
        keys = [self._embed_keys(direction.key) for direction in directions]
        queries = self._embed_queries([images for d in directions for images in d.branches])

        # One pass over the queue for all branches of all directions.
        lse_N, hardest_N = losses.negative_logsumexp(torch.cat(queries), self.queue_KD, self.temperature)
        branches = iter(zip(queries, lse_N.chunk(len(queries)), hardest_N.chunk(len(queries)), strict=True))
        clean_terms, mixture_terms, contrasts = [], [], []
        for direction, k_ND in zip(directions, keys, strict=True):
            q_ND, q_lse_N, q_hardest_N = next(branches)
            clean_terms.append(losses.info_nce(q_ND, k_ND, q_lse_N, self.temperature))
            contrasts.append(self._contrast_metrics(q_ND.detach(), k_ND, q_hardest_N))
            for mixture in direction.mixtures:
                qm_ND, qm_lse_N, _ = next(branches)
                mixture_terms.append(self._mixture_term(mixture, qm_ND, k_ND, qm_lse_N))
        loss_clean = torch.stack(clean_terms).sum()
        loss = torch.stack(clean_terms + mixture_terms).sum()

        metrics = {name: torch.stack([c[name] for c in contrasts]).mean() for name in contrasts[0]}
        metrics |= {"loss": loss.detach(), "loss_clean": loss_clean.detach()}
        if mixture_terms:
            metrics["loss_mix"] = torch.stack(mixture_terms).detach().sum()
            metrics["lam"] = torch.stack([mixture.lam for mixture in batch.mixtures]).mean()
        if self.training:
            self._enqueue(torch.cat(keys))
        return loss, metrics

    def backbone_features(self, images_N3SS: Tensor) -> Tensor:
        """(N, F) features of the query encoder before its head, for kNN and the linear probe."""
        return backbone_features(self.encoder_q, images_N3SS)

    def compile_for_training(self) -> None:
        """Compile the whole forward pass as one graph; with several ranks, only the encoders.

        Compiling is in place, so the keys of the state dict do not change. With several ranks, the forward
        pass sends rows between ranks, which cannot be part of a graph.
        """
        if _num_ranks() == 1:
            self.compile(fullgraph=True)
            return
        self.encoder_q.compile(fullgraph=True)
        self.encoder_k.compile(fullgraph=True)

    @staticmethod
    def _embed(encoder: nn.Module, images_N3SS: Tensor) -> Tensor:
        return F.normalize(encoder(images_N3SS).float(), dim=1)

    @torch.no_grad()
    def _embed_keys(self, images_N3SS: Tensor) -> Tensor:
        """(N, D) keys. In training, BatchNorm uses statistics of other images than for the queries."""
        if not self.training:
            return self._embed(self.encoder_k, images_N3SS)
        across_ranks, across_splits = _num_ranks() > 1, self.bn_splits > 1
        if across_ranks:
            # Autocast would convert at the first convolution. Converting before sending halves the bytes.
            if torch.is_autocast_enabled(images_N3SS.device.type):
                images_N3SS = images_N3SS.to(torch.get_autocast_dtype(images_N3SS.device.type))
            images_N3SS = shuffle_across_ranks(images_N3SS)
        if across_splits:
            images_N3SS = shuffle_across_splits(images_N3SS, self.bn_splits)
        k_ND = self._embed(self.encoder_k, images_N3SS)
        if across_splits:
            k_ND = unshuffle_across_splits(k_ND, self.bn_splits)
        return unshuffle_across_ranks(k_ND) if across_ranks else k_ND

    def _embed_queries(self, branches: list[Tensor]) -> list[Tensor]:
        """(N, D) queries of each branch (N, 3, S, S), by one forward pass per branch or one for all."""
        if not self.joint_forward:
            return [self._embed(self.encoder_q, images) for images in branches]
        splits = self.bn_splits if self.training else 1
        q_MD = self._embed(self.encoder_q, join_branches(branches, splits))
        return separate_branches(q_MD, len(branches), splits)

    def _mixture_term(self, mixture: Mixture, qm_ND: Tensor, k_ND: Tensor, lse_N: Tensor) -> Tensor:
        if self.method == "erase":
            return losses.info_nce(qm_ND, k_ND, lse_N, self.temperature)
        return losses.mixture_loss(qm_ND, k_ND, mixture.partner, mixture.lam, lse_N, self.temperature)

    @torch.no_grad()
    def _contrast_metrics(self, q_ND: Tensor, k_ND: Tensor, hardest_N: Tensor) -> dict[str, Tensor]:
        positive_N = losses.positive_logit(q_ND, k_ND, self.temperature)
        return {
            "acc1": (positive_N > hardest_N).float().mean(),
            "pos_sim": positive_N.mean() * self.temperature,
            # Not a matrix product, because autocast would compute that in 16 bits.
            "neg_sim": (q_ND.mean(0) * self.queue_KD.mean(0)).sum(),
            "feature_std": q_ND.std(0, correction=0).mean() * q_ND.shape[1] ** 0.5,
        }

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        """k ← m·k + (1 − m)·q for all parameters, but not for BatchNorm's running statistics."""
        torch._foreach_lerp_(
            list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.momentum
        )

    @torch.no_grad()
    def _enqueue(self, k_ND: Tensor) -> None:
        """Overwrite the oldest rows with the keys of all ranks, in rank order, without a host sync."""
        keys_MD = k_ND
        if (num_ranks := _num_ranks()) > 1:
            keys_MD = k_ND.new_empty(num_ranks * k_ND.shape[0], k_ND.shape[1])
            dist.all_gather(list(keys_MD.chunk(num_ranks)), k_ND.contiguous())
        queue_len = len(self.queue_KD)
        newest_MD = keys_MD[-queue_len:]
        slots_M = (self.queue_ptr + torch.arange(len(newest_MD), device=keys_MD.device)) % queue_len
        self.queue_KD.index_copy_(0, slots_M, newest_MD)
        self.queue_ptr.add_(len(newest_MD)).remainder_(queue_len)
