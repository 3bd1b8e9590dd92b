"""Masks of g × g cells. A mask is 1 where the anchor is kept, 0 where the partner shows.

All draws are by address, in fixed shapes and without a host sync, so a batch of masks is one graph.
Shape letters: N masks, G cells along a side, C = G² cells, T proposals, S side of the image in pixels.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from pipelines.randomness import Purpose, uniform
from pipelines.recipe import Mixing

_PROPOSALS = 24
_MIN_RECTANGLE_CELLS = 4
_LOG_ASPECT = math.log(1 / 0.3)  # aspect in [0.3, 1/0.3], log-uniform


def draw_masks(mixing: Mixing, seed: int, epoch: int, index_N: Tensor) -> Tensor:
    """(N, G, G) float32 masks of ones and zeros, addressed by the anchors' indices.

    ``block``: int(mask_lam · G²) cells are kept exactly, in rectangles. ``grid``: every cell is kept with
    probability mask_lam by itself, given that neither all nor none are.
    """
    draw = block_masks if mixing.mask_type == "block" else grid_masks
    return draw(mixing.grid_size, mixing.mask_lam, seed, epoch, index_N)


def block_masks(grid_size: int, keep: float, seed: int, epoch: int, index_N: Tensor) -> Tensor:
    """Rectangles of kept cells until exactly int(keep · G²) are kept.

    Rectangles have at least four cells and an aspect of 0.3 … 3.3 (arXiv 2210.11456, after BEiT). A fixed
    number of proposals is drawn at once; cells are taken in the order in which proposals cover them, row by
    row within a proposal, until the quota is full. What no proposal covers comes last, row by row.

    Args:
        grid_size: G, at least 2.
        keep: share of cells kept, with 1 ≤ int(keep · G²) < G².
        seed: of the run.
        epoch: number of the epoch.
        index_N: (N,) int64 addresses, on the device where the masks are wanted.

    Returns:
        (N, G, G) float32 of ones (kept) and zeros.
    """
    quota = int(keep * grid_size**2)
    smallest = min(_MIN_RECTANGLE_CELLS, quota)
    u_NT4 = uniform(seed, epoch, index_N, Purpose.MASK, 4 * _PROPOSALS).view(-1, _PROPOSALS, 4)
    area_NT = smallest + (quota - smallest) * u_NT4[..., 0]
    aspect_NT = torch.exp(_LOG_ASPECT * (2 * u_NT4[..., 1] - 1))
    height_NT = torch.sqrt(area_NT * aspect_NT).round().clamp(1, grid_size)
    width_NT = torch.sqrt(area_NT / aspect_NT).round().clamp(1, grid_size)
    top_NT = (u_NT4[..., 2] * (grid_size - height_NT + 1)).floor()
    left_NT = (u_NT4[..., 3] * (grid_size - width_NT + 1)).floor()

    cell_G = torch.arange(grid_size, device=index_N.device)
    in_rows_NTG = (cell_G >= top_NT[..., None]) & (cell_G < (top_NT + height_NT)[..., None])
    in_columns_NTG = (cell_G >= left_NT[..., None]) & (cell_G < (left_NT + width_NT)[..., None])
    covered_NTC = (in_rows_NTG[..., :, None] & in_columns_NTG[..., None, :]).flatten(2)
    # Rectangles rounded or clamped below the smallest size are not proposals at all.
    covered_NTC &= (height_NT * width_NT >= smallest)[..., None]
    time_T = torch.arange(_PROPOSALS, device=index_N.device)[None, :, None]
    first_NC = torch.where(covered_NTC, time_T, _PROPOSALS).amin(dim=1)
    cell_C = torch.arange(grid_size**2, device=index_N.device)
    return _keep_lowest(first_NC * grid_size**2 + cell_C, quota).view(-1, grid_size, grid_size)


def grid_masks(grid_size: int, keep: float, seed: int, epoch: int, index_N: Tensor) -> Tensor:
    """Every cell kept with probability ``keep`` by itself; all-kept and all-replaced never occur.

    Redrawing those two, as published, is the same as drawing the number of kept cells from the binomial
    distribution restricted to 1 … G² − 1 and then the cells uniformly, which needs no loop.

    Args and returns as :func:`block_masks`.
    """
    cells = grid_size**2
    u_N = uniform(seed, epoch, index_N, Purpose.MASK, 1)[:, 0].contiguous()
    # Every cell draws its rank; view 1 keeps these draws apart from the count's.
    rank_NC = uniform(seed, epoch, index_N, Purpose.MASK, cells, view=1)
    cdf = _restricted_binomial_cdf(cells, keep, index_N.device)
    count_N = torch.searchsorted(cdf, u_N, right=True) + 1
    return _keep_lowest(rank_NC, count_N[:, None]).view(-1, grid_size, grid_size)


def _keep_lowest(score_NC: Tensor, count: Tensor | int) -> Tensor:
    rank_NC = score_NC.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank_NC < count).to(torch.float32)


@lru_cache(maxsize=32)
def _restricted_binomial_cdf(cells: int, keep: float, device: torch.device) -> Tensor:
    """(cells − 2,) inner edges of P(count ≤ k), k = 1 … cells − 2, given 0 < count < cells."""
    log_pmf = [
        math.lgamma(cells + 1) - math.lgamma(k + 1) - math.lgamma(cells - k + 1)
        + k * math.log(keep) + (cells - k) * math.log1p(-keep)
        for k in range(1, cells)
    ]  # fmt: skip
    pmf = torch.tensor(log_pmf, dtype=torch.float64).exp()
    return (pmf.cumsum(0) / pmf.sum())[:-1].float().to(device)


def upsample_masks(mask_NGG: Tensor, side_px: int) -> tuple[Tensor, Tensor]:
    """Enlarge masks to images and tell the share of pixels kept.

    Args:
        mask_NGG: (N, G, G) float32 of ones and zeros.
        side_px: S, at least G.

    Returns:
        (N, 1, S, S) float32, nearest-upsampled, and (N,) float32, the mean of each.
    """
    grid_size = mask_NGG.shape[-1]
    cell_S = torch.arange(side_px, device=mask_NGG.device) * grid_size // side_px
    pixels_NSS = mask_NGG[:, cell_S][:, :, cell_S]
    return pixels_NSS[:, None], pixels_NSS.mean(dim=(1, 2))
