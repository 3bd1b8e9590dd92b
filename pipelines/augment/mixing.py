"""Masked mixing of query views: MixMask, Un-Mix, both, and erasing.

The mixture of an anchor x and its partner x[π] is x_m = M · x + (1 − M) · x[π]. The mask M is 1 where the
anchor is kept and 0 where the partner is shown. λ is the mean of M: the share of the anchor (arXiv
2210.11456, section 3). No image is its own partner.

MixMask and erasing use masks of G × G cells, which are never all ones or all zeros. Un-Mix uses one λ for all
pixels, or a mask with one pasted rectangle, which may be empty.

:func:`draw_mixtures` draws partners, masks and λ on the host. They are uploaded to the training device with
the batch. There :func:`blend` enlarges the masks to pixels and blends the views.

Shape letters: N batch, S side in pixels, G cells along a mask's side, C = G² cells, T proposed rectangles, M
masks (N, or 1 for a whole batch).
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.batch import Mixture
from pipelines.kernels.compiled import kernel
from pipelines.randomness import Draw, Purpose, bits, uniform
from pipelines.recipe import Mixing, Recipe

_PROPOSALS = 24
"""T, the number of rectangles proposed for one block mask."""
_MIN_RECTANGLE_CELLS = 4
_LOG_ASPECT = math.log(1 / 0.3)  # the aspect is log-uniform in [0.3, 1/0.3]


@dataclass(frozen=True)
class DrawnMixture:
    """The random decisions of one mixture of a batch, on the host or on the training device."""

    partner: Tensor
    """(N,) int64: image i is mixed with image partner[i]. For erasing, partner[i] is i."""
    lam: Tensor
    """(N,) float32: the share of the anchor."""
    mask: Tensor
    """(M, G, G) float32; :func:`blend` enlarges it to S × S. For Un-Mix, G is 1 for a global mixture and S
    for a pasted rectangle."""
    fill: Tensor | None = None
    """(1, 3, 1, 1) float32: the value of erased cells; None for mixtures with a partner and for noise."""
    noise_seed: int | None = None
    """Seed of the Gaussian noise that fills erased cells; None if there is no noise."""

    def to(self, move: Callable[[Tensor], Tensor]) -> "DrawnMixture":
        """The same decisions with ``move`` applied to each tensor."""
        fill = None if self.fill is None else move(self.fill)
        return DrawnMixture(move(self.partner), move(self.lam), move(self.mask), fill, self.noise_seed)


# ------------------------------------------------------------------------------------------------------------
# Drawing, on the host


def draw_mixtures(recipe: Recipe, draw: Draw) -> tuple[DrawnMixture, ...]:
    """Draw partners, masks and λ for a batch.

    Args:
        recipe: ``mixing`` says what is drawn; ``crop_px`` is S.
        draw: the address of the batch. What the whole batch shares is drawn by the address of its first
            sample: the mask with ``mask_per="batch"``, and the λ and rectangle of Un-Mix.

    Returns:
        As many as the method has mixtures: none for "moco"; (unmix, mixmask) for "both"; one for the others.

    Raises:
        ValueError: if a batch of one is to be mixed.
    """
    mixing = recipe.mixing
    if mixing.method == "moco":
        return ()
    if mixing.method == "erase":
        own_N = np.arange(len(draw.index_N))
        erased = _to_drawn_mixture(recipe, own_N, _cell_masks(mixing, draw))
        if mixing.erase_fill != "noise":
            return (dataclasses.replace(erased, fill=_fill_value(recipe)),)
        noise_seed = int(bits(draw.first(), Purpose.NOISE, 1)[0, 0])
        return (dataclasses.replace(erased, noise_seed=noise_seed),)
    if len(draw.index_N) < 2:
        raise ValueError("a batch of 1 has no other image to be mixed with; use a batch of at least 2")
    drawn = []
    if mixing.method in ("unmix", "both"):
        kind = mixing.partner if mixing.method == "unmix" else "reverse"
        mask = _unmix_mask(mixing, recipe.crop_px, draw.first())
        drawn.append(_to_drawn_mixture(recipe, draw_partner(kind, draw), mask))
    if mixing.method in ("mixmask", "both"):
        kind = mixing.partner if mixing.method == "mixmask" else "random"
        drawn.append(_to_drawn_mixture(recipe, draw_partner(kind, draw), _cell_masks(mixing, draw)))
    return tuple(drawn)


def _to_drawn_mixture(
    recipe: Recipe, partner_N: NDArray[np.int64], mask_MGG: NDArray[np.float32]
) -> DrawnMixture:
    lam_N = np.broadcast_to(kept_share(mask_MGG, recipe.crop_px), partner_N.shape).copy()
    return DrawnMixture(torch.from_numpy(partner_N), torch.from_numpy(lam_N), torch.from_numpy(mask_MGG))


def _cell_masks(mixing: Mixing, draw: Draw) -> NDArray[np.float32]:
    return draw_masks(mixing, draw if mixing.mask_per == "image" else draw.first())


def _fill_value(recipe: Recipe) -> Tensor:
    """The value of erased cells: the normalised mean, which is zero, or normalised black."""
    if recipe.mixing.erase_fill == "mean":
        return torch.zeros(1, 3, 1, 1)
    black = [-mean / std for mean, std in zip(recipe.mean, recipe.std, strict=True)]
    return torch.tensor(black).view(1, 3, 1, 1)


def draw_partner(kind: str, draw: Draw) -> NDArray[np.int64]:
    """(N,) int64: a permutation of the batch without fixed points.

    ``reverse`` reverses the batch. In a batch of odd size the middle image would be its own partner. So the
    middle image gets its right neighbour, and its left neighbour gets the middle image. ``random`` is one
    random cycle through all images.
    """
    num = len(draw.index_N)
    if kind == "random":
        # Sort the batch by random keys. The partner of each image is the next one in that order.
        order_N = bits(draw, Purpose.PARTNER, 1)[:, 0].argsort(kind="stable")
        partner_N = np.empty_like(order_N)
        partner_N[order_N] = np.roll(order_N, -1)
        return partner_N
    partner_N = np.arange(num - 1, -1, -1)
    if num % 2:
        middle = num // 2
        partner_N[middle], partner_N[middle - 1] = middle + 1, middle
    return partner_N


def _unmix_mask(mixing: Mixing, side: int, draw: Draw) -> NDArray[np.float32]:
    """The mask of Un-Mix (arXiv 2003.05438): λ ~ Beta(β, β) per batch; one λ for all pixels, or a rectangle.

    Returns:
        (1, 1, 1) float32 with the value λ, or (1, S, S) with zeros in the rectangle.
    """
    word0, word1 = bits(draw, Purpose.UNMIX, 2)[0].tolist()
    lam = np.random.Generator(np.random.Philox(key=word0 << 32 | word1)).beta(
        mixing.unmix_beta, mixing.unmix_beta
    )
    is_global, centre_y, centre_x = uniform(draw, Purpose.UNMIX, 3, view=1)[0].tolist()
    if is_global < mixing.unmix_global_prob:
        return np.full((1, 1, 1), lam, np.float32)
    half = int(side * (1 - lam) ** 0.5) // 2
    top, left = (max(int(centre * side) - half, 0) for centre in (centre_y, centre_x))
    bottom, right = (min(int(centre * side) + half, side) for centre in (centre_y, centre_x))
    mask = np.ones((1, side, side), np.float32)
    mask[:, top:bottom, left:right] = 0
    return mask


# ------------------------------------------------------------------------------------------------------------
# Masks of cells


def draw_masks(mixing: Mixing, draw: Draw) -> NDArray[np.float32]:
    """(N, G, G) float32 masks of ones (kept) and zeros, of ``mixing.mask_type``, one for each address.

    ``block`` keeps exactly int(mask_lam · G²) cells, in rectangles. ``grid`` keeps each cell independently
    with probability mask_lam, conditioned on at least one cell being kept and one not.
    """
    masks = block_masks if mixing.mask_type == "block" else grid_masks
    return masks(mixing.grid_size, mixing.mask_lam, draw)


def block_masks(grid_size: int, keep: float, draw: Draw) -> NDArray[np.float32]:
    """Masks that keep exactly int(keep · G²) cells, in random rectangles.

    24 rectangles are proposed, of at least four cells and an aspect ratio of 0.3 … 3.3 (arXiv 2210.11456,
    after BEiT). The cells of one rectangle after the other are kept, row by row, until enough cells are kept.
    If the rectangles do not suffice, the remaining cells of the mask are kept row by row.

    Args:
        grid_size: G, at least 2.
        keep: share of cells to keep, with 1 ≤ int(keep · G²) < G².
        draw: the address of the N masks.

    Returns:
        (N, G, G) float32 of ones (kept) and zeros.
    """
    mask_NGG = np.zeros((len(draw.index_N), grid_size, grid_size), np.float32)
    u_NT4 = uniform(draw, Purpose.MASK, 4 * _PROPOSALS).reshape(-1, _PROPOSALS, 4)
    _keep_rectangles(u_NT4, int(keep * grid_size**2), mask_NGG)
    return mask_NGG


@kernel
def _keep_rectangles(u_NT4: NDArray[np.float32], quota: int, mask_NGG: NDArray[np.float32]) -> None:
    grid_size = mask_NGG.shape[1]
    smallest = np.float32(min(_MIN_RECTANGLE_CELLS, quota))
    spread = np.float32(quota) - smallest
    for n in range(len(mask_NGG)):
        mask_GG, num_left = mask_NGG[n], quota
        for u_4 in u_NT4[n]:
            area = smallest + spread * u_4[0]
            aspect = np.exp(np.float32(_LOG_ASPECT) * (np.float32(2) * u_4[1] - np.float32(1)))
            height = min(max(int(np.rint(np.sqrt(area * aspect))), 1), grid_size)
            width = min(max(int(np.rint(np.sqrt(area / aspect))), 1), grid_size)
            # Skip a rectangle that rounding or clamping has made too small.
            if height * width >= smallest:
                top = int(u_4[2] * np.float32(grid_size - height + 1))
                left = int(u_4[3] * np.float32(grid_size - width + 1))
                num_left = _keep(mask_GG, top, left, height, width, num_left)
        _keep(mask_GG, 0, 0, grid_size, grid_size, num_left)


@kernel
def _keep(mask_GG: NDArray[np.float32], top: int, left: int, height: int, width: int, num: int) -> int:
    """Keep up to ``num`` more cells of a rectangle, row by row; returns how many remain to be kept."""
    for row in range(top, top + height):
        for column in range(left, left + width):
            if num and mask_GG[row, column] == 0:
                mask_GG[row, column] = 1
                num -= 1
    return num


def grid_masks(grid_size: int, keep: float, draw: Draw) -> NDArray[np.float32]:
    """Masks that keep each cell independently with probability ``keep``, but never all cells and never none.

    The published code draws again if all or no cells are kept. This function needs no loop: it draws the
    number of kept cells from the binomial distribution restricted to 1 … G² − 1, and then that many cells
    uniformly. The distribution is the same. Arguments and result are those of :func:`block_masks`.
    """
    cells = grid_size**2
    u_N = uniform(draw, Purpose.MASK, 1)[:, 0]
    count_N = np.searchsorted(_restricted_binomial_cdf(cells, keep), u_N, side="right") + 1
    # The random scores rank the cells. View 1 makes them independent of the draw of the count.
    score_NC = uniform(draw, Purpose.MASK, cells, view=1)
    rank_NC = score_NC.argsort(axis=1, kind="stable").argsort(axis=1)
    kept_NC: NDArray[np.bool_] = rank_NC < count_N[:, None]
    return kept_NC.astype(np.float32).reshape(-1, grid_size, grid_size)


@lru_cache(maxsize=32)
def _restricted_binomial_cdf(cells: int, keep: float) -> NDArray[np.float32]:
    """(cells − 2,) P(count ≤ k) for k = 1 … cells − 2, given 0 < count < cells."""
    log_pmf = [
        math.lgamma(cells + 1) - math.lgamma(k + 1) - math.lgamma(cells - k + 1)
        + k * math.log(keep) + (cells - k) * math.log1p(-keep)
        for k in range(1, cells)
    ]  # fmt: skip
    pmf = np.exp(log_pmf)
    return np.asarray((pmf.cumsum() / pmf.sum())[:-1], np.float32)


def cell_of_pixel(grid_size: int, side_px: int, device: torch.device | str = "cpu") -> Tensor:
    """(S,) int64: the cell of each row or column of pixels, as torch's interpolation "nearest" chooses it."""
    return torch.arange(side_px, device=device) * grid_size // side_px


def kept_share(mask_NGG: NDArray[np.float32], side_px: int) -> NDArray[np.float32]:
    """(N,) float32: λ, the mean of each mask enlarged to S × S pixels; S is at least G."""
    grid_size = mask_NGG.shape[-1]
    num_G = np.bincount(cell_of_pixel(grid_size, side_px).numpy(), minlength=grid_size)
    share_N: NDArray[np.float64] = mask_NGG.astype(np.float64) @ num_G @ num_G
    return np.asarray(share_N / side_px**2, np.float32)


# ------------------------------------------------------------------------------------------------------------
# Blending, on the training device


def blend(query: Tensor, drawn: DrawnMixture) -> Mixture:
    """Compute M · x + (1 − M) · x[π]. For erasing, the fill value or noise replaces x[π].

    Args:
        query: (N, 3, S, S) normalised views of any floating dtype; the arithmetic is at least float32.
        drawn: the random decisions, on the same device.

    Returns:
        The mixture; its images have the dtype of ``query`` and are channels_last.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    if drawn.noise_seed is not None:
        # The noise of the whole batch is one sequence, because N · S² addressed numbers would take too long.
        # So erased views depend on the batch, as mixtures do.
        generator = torch.Generator(query.device).manual_seed(drawn.noise_seed)
        other = torch.randn(query.shape, generator=generator, device=query.device)
    elif drawn.fill is not None:
        other = drawn.fill.expand_as(query)
    else:
        other = query[drawn.partner]
    mask = drawn.mask
    if mask.shape[-1] not in (1, query.shape[-1]):
        cell_S = cell_of_pixel(mask.shape[-1], query.shape[-1], query.device)
        mask = mask[:, cell_S][:, :, cell_S]
    images = torch.lerp(other.to(dtype), query.to(dtype), mask[:, None].to(dtype)).to(query.dtype)
    return Mixture(images.contiguous(memory_format=torch.channels_last), drawn.partner, drawn.lam)
