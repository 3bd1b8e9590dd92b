"""Masks by property: exact count, never empty, polarity, λ."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines.augment import masks as drawn
from pipelines.augment.masks import cell_of_pixel, kept_share
from pipelines.randomness import Purpose, uniform
from pipelines.recipe import Mixing


def block_masks(*address: Any) -> torch.Tensor:
    return torch.from_numpy(drawn.block_masks(*address))


def grid_masks(*address: Any) -> torch.Tensor:
    return torch.from_numpy(drawn.grid_masks(*address))


SIZES = st.integers(2, 16)
KEEPS = st.floats(0.05, 0.99)


@given(grid_size=SIZES, keep=KEEPS, seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_block_keeps_exactly_its_quota(grid_size: int, keep: float, seed: int) -> None:
    quota = int(keep * grid_size**2)
    assume(1 <= quota < grid_size**2)
    masks = block_masks(grid_size, keep, seed, 0, np.arange(16))
    assert masks.shape == (16, grid_size, grid_size)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert (masks.sum(dim=(1, 2)) == quota).all()


@given(grid_size=SIZES, keep=KEEPS, seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_grid_is_never_all_kept_nor_all_replaced(grid_size: int, keep: float, seed: int) -> None:
    kept = grid_masks(grid_size, keep, seed, 0, np.arange(64)).sum(dim=(1, 2))
    assert (kept >= 1).all() and (kept <= grid_size**2 - 1).all()


@pytest.mark.parametrize(("grid_size", "keep"), [(2, 0.5), (3, 0.3), (4, 0.5)])
def test_grid_has_the_distribution_of_redrawing(grid_size: int, keep: float) -> None:
    """Counts of kept cells against the binomial law without its two ends; every cell alike."""
    num, cells = 40_000, grid_size**2
    masks = grid_masks(grid_size, keep, 7, 3, np.arange(num))
    counts = torch.bincount(masks.sum(dim=(1, 2)).long(), minlength=cells + 1) / num
    law = torch.distributions.Binomial(cells, torch.tensor(keep)).log_prob(torch.arange(cells + 1.0)).exp()
    law[0] = law[-1] = 0
    assert (counts - law / law.sum()).abs().max() < 0.01
    share = masks.mean(dim=0)
    assert (share - share.mean()).abs().max() < 0.01


def test_block_of_a_fine_grid_is_made_of_rectangles() -> None:
    """Kept cells have far more kept neighbours than cells kept one by one would have."""
    index = np.arange(500)

    def kept_neighbours(masks: torch.Tensor) -> float:
        pairs = masks[:, :, 1:] * masks[:, :, :-1]
        return float(pairs.sum() / masks[:, :, 1:].sum())

    assert kept_neighbours(block_masks(8, 0.5, 0, 0, index)) > 0.75
    assert kept_neighbours(grid_masks(8, 0.5, 0, 0, index)) < 0.6


def test_block_masks_vary_and_cover_every_cell() -> None:
    masks = block_masks(8, 0.5, 0, 0, np.arange(2000))
    assert len(masks.flatten(1).unique(dim=0)) > 1500
    share = masks.mean(dim=0)
    assert share.min() > 0.05 and share.max() < 0.95


@given(grid_size=st.integers(2, 12), side=st.integers(12, 70))
@settings(max_examples=80, deadline=None)
def test_lam_is_the_true_share_of_pixels(grid_size: int, side: int) -> None:
    masks = drawn.draw_masks(Mixing(mask_type="grid", grid_size=grid_size), 0, 0, np.arange(4))
    cell_S = cell_of_pixel(grid_size, side).numpy()
    pixels = masks[:, cell_S][:, :, cell_S]
    assert pixels.shape == (4, side, side)
    np.testing.assert_allclose(kept_share(masks, side), (pixels == 1).mean(axis=(1, 2)), rtol=1e-6)
    # Nearest neighbour, as torch understands it.
    expected = torch.nn.functional.interpolate(torch.from_numpy(masks)[:, None], size=side, mode="nearest")
    assert np.array_equal(pixels, expected[:, 0])


def _block_in_numpy(grid_size: int, keep: float, u_T4: np.ndarray) -> np.ndarray:
    """One block mask by the docstring, cell by cell, in float64."""
    quota, mask = int(keep * grid_size**2), np.zeros((grid_size, grid_size))
    smallest = min(4, quota)
    for area, aspect, top, left in u_T4.astype(np.float64):
        area, aspect = smallest + (quota - smallest) * area, (1 / 0.3) ** (2 * aspect - 1)
        sides = ((area * aspect) ** 0.5, (area / aspect) ** 0.5)
        height, width = (int(np.clip(np.rint(side), 1, grid_size)) for side in sides)
        if height * width < smallest:
            continue
        rows, columns = (int(u * (grid_size - side + 1)) for u, side in ((top, height), (left, width)))
        for y in range(rows, rows + height):
            for x in range(columns, columns + width):
                if mask.sum() < quota:
                    mask[y, x] = 1
    for cell in range(grid_size**2):
        if mask.sum() < quota:
            mask.flat[cell] = 1
    return mask


@pytest.mark.parametrize(("grid_size", "keep"), [(2, 0.5), (7, 0.3), (8, 0.5), (14, 0.75)])
def test_block_masks_are_those_of_numpy(grid_size: int, keep: float) -> None:
    index = np.arange(300)
    u_NT4 = uniform(5, 2, index, Purpose.MASK, 96).reshape(-1, 24, 4)
    expected = np.stack([_block_in_numpy(grid_size, keep, u_T4) for u_T4 in u_NT4])
    same = (drawn.block_masks(grid_size, keep, 5, 2, index) == expected).all(axis=(1, 2))
    # A side that lies within a float32's error of a half may be rounded the other way.
    assert same.mean() > 0.99


@pytest.mark.parametrize(("grid_size", "lam"), [(4, 0.05), (8, 1.0), (1, 0.5), (2, 0.2)])
def test_masks_that_cannot_be_are_refused(grid_size: int, lam: float) -> None:
    with pytest.raises(ValueError, match=r"mask_lam|grid_size"):
        Mixing(grid_size=grid_size, mask_lam=lam)
