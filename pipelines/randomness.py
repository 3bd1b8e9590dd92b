"""Random numbers by address: each is a function of (seed, epoch, index, view, purpose).

An ordinary generator has a state that changes with each number. A counter-based generator has none: it maps a
counter and a key to random bits. Here the counter consists of the sample's position in the set, the epoch,
the purpose, the view and a block number; the key is the seed. So a view does not depend on threads, batch
size, world size, or on where a run was resumed. The generator is Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011). All draws are made on the host by compiled code and are sent to
the training device with the batch.

Shape letters: N samples, V views, R draws.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pipelines.kernels.compiled import kernel

NUM_EPOCHS = 1 << 32
"""Limit of the epoch, which is one 32-bit word of the generator's counter. The limit of the index is the
same."""
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_FEISTEL_ROUNDS = 6


class Purpose(IntEnum):
    """What a random number decides. Changing these values changes every seeded run."""

    CROP = 1
    PHOTOMETRIC = 2
    MASK = 3
    PARTNER = 4
    UNMIX = 5
    NOISE = 6
    ORDER = 7
    SUBSET = 8


_ORDER = int(Purpose.ORDER)


@dataclass(frozen=True)
class Draw:
    """The address from which all random numbers of some samples in one epoch are computed.

    It holds no random numbers. View and purpose, the rest of the address, are arguments of :func:`bits` and
    :func:`uniform`.
    """

    seed: int
    """In [0, 2⁶⁴)."""
    epoch: int
    """In [0, 2³²)."""
    index_N: NDArray[np.int64]
    """(N,) positions in the compiled set, in [0, 2³²)."""

    def first(self) -> "Draw":
        """The address of the first sample, for decisions that a whole batch shares."""
        return Draw(self.seed, self.epoch, self.index_N[:1])


def bits(draw: Draw, purpose: Purpose, num: int, view: int = 0) -> NDArray[np.int64]:
    """``num`` words of 32 random bits for each sample.

    Args:
        draw: address of the samples.
        purpose: what the numbers decide. Numbers for different purposes are independent.
        num: R, numbers per sample. A larger ``num`` gives the same first numbers.
        view: in [0, 256).

    Returns:
        (N, R) int64 in [0, 2³²).
    """
    index_N = np.ascontiguousarray(draw.index_N)
    return _bits(key_of(draw.seed), draw.epoch, index_N, int(purpose), num, view)


def uniform(draw: Draw, purpose: Purpose, num: int, view: int = 0) -> NDArray[np.float32]:
    """Like :func:`bits`, as (N, R) float32 in [0, 1): the upper 24 bits of each word."""
    return (bits(draw, purpose, num, view) >> 8).astype(np.float32) * np.float32(2.0**-24)


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
    """Numbers 4 · block … 4 · block + 3 of those that :func:`bits` returns, for compiled callers.

    Args:
        key: of :func:`key_of`.
        epoch: as in :class:`Draw`.
        index: position of one sample.
        purpose: a :class:`Purpose` as a plain int.
        view: in [0, 256).
        block: in [0, 2³²).
    """
    return _philox(index, epoch, purpose << 8 | view, block, key & _MASK, key >> 32 & _MASK)


@kernel
def _philox(c0: int, c1: int, c2: int, c3: int, k0: int, k1: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 of the counter words c0 … c3 and the key words k0 and k1."""
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product1 >> 32 & _MASK) ^ c1 ^ k0, product1 & _MASK
        c2, c3 = (product0 >> 32 & _MASK) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def key_of(seed: int) -> int:
    """The generator's key as compiled code takes it: the seed's 64 bits as a signed integer.

    Raises:
        ValueError: if the seed is not in [0, 2⁶⁴).
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; it must lie in [0, 2^64)")
    return seed - (1 << 64) if seed >> 63 else seed


class EpochOrder:
    """The order in which an epoch visits the set; it is the same on every rank.

    The order is a keyed permutation, computed only for the places that are read. So shuffling and resuming
    take no time and no memory, however large the set is. The permutation is a Feistel network (Luby and
    Rackoff, "How to construct pseudorandom permutations", 1988) on the numbers below the smallest power of
    four that is at least ``count``. A result of ``count`` or more is permuted again until it is smaller.

    Args:
        seed: of the run.
        epoch: number of the epoch.
        count: images in the set, in [1, 2³²].

    Raises:
        ValueError: if seed or count is out of range.
    """

    def __init__(self, seed: int, epoch: int, count: int) -> None:
        if not 1 <= count <= 1 << 32:
            raise ValueError(f"a set of {count} images cannot be ordered; it must have 1 … 2^32")
        self._key, self._epoch, self._count = key_of(seed), epoch, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, places: slice) -> NDArray[np.int64]:
        """(n,) positions in the set of the images at ``places``, a slice with step 1."""
        start, stop, step = places.indices(self._count)
        if step != 1:
            raise ValueError(f"slices of an epoch's order must have step 1, got {step}")
        return _permute(self._key, self._epoch, self._count, start, max(start, stop))


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
