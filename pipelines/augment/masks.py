"""Masks of g × g cells. A mask is 1 where the anchor is kept, 0 where the partner shows.

Masks are drawn on the host, by address and by compiled code, and sent to the training device with the batch.
Shape letters: N masks, G cells along a side, C = G² cells, T proposals, S side of the image in pixels.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.kernels.compiled import kernel
from pipelines.randomness import Purpose, uniform
from pipelines.recipe import Mixing

_PROPOSALS = 24
_MIN_RECTANGLE_CELLS = 4
_LOG_ASPECT = math.log(1 / 0.3)  # aspect in [0.3, 1/0.3], log-uniform


def draw_masks(mixing: Mixing, seed: int, epoch: int, index_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """(N, G, G) float32 masks of ones and zeros, addressed by the anchors' indices.

    ``block``: int(mask_lam · G²) cells are kept exactly, in rectangles. ``grid``: every cell is kept with
    probability mask_lam by itself, given that neither all nor none are.
    """
    draw = block_masks if mixing.mask_type == "block" else grid_masks
    return draw(mixing.grid_size, mixing.mask_lam, seed, epoch, index_N)


def block_masks(
    grid_size: int, keep: float, seed: int, epoch: int, index_N: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Rectangles of kept cells until exactly int(keep · G²) are kept.

    Rectangles have at least four cells and an aspect of 0.3 … 3.3 (arXiv 2210.11456, after BEiT). Cells are
    taken in the order in which 24 proposals cover them, row by row within a proposal, until the quota is
    full. What no proposal covers comes last, row by row.

    Args:
        grid_size: G, at least 2.
        keep: share of cells kept, with 1 ≤ int(keep · G²) < G².
        seed: of the run.
        epoch: number of the epoch.
        index_N: (N,) int64 addresses.

    Returns:
        (N, G, G) float32 of ones (kept) and zeros.
    """
    mask_NGG = np.zeros((len(index_N), grid_size, grid_size), np.float32)
    u_NT4 = uniform(seed, epoch, index_N, Purpose.MASK, 4 * _PROPOSALS).reshape(-1, _PROPOSALS, 4)
    _take_rectangles(u_NT4, int(keep * grid_size**2), mask_NGG)
    return mask_NGG


@kernel
def _take_rectangles(u_NT4: NDArray[np.float32], quota: int, mask_NGG: NDArray[np.float32]) -> None:
    grid_size = mask_NGG.shape[1]
    smallest = np.float32(min(_MIN_RECTANGLE_CELLS, quota))
    spread = np.float32(quota) - smallest
    for n in range(len(mask_NGG)):
        mask_GG, left_over = mask_NGG[n], quota
        for u_4 in u_NT4[n]:
            area = smallest + spread * u_4[0]
            aspect = np.exp(np.float32(_LOG_ASPECT) * (np.float32(2) * u_4[1] - np.float32(1)))
            height = min(max(int(np.rint(np.sqrt(area * aspect))), 1), grid_size)
            width = min(max(int(np.rint(np.sqrt(area / aspect))), 1), grid_size)
            # Rectangles rounded or clamped below the smallest size are not proposals at all.
            if height * width >= smallest:
                top = int(u_4[2] * np.float32(grid_size - height + 1))
                left = int(u_4[3] * np.float32(grid_size - width + 1))
                left_over = _keep(mask_GG, top, left, height, width, left_over)
        _keep(mask_GG, 0, 0, grid_size, grid_size, left_over)


@kernel
def _keep(mask_GG: NDArray[np.float32], top: int, left: int, height: int, width: int, most: int) -> int:
    """Keep the cells of a rectangle, row by row, at most so many new ones; returns how many are left."""
    for row in range(top, top + height):
        for column in range(left, left + width):
            if most and mask_GG[row, column] == 0:
                mask_GG[row, column] = 1
                most -= 1
    return most


def grid_masks(
    grid_size: int, keep: float, seed: int, epoch: int, index_N: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Every cell kept with probability ``keep`` by itself; all-kept and all-replaced never occur.

    Redrawing those two, as published, is the same as drawing the number of kept cells from the binomial
    distribution restricted to 1 … G² − 1 and then the cells uniformly, which needs no loop.

    Args and returns as :func:`block_masks`.
    """
    cells = grid_size**2
    u_N = uniform(seed, epoch, index_N, Purpose.MASK, 1)[:, 0]
    count_N = np.searchsorted(_restricted_binomial_cdf(cells, keep), u_N, side="right") + 1
    # Every cell draws its rank; view 1 keeps these draws apart from the count's.
    score_NC = uniform(seed, epoch, index_N, Purpose.MASK, cells, view=1)
    rank_NC = score_NC.argsort(axis=1, kind="stable").argsort(axis=1)
    kept_NC: NDArray[np.bool_] = rank_NC < count_N[:, None]
    return kept_NC.astype(np.float32).reshape(-1, grid_size, grid_size)


@lru_cache(maxsize=32)
def _restricted_binomial_cdf(cells: int, keep: float) -> NDArray[np.float32]:
    """(cells − 2,) inner edges of P(count ≤ k), k = 1 … cells − 2, given 0 < count < cells."""
    log_pmf = [
        math.lgamma(cells + 1) - math.lgamma(k + 1) - math.lgamma(cells - k + 1)
        + k * math.log(keep) + (cells - k) * math.log1p(-keep)
        for k in range(1, cells)
    ]  # fmt: skip
    pmf = np.exp(log_pmf)
    return np.asarray((pmf.cumsum() / pmf.sum())[:-1], np.float32)


def cell_of_pixel(grid_size: int, side_px: int, device: torch.device | str = "cpu") -> Tensor:
    """(S,) the cell that a row or column of pixels shows: nearest enlargement, as torch understands it."""
    return torch.arange(side_px, device=device) * grid_size // side_px


def kept_share(mask_NGG: NDArray[np.float32], side_px: int) -> NDArray[np.float32]:
    """(N,) the mean of each mask once it is enlarged to S × S pixels, with S at least G."""
    grid_size = mask_NGG.shape[-1]
    num_G = np.bincount(cell_of_pixel(grid_size, side_px).numpy(), minlength=grid_size)
    share_N: NDArray[np.float64] = mask_NGG.astype(np.float64) @ num_G @ num_G
    return np.asarray(share_N / side_px**2, np.float32)
