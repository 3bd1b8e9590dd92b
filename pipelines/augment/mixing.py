"""Masked mixing of query views: MixMask, Un-Mix, both, and erasing.

x_m = M · x + (1 − M) · x[π], λ = mean of M: always the share of the anchor (arXiv 2210.11456, section 3).
Partners, masks and λ are drawn on the host and sent to the training device with the batch; the device
blends, in a handful of operations.

Shape letters: N batch, S side in pixels, G cells along a mask's side, M masks (N, or 1 for a whole batch).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.batch import Mixture
from pipelines.augment.masks import cell_of_pixel, draw_masks, kept_share
from pipelines.randomness import Purpose, bits, uniform
from pipelines.recipe import Mixing, Recipe


@dataclass(frozen=True)
class Drawn:
    """The random decisions of one mixture of a batch, on the host or on the training device."""

    partner: Tensor
    """(N,) int64: image i is mixed with image partner[i]; an erased view has itself here."""
    lam: Tensor
    """(N,) float32: the share of the anchor."""
    mask: Tensor
    """(M, G, G) float32; blending enlarges it. G is 1 for a global mixture and S for a pasted rectangle."""
    fill: Tensor | None = None
    """(1, 3, 1, 1) float32: what erased cells hold; None where cells show the partner."""
    noise_seed: int | None = None
    """Of Gaussian noise that erased cells hold in place of ``fill``."""

    def to(self, move: Callable[[Tensor], Tensor]) -> "Drawn":
        """The same with its tensors moved."""
        fill = None if self.fill is None else move(self.fill)
        return Drawn(move(self.partner), move(self.lam), move(self.mask), fill, self.noise_seed)


def draw_mixtures(recipe: Recipe, seed: int, epoch: int, index_N: NDArray[np.int64]) -> tuple[Drawn, ...]:
    """Draw partners, masks and λ for a batch.

    Args:
        recipe: its ``mixing`` says what is drawn; its ``crop_px`` is S.
        seed: of the run.
        epoch: number of the epoch.
        index_N: (N,) int64 positions in the compiled set, which address every draw. Draws of a whole batch
            (`mask_per="batch"`, Un-Mix) are addressed by its first row.

    Returns:
        moco: (); mixmask, unmix, erase: one; both: (unmix, mixmask).

    Raises:
        ValueError: if a batch of one is to be mixed.
    """
    mixing, address = recipe.mixing, (seed, epoch, index_N)
    if mixing.method == "moco":
        return ()
    if mixing.method == "erase":
        own_N = np.arange(len(index_N))
        erased = _drawn(recipe, own_N, _cell_mask(mixing, *address))
        if mixing.erase_fill != "noise":
            return (dataclasses.replace(erased, fill=_fill(recipe)),)
        noise_seed = int(bits(seed, epoch, index_N[:1], Purpose.NOISE, 1)[0, 0])
        return (dataclasses.replace(erased, noise_seed=noise_seed),)
    if len(index_N) < 2:
        raise ValueError("a batch of 1 has no other image to be mixed with; use a batch of at least 2")
    drawn = []
    if mixing.method in ("unmix", "both"):
        kind = mixing.partner if mixing.method == "unmix" else "reverse"
        mask = _unmix_mask(mixing, recipe.crop_px, *address)
        drawn.append(_drawn(recipe, draw_partner(kind, *address), mask))
    if mixing.method in ("mixmask", "both"):
        kind = mixing.partner if mixing.method == "mixmask" else "random"
        drawn.append(_drawn(recipe, draw_partner(kind, *address), _cell_mask(mixing, *address)))
    return tuple(drawn)


def _drawn(recipe: Recipe, partner_N: NDArray[np.int64], mask_MGG: NDArray[np.float32]) -> Drawn:
    lam_N = np.broadcast_to(kept_share(mask_MGG, recipe.crop_px), partner_N.shape).copy()
    return Drawn(torch.from_numpy(partner_N), torch.from_numpy(lam_N), torch.from_numpy(mask_MGG))


def blend(query: Tensor, drawn: Drawn) -> Mixture:
    """M · x + (1 − M) · x[π], or what fills erased cells in place of x[π].

    Args:
        query: (N, 3, S, S) normalised views of any floating dtype; the arithmetic is at least float32.
        drawn: on the same device.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    if drawn.noise_seed is not None:
        # One stream for the whole batch: N · S² addressed draws would cost more than the encoder's input is
        # worth. Erased views therefore depend on the batch, as mixtures do.
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


def draw_partner(kind: str, seed: int, epoch: int, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) int64: a permutation of the batch without fixed points.

    ``reverse``: the batch backwards. In a batch of odd size the middle image would meet itself, so it and
    its left neighbour hand their partners on: a cycle of three. ``random``: a random cycle through all.
    """
    num = len(index_N)
    if kind == "random":
        # Addressed keys order the batch; each image's partner is the next one in that order.
        order_N = bits(seed, epoch, index_N, Purpose.PARTNER, 1)[:, 0].argsort(kind="stable")
        partner_N = np.empty_like(order_N)
        partner_N[order_N] = np.roll(order_N, -1)
        return partner_N
    partner_N = np.arange(num - 1, -1, -1)
    if num % 2:
        middle = num // 2
        partner_N[middle], partner_N[middle - 1] = middle + 1, middle
    return partner_N


def _cell_mask(mixing: Mixing, seed: int, epoch: int, index_N: NDArray[np.int64]) -> NDArray[np.float32]:
    return draw_masks(mixing, seed, epoch, index_N if mixing.mask_per == "image" else index_N[:1])


def _unmix_mask(
    mixing: Mixing, side: int, seed: int, epoch: int, index_N: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Un-Mix (arXiv 2003.05438): λ ~ Beta(β, β) per batch; a global mixture or a pasted rectangle."""
    first_N = index_N[:1]
    word0, word1 = bits(seed, epoch, first_N, Purpose.UNMIX, 2)[0].tolist()
    lam = np.random.Generator(np.random.Philox(key=word0 << 32 | word1)).beta(
        mixing.unmix_beta, mixing.unmix_beta
    )
    is_global, centre_y, centre_x = uniform(seed, epoch, first_N, Purpose.UNMIX, 3, view=1)[0].tolist()
    if is_global < mixing.unmix_global_prob:
        return np.full((1, 1, 1), lam, np.float32)
    half = int(side * (1 - lam) ** 0.5) // 2
    top, left = (max(int(centre * side) - half, 0) for centre in (centre_y, centre_x))
    bottom, right = (min(int(centre * side) + half, side) for centre in (centre_y, centre_x))
    mask = np.ones((1, side, side), np.float32)
    mask[:, top:bottom, left:right] = 0
    return mask


def _fill(recipe: Recipe) -> Tensor:
    """What erased cells hold: the normalised mean, which is zero, or the normalised zero, which is black."""
    if recipe.mixing.erase_fill == "mean":
        return torch.zeros(1, 3, 1, 1)
    black = [-mean / std for mean, std in zip(recipe.mean, recipe.std, strict=True)]
    return torch.tensor(black).view(1, 3, 1, 1)
