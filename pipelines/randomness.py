"""Random numbers by address: every draw is a function of (seed, epoch, index, view, purpose).

Nothing is consumed, so views do not depend on threads, batch size, world size or on where a run was
resumed. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011). Everything is drawn on the host, by compiled code, and sent to the training device with the batch.

Shape letters: N samples, V views, R draws.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pipelines.kernels.compiled import kernel

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
    SUBSET = 8


_ORDER = int(Purpose.ORDER)


def bits(
    seed: int, epoch: int, index_N: NDArray[np.int64], purpose: Purpose, num: int, view: int = 0
) -> NDArray[np.int64]:
    """``num`` words of 32 random bits for each sample.

    Args:
        seed: in [0, 2⁶⁴).
        epoch: in [0, 2³²).
        index_N: (N,) int64 in [0, 2³²), positions in the compiled set.
        purpose: what the draws are for; draws of different purposes are independent.
        num: R, draws per sample.
        view: in [0, 256).

    Returns:
        (N, R) int64 in [0, 2³²).
    """
    return _bits(key_of(seed), epoch, np.ascontiguousarray(index_N), int(purpose), num, view)


def uniform(
    seed: int, epoch: int, index_N: NDArray[np.int64], purpose: Purpose, num: int, view: int = 0
) -> NDArray[np.float32]:
    """Like :func:`bits`, as (N, R) float32 in [0, 1): the upper 24 bits of each word."""
    return (bits(seed, epoch, index_N, purpose, num, view) >> 8).astype(np.float32) * np.float32(2.0**-24)


@kernel
def _bits(
    key: int, epoch: int, index_N: NDArray[np.int64], purpose: int, num: int, view: int
) -> NDArray[np.int64]:
    out_NR = np.empty((len(index_N), num), np.int64)
    for n in range(len(index_N)):
        for block in range((num + 3) // 4):
            drawn = words(key, epoch, index_N[n], purpose, view, block)
            for i in range(min(4, num - 4 * block)):
                out_NR[n, 4 * block + i] = drawn[i]
    return out_NR


@kernel
def words(key: int, epoch: int, index: int, purpose: int, view: int, block: int) -> tuple[int, int, int, int]:
    """Four of the draws that :func:`bits` gives, numbers 4 · block and on; ``key`` of :func:`key_of`."""
    return _philox(index, epoch, purpose << 8 | view, block, key & _MASK, key >> 32 & _MASK)


@kernel
def _philox(c0: int, c1: int, c2: int, c3: int, k0: int, k1: int) -> tuple[int, int, int, int]:
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product1 >> 32 & _MASK) ^ c1 ^ k0, product1 & _MASK
        c2, c3 = (product0 >> 32 & _MASK) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


NUM_EPOCHS = 1 << 32
"""Epochs, like positions in a set, are one word of the generator's counter."""


def key_of(seed: int) -> int:
    """The generator's key as compiled code takes it: the seed's 64 bits as a signed integer.

    Raises:
        ValueError: if the seed is not in [0, 2⁶⁴).
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; it must lie in [0, 2^64)")
    return seed - (1 << 64) if seed >> 63 else seed


class EpochOrder:
    """The order in which an epoch visits the set; the same on every rank.

    A keyed permutation that is evaluated where it is asked, so neither a shuffle nor a resume costs anything,
    whatever the size of the set: a Feistel network (Luby and Rackoff, "How to construct pseudorandom
    permutations", 1988) over the next even power of two, walked on until it lands within the set.
    """

    def __init__(self, seed: int, epoch: int, count: int) -> None:
        if not 1 <= count <= 1 << 32:
            raise ValueError(f"a set of {count} pictures cannot be ordered; it must have 1 … 2³²")
        self._key, self._epoch, self._count = key_of(seed), epoch, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, places: slice) -> NDArray[np.int64]:
        """(n,) positions in the set of the epoch's pictures ``places``; steps other than 1 are refused."""
        start, stop, step = places.indices(self._count)
        if step != 1:
            raise ValueError(f"an epoch is read forwards, its order in steps of {step} is not to be had")
        return _permute(self._key, self._epoch, self._count, start, max(start, stop))


_FEISTEL_ROUNDS = 6


@kernel
def _permute(key: int, epoch: int, count: int, start: int, stop: int) -> NDArray[np.int64]:
    half_bits = 1
    while count > 1 << 2 * half_bits:
        half_bits += 1
    mask = (1 << half_bits) - 1
    out = np.empty(stop - start, np.int64)
    for i in range(stop - start):
        x = start + i
        while True:
            left, right = x >> half_bits, x & mask
            for round_number in range(_FEISTEL_ROUNDS):
                drawn = words(key, epoch, right, _ORDER, 0, round_number)[0]
                left, right = right, left ^ drawn & mask
            x = left << half_bits | right
            if x < count:
                break
        out[i] = x
    return out
