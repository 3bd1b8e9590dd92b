"""The generator against its authors' test vectors; draws depend on their address alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.randomness import Draw, EpochOrder, Purpose, bits, key_of, uniform, words

# Known answers of philox4x32-10 published with Random123: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    index, epoch, address, block = counter
    seed = key_of(key[1] << 32 | key[0])
    assert words(seed, epoch, index, address >> 8, address & 0xFF, block) == expected


@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**32 - 1), num=st.integers(1, 9))
def test_draws_depend_on_the_address_alone(seed: int, epoch: int, num: int) -> None:
    index = np.array([5, 0, 2**32 - 1, 17])
    together = bits(Draw(seed, epoch, index), Purpose.CROP, num)
    assert together.shape == (4, num)
    assert together.min() >= 0 and together.max() < 2**32
    for n in range(4):
        assert np.array_equal(bits(Draw(seed, epoch, index[n : n + 1]), Purpose.CROP, num)[0], together[n])
    assert np.array_equal(bits(Draw(seed, epoch, index), Purpose.CROP, num + 3)[:, :num], together)


def test_every_part_of_the_address_matters() -> None:
    index = np.arange(64)
    base = bits(Draw(1, 2, index), Purpose.CROP, 2, view=0)
    others = [
        bits(Draw(2, 2, index), Purpose.CROP, 2),
        bits(Draw(1 + 2**32, 2, index), Purpose.CROP, 2),
        bits(Draw(1, 3, index), Purpose.CROP, 2),
        bits(Draw(1, 2, index + 64), Purpose.CROP, 2),
        bits(Draw(1, 2, index), Purpose.MASK, 2),
        bits(Draw(1, 2, index), Purpose.CROP, 2, view=1),
    ]
    assert all((base != other).all() for other in others)


def test_uniform_has_its_moments() -> None:
    index = np.arange(50_000)
    u = uniform(Draw(0, 0, index), Purpose.NOISE, 4)
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.02


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_epoch_order_is_a_permutation_that_can_be_read_anywhere(count: int, seed: int, epoch: int) -> None:
    order = EpochOrder(seed, epoch, count)
    whole = order[:]
    assert np.array_equal(np.sort(whole), np.arange(count))
    assert np.array_equal(order[count // 3 : count // 2], whole[count // 3 : count // 2])
    assert len(order[count : count + 5]) == 0


def test_epoch_orders_look_random() -> None:
    """All images are equally likely at all places, neighbours are separated, epochs and seeds differ."""
    count = 40
    orders = np.stack([EpochOrder(seed, epoch, count)[:] for seed in range(40) for epoch in range(100)])
    hits = np.zeros((count, count))
    np.add.at(hits, (np.arange(count)[None].repeat(len(orders), 0), orders), 1)
    expected = len(orders) / count
    chi_square = ((hits - expected) ** 2 / expected).sum()
    freedom = (count - 1) ** 2
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5
    together = np.abs(np.diff(orders, axis=1)) == 1
    assert abs(together.mean() - 2 / count) < 0.003
    assert len(np.unique(orders, axis=0)) == len(orders)


def test_an_epoch_cannot_be_read_backwards_nor_be_empty() -> None:
    with pytest.raises(ValueError, match="slices of an epoch's order must have step 1, got -1"):
        EpochOrder(0, 0, 10)[::-1]
    with pytest.raises(ValueError, match="set of 0 images cannot be ordered"):
        EpochOrder(0, 0, 0)
