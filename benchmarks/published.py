"""The published method in plain PyTorch: the reference of our tests and the peer of our benchmarks.

It follows the public MoCo and MixMask code (arXiv 1911.05722 and 2210.11456): the queue is stored D × K;
every loss term clones it, multiplies it in full, puts the positive before the negatives and calls
`F.cross_entropy`, so a mixture multiplies its negatives twice. The key encoder is updated parameter by
parameter, and images stay in contiguous memory. Two extensions make it comparable everywhere: λ may differ
between images, and the queue accepts batches that do not divide it. The accuracies that the public code
computes for its log are left out, and masks are drawn by our faster code; both are in its favour.

Shape letters: N batch, D embedding, K queue.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch import Batch, Method, Mixture
from models.encoders import EncoderFactory
from models.moco import MoCo
from pipelines.augment.mixing import draw_masks
from pipelines.randomness import Draw
from pipelines.recipe import Mixing


def plain_cross_entropy(q_ND: Tensor, k_ND: Tensor, queue_DK: Tensor, temperature: float) -> Tensor:
    """(N,) CE(q, k): cross-entropy of N × (1 + K) logits; the first column holds the positives."""
    negatives_DK = queue_DK.clone().detach()
    positive_N = torch.einsum("nd,nd->n", q_ND, k_ND)
    negative_NK = torch.einsum("nd,dk->nk", q_ND, negatives_DK)
    logits = torch.cat([positive_N[:, None], negative_NK], dim=1)
    logits /= temperature
    first_N = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits, first_N, reduction="none")


def plain_objective(
    method: Method,
    q_ND: Tensor,
    k_ND: Tensor,
    mixed_ND: Sequence[Tensor],
    mixtures: Sequence[Mixture],
    queue_DK: Tensor,
    temperature: float,
) -> Tensor:
    """The loss of one direction: CE(q, k) plus λ·CE(q_m, k) + (1 − λ)·CE(q_m, k[π]) for each mixture.

    An erased view adds CE(q_e, k). ``mixed_ND`` holds the embedded images of each mixture.
    """
    loss = plain_cross_entropy(q_ND, k_ND, queue_DK, temperature).mean()
    for qm_ND, mixture in zip(mixed_ND, mixtures, strict=True):
        own_N = plain_cross_entropy(qm_ND, k_ND, queue_DK, temperature)
        if method == "erase":
            loss = loss + own_N.mean()
            continue
        partners_N = plain_cross_entropy(qm_ND, k_ND[mixture.partner], queue_DK, temperature)
        loss = loss + (mixture.lam * own_N).mean() + ((1 - mixture.lam) * partners_N).mean()
    return loss


class PlainMoCo(nn.Module):
    """The reference model, for one device; ``forward(batch)`` returns the loss.

    Like `models.moco.MoCo` it updates the key encoder first and the queue (``queue_DK``, ``queue_ptr``) last.
    BatchNorm is plain; every view and mixture is one forward pass of the encoder.
    """

    def __init__(
        self,
        encoder_factory: EncoderFactory,
        *,
        method: Method,
        dim: int = 128,
        queue_len: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        symmetric: bool = False,
        queue_seed: int = 0,
    ) -> None:
        """See `models.moco.MoCo` for the arguments; the head is the MLP of MoCo v2."""
        super().__init__()
        self.method: Method = method
        self.momentum, self.temperature, self.symmetric = momentum, temperature, symmetric
        self.encoder_q, self.feature_dim = encoder_factory(norm_layer=nn.BatchNorm2d)
        self.encoder_q.fc = nn.Sequential(
            nn.Linear(self.feature_dim, self.feature_dim), nn.ReLU(), nn.Linear(self.feature_dim, dim)
        )
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        noise_KD = torch.randn(queue_len, dim, generator=torch.Generator().manual_seed(queue_seed))
        self.queue_DK: Tensor
        self.register_buffer("queue_DK", F.normalize(noise_KD, dim=1).T.contiguous())
        self.queue_ptr = 0

    def start_like(self, moco: MoCo) -> "PlainMoCo":
        """Copy the weights, the queue and its position from ours; returns itself."""
        self.encoder_q.load_state_dict(moco.encoder_q.state_dict())
        self.encoder_k.load_state_dict(moco.encoder_k.state_dict())
        self.queue_DK.copy_(moco.queue_KD.T)
        self.queue_ptr = int(moco.queue_ptr)
        return self

    def forward(self, batch: Batch) -> Tensor:
        """The loss of one batch, a scalar; for a symmetric loss the sum of both directions."""
        directions = [(batch.query, batch.key, batch.mixtures)]
        if self.symmetric:
            directions.append((batch.key, batch.query, batch.key_mixtures))
        self._update_key_encoder()
        losses, keys = [], []
        for query, key, mixtures in directions:
            q_ND = F.normalize(self.encoder_q(query), dim=1)
            mixed_ND = [F.normalize(self.encoder_q(mixture.images), dim=1) for mixture in mixtures]
            with torch.no_grad():
                k_ND = F.normalize(self.encoder_k(key), dim=1)
            keys.append(k_ND)
            losses.append(
                plain_objective(self.method, q_ND, k_ND, mixed_ND, mixtures, self.queue_DK, self.temperature)
            )
        for k_ND in keys:
            self._enqueue(k_ND)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        for key, query in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
            key.data = key.data * self.momentum + query.data * (1 - self.momentum)

    @torch.no_grad()
    def _enqueue(self, k_ND: Tensor) -> None:
        """Replace the oldest columns: with one copy if the keys fit, as published, else key by key."""
        queue_len = self.queue_DK.shape[1]
        fits = self.queue_ptr + len(k_ND) <= queue_len
        for keys_MD in [k_ND] if fits else k_ND.split(1):
            self.queue_DK[:, self.queue_ptr : self.queue_ptr + len(keys_MD)] = keys_MD.T
            self.queue_ptr = (self.queue_ptr + len(keys_MD)) % queue_len


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The loss by either formulation."""
    loss: Tensor = model(batch) if isinstance(model, PlainMoCo) else model(batch)[0]
    return loss


def mixed_with_reverse(query: Tensor, key: Tensor, mixed: Sequence[Tensor], lam: float = 0.5) -> Batch:
    """A batch of given views and mixtures: partners in reverse order, one λ for all images, as published."""
    row_N = torch.arange(len(query))
    partner_N = row_N.flip(0)
    mixtures = tuple(Mixture(images, partner_N, torch.full((len(query),), lam)) for images in mixed)
    return Batch(query, key, mixtures, row_N, torch.full_like(row_N, -1))


def plain_mixmask(query: Tensor, key: Tensor, mixing: Mixing, draw: Draw) -> Batch:
    """A batch of two views; one block mask mixes the query views with those in reverse order."""
    cells = torch.from_numpy(draw_masks(mixing, draw.first()))[None]
    mask = F.interpolate(cells, size=query.shape[-2:], mode="nearest")
    images = query * mask + query.flip(0) * (1 - mask)
    return mixed_with_reverse(query, key, [images], mask.mean().item())
