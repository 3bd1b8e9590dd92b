"""Photometric augmentation of a batch: colour jitter, grey, blur, solarise, normalise.

The input is the uint8 crops of a batch and their parameters (:mod:`pipelines.augment.draws`), on the training
device. The output is normalised views. The operations equal torchvision's: ``ColorJitter``, with an order of
its four operations drawn per view, ``RandomGrayscale``, and ``GaussianBlur`` with reflected borders.

This is batched torch code with fixed shapes and without host syncs. An operation that is not applied to a
view has parameters without effect, so the code has no branches. It is written for torch.compile, which the
loader uses on a GPU. The three colour planes are separate tensors, so all pointwise operations have the same
shape and are fused into one kernel. Contrast needs the mean grey of the view just before it. A first kernel
computes that mean, so the crops are read by only two kernels.

Shape letters: N views, S side in pixels, P parameters, R radius of the blur.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipelines.augment.draws import (
    BLUR,
    BRIGHTNESS,
    BY_BRIGHTNESS,
    BY_CONTRAST,
    BY_SATURATION,
    CONTRAST,
    GREY,
    HUE,
    LUMA,
    PLACES,
    SATURATION,
    SOLARIZE,
    SOLARIZE_FROM,
    blur_radius_px,
)
from pipelines.recipe import Recipe

Planes = tuple[Tensor, Tensor, Tensor]
"""Red, green and blue of N views in [0, 1], (N, S, S) float32 each."""


def augment(views: Tensor, params_NP: Tensor, recipe: Recipe, dtype: torch.dtype = torch.float32) -> Tensor:
    """Apply the photometric operations and normalise.

    Args:
        views: (N, S, S, 3) uint8 crops.
        params_NP: (N, P) float32 of :func:`pipelines.augment.draws.draw_parameters`, on the same device.
        recipe: mean, std, which operations are possible, the largest blur, and the place of greyscale.
        dtype: of the result. The arithmetic is float32, except that for a result of 16 bits the blur
        multiplies
            float16 values; their error is below a grey level.

    Returns:
        (N, 3, S, S) of ``dtype``, normalised, channels_last.
    """
    red, green, blue = (plane.to(torch.float32) * (1 / 255) for plane in views.unbind(3))
    x: Planes = (red, green, blue)
    if recipe.grey_before_jitter and recipe.grey_prob > 0:
        x = to_grey(x, params_NP)
    if recipe.jitter_prob > 0:
        x = jitter(x, params_NP)
    if not recipe.grey_before_jitter and recipe.grey_prob > 0:
        x = to_grey(x, params_NP)
    if recipe.blur_prob > 0:
        blur_dtype = torch.float32 if dtype == torch.float32 else torch.float16
        x = blur(x, params_NP[:, BLUR], recipe.blur_sigma_px[1], blur_dtype)
    if recipe.solarize_prob > 0:
        applied = _column(params_NP, SOLARIZE) > 0
        x = _map_planes(x, lambda plane: torch.where(applied & (plane >= SOLARIZE_FROM), 1 - plane, plane))
    # Mean and std stay Python numbers, because making a tensor of them would be one more upload.
    normalised = [
        ((plane - mean) / std).to(dtype) for plane, mean, std in zip(x, recipe.mean, recipe.std, strict=True)
    ]
    return torch.stack(normalised, dim=3).permute(0, 3, 1, 2)


def _map_planes(x: Planes, change: Callable[[Tensor], Tensor]) -> Planes:
    red, green, blue = x
    return change(red), change(green), change(blue)


def _column(params_NP: Tensor, column: int) -> Tensor:
    return params_NP[:, column, None, None]


def luma(x: Planes) -> Tensor:
    """(N, S, S) luma by ITU-R BT.601: the greyscale view."""
    return LUMA[0] * x[0] + LUMA[1] * x[1] + LUMA[2] * x[2]


def to_grey(x: Planes, params_NP: Tensor) -> Planes:
    """Convert the views with the parameter GREY to greyscale, as torchvision's ``RandomGrayscale``."""
    applied, grey = _column(params_NP, GREY) > 0, luma(x)
    return _map_planes(x, lambda plane: torch.where(applied, grey, plane))


def jitter(x: Planes, params_NP: Tensor) -> Planes:
    """Apply brightness, contrast, saturation and hue in each view's order, as ``ColorJitter`` does."""
    places_N6, turns_N = params_NP[:, PLACES], params_NP[:, HUE]
    # First compute the view just before its contrast, without the operations from the contrast on. The hue
    # shift is between places 2 and 3.
    from_contrast_N6 = (places_N6 == BY_CONTRAST).cumsum(1) > 0
    places_before_N6 = torch.where(from_contrast_N6, 0.0, places_N6)
    turns_before_N = torch.where(from_contrast_N6[:, 2], 0.0, turns_N)
    before = _adjust(x, params_NP, places_before_N6, turns_before_N, None)
    mean_grey = luma(before).mean(dim=(1, 2), keepdim=True)
    return _adjust(x, params_NP, places_N6, turns_N, mean_grey)


def _adjust(
    x: Planes, params_NP: Tensor, places_N6: Tensor, turns_N: Tensor, mean_grey: Tensor | None
) -> Planes:
    for place in range(3):
        x = _blend(x, params_NP, places_N6[:, place, None, None], mean_grey)
    x = shift_hue(x, turns_N)
    for place in range(3, 6):
        x = _blend(x, params_NP, places_N6[:, place, None, None], mean_grey)
    return x


def _blend(x: Planes, params_NP: Tensor, which: Tensor, mean_grey: Tensor | None) -> Planes:
    """factor · x + (1 − factor) · other, clamped; other is black, the mean grey, or the grey image.

    Args:
        x: N views.
        params_NP: their parameters.
        which: (N, 1, 1) number of the blend of each view, 0 for none.
        mean_grey: (N, 1, 1) for contrast; None if ``which`` has no contrast.
    """
    other = torch.where(which == BY_SATURATION, luma(x), 0.0)
    factor = torch.where(
        which == BY_BRIGHTNESS, _column(params_NP, BRIGHTNESS), _column(params_NP, SATURATION)
    )
    if mean_grey is not None:
        other = torch.where(which == BY_CONTRAST, mean_grey, other)
        factor = torch.where(which == BY_CONTRAST, _column(params_NP, CONTRAST), factor)
    applied = which > 0
    return _map_planes(
        x, lambda plane: torch.where(applied, (other + factor * (plane - other)).clamp(0, 1), plane)
    )


def shift_hue(x: Planes, turns_N: Tensor) -> Planes:
    """Shift the hue in HSV by the given turns of the colour circle.

    Args:
        x: of N views.
        turns_N: (N,) float32 in [−0.5, 0.5]; 0 leaves a view as it is.
    """
    red, green, blue = x
    turns = turns_N[:, None, None]
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    safe_chroma = torch.where(chroma > 0, chroma, 1.0)
    sector = torch.where(
        value == red,
        (green - blue) / safe_chroma,
        torch.where(value == green, 2 + (blue - red) / safe_chroma, 4 + (red - green) / safe_chroma),
    )
    hue6 = torch.remainder(sector + 6 * turns, 6)

    # HSV → RGB in closed form: channel = value − chroma · clamp(min(k, 4 − k), 0, 1), k = (n + hue) mod 6.
    def channel(plane: Tensor, offset: float) -> Tensor:
        k = torch.remainder(offset + hue6, 6)
        return torch.where(turns != 0, value - chroma * torch.minimum(k, 4 - k).clamp(0, 1), plane)

    return channel(red, 5.0), channel(green, 3.0), channel(blue, 1.0)


def blur(x: Planes, sigma_N: Tensor, largest_sigma: float, dtype: torch.dtype = torch.float32) -> Planes:
    """Gaussian blur with reflected borders, a standard deviation per view.

    A blur along one axis, including the borders, is a product with an S × S band matrix. So the whole batch
    needs two batched matrix products. The layout (N, S, 3, S), with a row of each plane in turn, allows both
    without a copy.

    Args:
        x: of N views.
        sigma_N: (N,) float32 pixels; 0 leaves a view as it is.
        largest_sigma: in pixels; gives the radius of the kernel, see :func:`blur_radius_px`.
        dtype: of the values that are multiplied; sums are float32.
    """
    rows_NS3S = torch.stack(x, dim=2).to(dtype)
    num, side = rows_NS3S.shape[:2]
    band_NSS = _blur_matrix(sigma_N, side, blur_radius_px(largest_sigma, side)).to(dtype)
    down = torch.bmm(band_NSS, rows_NS3S.view(num, side, 3 * side))
    both = torch.bmm(down.view(num, 3 * side, side), band_NSS.transpose(1, 2))
    red, green, blue = both.view(num, side, 3, side).float().unbind(2)
    return red, green, blue


def _blur_matrix(sigma_N: Tensor, side: int, radius: int) -> Tensor:
    """(N, S, S): row i has the weights of all source pixels for pixel i of a blurred line."""
    # For σ = 0, the kernel is so narrow that all its weight is at the centre.
    slope = -0.5 / sigma_N.clamp(min=1e-3)[:, None, None] ** 2

    def weight(offset: Tensor) -> Tensor:
        return torch.where(offset.abs() <= radius, torch.exp(slope * offset**2), 0.0)

    place_S = torch.arange(side, device=sigma_N.device, dtype=torch.float32)
    target, source = place_S[:, None], place_S[None, :]
    # The line is reflected at its borders: pixel j is also at −j and at 2 (S − 1) − j.
    low, high = -source - target, 2 * (side - 1) - source - target
    matrix_NSS = weight(source - target)
    matrix_NSS = matrix_NSS + torch.where(source > 0, weight(low), 0.0)
    matrix_NSS = matrix_NSS + torch.where(source < side - 1, weight(high), 0.0)
    offset_R = torch.arange(-radius, radius + 1, device=sigma_N.device, dtype=torch.float32)
    return matrix_NSS / weight(offset_R).sum(dim=2, keepdim=True)
