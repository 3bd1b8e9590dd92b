"""Masked mixing of query views: MixMask, Un-Mix, both, and erasing. Batched on the training device.

x_m = M · x + (1 − M) · x[π], λ = mean of M: always the share of the anchor (arXiv 2210.11456, section 3).
Shape letters: N batch, S side in pixels, G cells along a mask's side.
"""

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Mixture
from pipelines.masks import draw_masks, upsample_masks
from pipelines.randomness import Purpose, bits, uniform
from pipelines.recipe import Mixing, Recipe


def mix(recipe: Recipe, seed: int, epoch: int, index_N: Tensor, query: Tensor) -> tuple[Mixture, ...]:
    """Mix the query views of a batch as the recipe says.

    Args:
        recipe: its ``mixing`` tells what, its mean and std what black is.
        seed: of the run.
        epoch: number of the epoch.
        index_N: (N,) int64 positions in the compiled set, on the host: they address every draw. Draws of
            a whole batch (`mask_per="batch"`, Un-Mix) are addressed by its first row.
        query: (N, 3, S, S) float32 normalised views.

    Returns:
        moco: (); mixmask, unmix, erase: one mixture; both: (unmix, mixmask).

    Raises:
        ValueError: if a batch of one is to be mixed, or the views are smaller than the mask.
    """
    mixing = recipe.mixing
    if mixing.method == "moco":
        return ()
    # The host's copy decides what a host must decide, so that nothing waits for the device.
    device_index_N = index_N.to(query.device, non_blocking=True)
    if mixing.method == "erase":
        return (_erase(recipe, seed, epoch, index_N, device_index_N, query),)
    if len(query) < 2:
        raise ValueError("a batch of 1 has nobody to be mixed with; use a batch of at least 2")
    mixtures = []
    if mixing.method in ("unmix", "both"):
        partner = mixing.partner if mixing.method == "unmix" else "reverse"
        partner_N = draw_partner(partner, seed, epoch, device_index_N)
        mask, lam_N = _unmix_mask(mixing, seed, epoch, index_N, query)
        mixtures.append(blend(query, partner_N, mask, lam_N))
    if mixing.method in ("mixmask", "both"):
        partner = mixing.partner if mixing.method == "mixmask" else "random"
        partner_N = draw_partner(partner, seed, epoch, device_index_N)
        mask, lam_N = _cell_mask(mixing, seed, epoch, device_index_N, query)
        mixtures.append(blend(query, partner_N, mask, lam_N))
    return tuple(mixtures)


def blend(query: Tensor, partner_N: Tensor, mask: Tensor, lam_N: Tensor) -> Mixture:
    """M · x + (1 − M) · x[π] for a mask that broadcasts to (N, 1, S, S)."""
    images = torch.lerp(query[partner_N], query, mask)
    return Mixture(images.contiguous(memory_format=torch.channels_last), partner_N, lam_N)


def draw_partner(kind: str, seed: int, epoch: int, index_N: Tensor) -> Tensor:
    """(N,) int64: a permutation of the batch without fixed points.

    ``reverse``: the batch backwards. In a batch of odd size the middle image would meet itself, so it and
    its left neighbour hand their partners on: a cycle of three. ``random``: a random cycle through all.
    """
    num = len(index_N)
    if kind == "random":
        # Addressed keys order the batch; each image's partner is the next one in that order.
        order_N = bits(seed, epoch, index_N, Purpose.PARTNER, 1)[:, 0].argsort(stable=True)
        partner_N = torch.empty_like(order_N)
        partner_N[order_N] = order_N.roll(-1)
        return partner_N
    partner_N = torch.arange(num - 1, -1, -1, device=index_N.device)
    if num % 2:
        middle = num // 2
        partner_N[middle], partner_N[middle - 1] = middle + 1, middle
    return partner_N


def _cell_mask(
    mixing: Mixing, seed: int, epoch: int, index_N: Tensor, query: Tensor
) -> tuple[Tensor, Tensor]:
    address_N = index_N if mixing.mask_per == "image" else index_N[:1]
    mask_NGG = draw_masks(mixing, seed, epoch, address_N)
    mask, lam_N = upsample_masks(mask_NGG, query.shape[-1])
    return mask, lam_N.expand(len(query))


def _unmix_mask(
    mixing: Mixing, seed: int, epoch: int, index_N: Tensor, query: Tensor
) -> tuple[Tensor, Tensor]:
    """Un-Mix (arXiv 2003.05438): λ ~ Beta(β, β) per batch; a global mixture or a pasted rectangle."""
    side = query.shape[-1]
    first_N = index_N[:1]
    word0, word1 = bits(seed, epoch, first_N, Purpose.UNMIX, 2)[0].tolist()
    lam = np.random.Generator(np.random.Philox(key=word0 << 32 | word1)).beta(
        mixing.unmix_beta, mixing.unmix_beta
    )
    is_global, centre_y, centre_x = uniform(seed, epoch, first_N, Purpose.UNMIX, 3, view=1)[0].tolist()
    if is_global < mixing.unmix_global_prob:
        mask = torch.full((1, 1, 1, 1), lam, dtype=torch.float32, device=query.device)
        return mask, mask.view(1).expand(len(query))
    half = int(side * (1 - lam) ** 0.5) // 2
    top, left = (max(int(centre * side) - half, 0) for centre in (centre_y, centre_x))
    bottom, right = (min(int(centre * side) + half, side) for centre in (centre_y, centre_x))
    mask = torch.ones((1, 1, side, side), device=query.device)
    mask[..., top:bottom, left:right] = 0
    return mask, mask.mean(dim=(1, 2, 3)).expand(len(query))


def _erase(
    recipe: Recipe, seed: int, epoch: int, index_N: Tensor, device_index_N: Tensor, query: Tensor
) -> Mixture:
    mixing = recipe.mixing
    mask, lam_N = _cell_mask(mixing, seed, epoch, device_index_N, query)
    if mixing.erase_fill == "noise":
        # One stream for the whole batch, addressed by its first row: N · S² addressed draws would cost more
        # than the encoder's input is worth. Erased views therefore depend on the batch, as mixtures do.
        word = int(bits(seed, epoch, index_N[:1], Purpose.NOISE, 1).item())
        generator = torch.Generator(query.device).manual_seed(word)
        fill = torch.randn(query.shape, generator=generator, device=query.device)
    elif mixing.erase_fill == "mean":
        fill = query.new_zeros((1, 3, 1, 1))
    else:
        fill = query.new_empty((1, 3, 1, 1))
        for channel, (mean, std) in enumerate(zip(recipe.mean, recipe.std, strict=True)):
            fill[:, channel] = -mean / std
    images = torch.lerp(fill.expand_as(query), query, mask).contiguous(memory_format=torch.channels_last)
    # Nobody is mixed in: every erased view is its own partner.
    return Mixture(images, torch.arange(len(query), device=query.device), lam_N)
