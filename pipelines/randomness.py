"""Random numbers by address: every draw is a function of (seed, epoch, index, view, purpose).

Nothing is consumed, so views do not depend on threads, batch size, world size or on where a run was
resumed. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), written on int64 tensors so that the host and the training device run the same lines: torch
has no unsigned 32 × 32 → 64 bit product, but int64's wraps to the same bits.

Shape letters: N samples, V views, R draws.
"""

from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(IntEnum):
    """What a draw is for. The numbers are part of the promise: changing one changes every run."""

    CROP = 1
    PHOTOMETRIC = 2
    MASK = 3
    PARTNER = 4
    UNMIX = 5
    NOISE = 6
    ORDER = 7


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words of 32 random bits for each counter.

    Args:
        counter: four int64 tensors that broadcast together, values in [0, 2³²).
        key: two integers in [0, 2³²).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2³²).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) & _MASK) ^ c1 ^ k0
        c1 = product1 & _MASK
        c2 = ((product0 >> 32) & _MASK) ^ c3 ^ k1
        c3 = product0 & _MASK
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def bits(seed: int, epoch: int, index_N: Tensor, purpose: Purpose, num: int, view: int = 0) -> Tensor:
    """``num`` words of 32 random bits for each sample.

    Args:
        seed: in [0, 2⁶⁴).
        epoch: in [0, 2³²).
        index_N: (N,) int64 in [0, 2³²), positions in the compiled set.
        purpose: what the draws are for; draws of different purposes are independent.
        num: R, draws per sample.
        view: in [0, 256).

    Returns:
        (N, R) int64 in [0, 2³²), on the device of ``index_N``.
    """
    blocks = torch.arange((num + 3) // 4, device=index_N.device)
    index = index_N[:, None]
    # Counter words: index, epoch, what for, and the number of the block of four draws.
    address = torch.full_like(index, int(purpose) << 8 | view)
    words = philox4x32(
        (index, torch.full_like(index, epoch), address, blocks[None, :]), (seed & _MASK, seed >> 32 & _MASK)
    )
    return torch.stack([word.expand(len(index_N), len(blocks)) for word in words], dim=2).flatten(1)[:, :num]


def uniform(seed: int, epoch: int, index_N: Tensor, purpose: Purpose, num: int, view: int = 0) -> Tensor:
    """Like :func:`bits`, as (N, R) float32 in [0, 1): the upper 24 bits of each word."""
    return (bits(seed, epoch, index_N, purpose, num, view) >> 8).to(torch.float32) * 2.0**-24


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """(count,) int64: the order in which an epoch visits the set; the same on every rank."""
    generator = torch.Generator().manual_seed(
        int(bits(seed, epoch, torch.zeros(1, dtype=torch.int64), Purpose.ORDER, 1).item())
    )
    return torch.randperm(count, generator=generator)
