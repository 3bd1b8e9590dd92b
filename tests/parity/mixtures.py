"""Masks and mixtures compared with their formulas in NumPy.

Shape letters: N batch, S side in pixels, G cells along a mask's side.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from models.batch import Mixture
from pipelines.augment.mixing import blend, block_masks, draw_masks, draw_mixtures, grid_masks
from pipelines.randomness import Draw
from pipelines.recipe import Mixing, Recipe, moco_v2
from tests.parity.comparisons import GRID_CELL_DRAWS, MEASURES, NUM_DRAWS, NUM_UNMIX, Errors, Row

Mix = Callable[[Recipe, int, int, Tensor, Tensor], tuple[Mixture, ...]]
_SIDE_PX = 48
_BATCHES = (7, 8)
_GRIDS = (2, 4, 7, 8, 14)
"""Seven cells do not divide the side."""
_KEEPS = (0.3, 0.5, 0.75)
_SEEDS = 3
_UNMIX_SIDE_PX = 64


def mix(recipe: Recipe, seed: int, epoch: int, index_N: Tensor, query: Tensor) -> tuple[Mixture, ...]:
    """Mix a batch as the loader does: draw on the host, blend on the views' device."""
    return tuple(blend(query, drawn) for drawn in draw_mixtures(recipe, Draw(seed, epoch, index_N.numpy())))


def rows(mix: Mix = mix) -> Iterator[Row]:
    """Compare masks, then the mixtures of every method."""
    yield from _mask_rows()
    yield from cell_rows(mix)
    yield from unmix_rows(mix)


def _mask_rows() -> Iterator[Row]:
    exact, counts, cells = Errors(), Errors(), Errors()
    rng = np.random.default_rng(0)
    index_N = np.arange(64)
    for grid_size in _GRIDS:
        for keep in _KEEPS:
            kept_N = block_masks(grid_size, keep, Draw(0, 0, index_N)).mean(axis=(1, 2))
            exact.add(kept_N, np.full(len(kept_N), int(keep * grid_size**2) / grid_size**2))
    yield exact.row(MEASURES["block mask, share kept"])
    for grid_size, keep in ((2, 0.5), (4, 0.3), (8, 0.5)):
        masks_NGG = grid_masks(grid_size, keep, Draw(0, 0, np.arange(NUM_DRAWS)))
        theirs_N = _redrawn_grids(rng, grid_size, keep).sum(axis=(1, 2))
        counts.add_distance(masks_NGG.sum(axis=(1, 2)), theirs_N)
    yield counts.row(MEASURES["grid mask, cells kept"])
    masks_NGG = grid_masks(8, 0.5, Draw(1, 0, np.arange(GRID_CELL_DRAWS)))
    cells.add(masks_NGG.mean(axis=0), np.full((8, 8), 0.5))
    yield cells.row(MEASURES["grid mask, each cell"])


def _redrawn_grids(rng: np.random.Generator, grid_size: int, keep: float) -> NDArray[np.bool_]:
    """(N, G, G) independent cells; a mask that keeps all or none is drawn again, as published."""
    masks_NGG = rng.random((NUM_DRAWS, grid_size, grid_size)) < keep
    while (again_N := np.isin(masks_NGG.mean(axis=(1, 2)), (0, 1))).any():
        masks_NGG[again_N] = rng.random((again_N.sum(), grid_size, grid_size)) < keep
    return masks_NGG


def _queries(num: int, side: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(num).normal(size=(num, 3, side, side)).astype(np.float32))


def cell_rows(mix: Mix) -> Iterator[Row]:
    """Compare mixtures by masks of cells, and erased views."""
    pixels, erased, shares, partners = Errors(), Errors(), Errors(), Errors()
    for number in range(_SEEDS):
        for num in _BATCHES:
            query, index_N = _queries(num, _SIDE_PX), torch.arange(100, 100 + num)
            for mixing in _mixings():
                recipe = dataclasses.replace(moco_v2(_SIDE_PX), mixing=mixing)
                mixture = mix(recipe, number, 2, index_N, query)[-1]
                address_N = index_N if mixing.mask_per == "image" else index_N[:1]
                masks_NGG = torch.from_numpy(draw_masks(mixing, Draw(number, 2, address_N.numpy())))
                # torch's nearest interpolation takes the rows and columns floor(i · G / S).
                mask = interpolate(masks_NGG[:, None], _SIDE_PX, mode="nearest").numpy().astype(np.float64)
                mask = np.broadcast_to(mask, (num, 1, _SIDE_PX, _SIDE_PX))
                x, partner_N = query.numpy().astype(np.float64), mixture.partner.numpy()
                shares.add(mixture.lam, mask.mean(axis=(1, 2, 3)))
                if mixing.method == "erase":
                    erased.add(mixture.images, mask * x + (1 - mask) * _fill(recipe, x.shape))
                    continue
                pixels.add(mixture.images, mask * x + (1 - mask) * x[partner_N])
                own_N = np.arange(num)
                partners.add((partner_N == own_N).mean(), 0)
                partners.add(np.isin(own_N, partner_N, invert=True).mean(), 0)
    yield pixels.row(MEASURES["mixmask, images"])
    yield erased.row(MEASURES["erase, images"])
    yield shares.row(MEASURES["λ of cell masks"])
    yield partners.row(MEASURES["partners"])


def _mixings() -> Iterator[Mixing]:
    for mask_type in ("block", "grid"):
        for mask_per in ("batch", "image"):
            for grid_size, keep in ((4, 0.3), (7, 0.5), (8, 0.5)):
                given = Mixing(mask_type=mask_type, mask_per=mask_per, grid_size=grid_size, mask_lam=keep)
                yield dataclasses.replace(given, partner="random")
                yield given
                yield dataclasses.replace(given, method="both")
                yield dataclasses.replace(given, method="erase", erase_fill="mean")
                yield dataclasses.replace(given, method="erase", erase_fill="zero")


def _fill(recipe: Recipe, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the fill of erased cells, normalised: 0 for the mean, −mean / std for black."""
    black = -np.array(recipe.mean) / np.array(recipe.std)
    fill = np.zeros(3) if recipe.mixing.erase_fill == "mean" else black
    return np.broadcast_to(fill[:, None, None], shape)


def unmix_rows(mix: Mix) -> Iterator[Row]:
    """Compare the images of Un-Mix, and the distribution of λ."""
    recipe = dataclasses.replace(moco_v2(_UNMIX_SIDE_PX), mixing=Mixing(method="unmix"))
    query, index_N = _queries(2, _UNMIX_SIDE_PX), torch.arange(2)
    x = query.numpy().astype(np.float64)
    pixels, shares = Errors(), Errors()
    lam_global: list[float] = []
    lam_pasted: list[float] = []
    for number in range(NUM_UNMIX):
        (mixture,) = mix(recipe, number, 0, index_N, query)
        images, lam = mixture.images.numpy(), float(mixture.lam[0])
        kept_NSS = (images == query.numpy()).all(axis=1)
        other = x[mixture.partner.numpy()]
        if not kept_NSS.any() and not (images == other.astype(np.float32)).all():
            lam_global.append(lam)
            pixels.add(images, lam * x + (1 - lam) * other)
            continue
        lam_pasted.append(lam)
        mask = _pasted(~kept_NSS[0])
        pixels.add(images, mask * x + (1 - mask) * other)
        shares.add(lam, mask.mean())
    yield pixels.row(MEASURES["unmix, images"])
    yield shares.row(MEASURES["λ of rectangles"])
    yield from _lam_rows(recipe.mixing, np.array(lam_global), np.array(lam_pasted))


def _pasted(replaced_SS: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(S, S) mask of the smallest rectangle around the replaced pixels: 0 inside, 1 outside."""
    mask = np.ones(replaced_SS.shape)
    rows, columns = np.flatnonzero(replaced_SS.any(axis=1)), np.flatnonzero(replaced_SS.any(axis=0))
    if len(rows):
        mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 0
    return mask


def _lam_rows(
    mixing: Mixing, lam_global_A: NDArray[np.float64], lam_pasted_B: NDArray[np.float64]
) -> Iterator[Row]:
    """Compare λ of global mixtures with the beta distribution, λ of rectangles with the published code."""
    rng = np.random.default_rng(0)
    often, whole, rectangle = Errors(), Errors(), Errors()
    often.add(len(lam_global_A) / (len(lam_global_A) + len(lam_pasted_B)), mixing.unmix_global_prob)
    whole.add_distance(lam_global_A, rng.beta(mixing.unmix_beta, mixing.unmix_beta, NUM_DRAWS))
    rectangle.add_distance(lam_pasted_B, _published_rectangles(rng, mixing.unmix_beta))
    yield often.row(MEASURES["how often: global mixture"])
    yield whole.row(MEASURES["unmix, λ of global mixtures"])
    yield rectangle.row(MEASURES["unmix, λ of rectangles"])


def _published_rectangles(rng: np.random.Generator, beta: float) -> NDArray[np.float64]:
    """λ of CutMix's rectangles: area 1 − λ' around a uniformly drawn pixel, clipped at the border."""
    side = _UNMIX_SIDE_PX
    cut = (side * np.sqrt(1 - rng.beta(beta, beta, NUM_DRAWS))).astype(np.int64)
    area = np.ones(NUM_DRAWS)
    for centre in rng.integers(0, side, (2, NUM_DRAWS)):
        area *= np.clip(centre + cut // 2, 0, side) - np.clip(centre - cut // 2, 0, side)
    lam: NDArray[np.float64] = 1 - area / side**2
    return lam
