"""Photometric augmentation of a batch: colour jitter, grey, blur, solarise, normalise.

The parameters of every view are drawn on the host (:mod:`pipelines.parameters`) and sent to the device as one
small tensor; the stage itself is batched torch code of fixed shapes with no host sync. An operation that does
not fire for a view has its identity parameter, so all views take the same path. Semantics are torchvision's:
factors and hue as in ``ColorJitter``, its four operations in an order drawn per view, blur with reflected
borders as in ``GaussianBlur``.

Shape letters: N views, S side in pixels, P parameters.
"""

import torch
from torch import Tensor

from pipelines.parameters import (
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


def augment(views: Tensor, params_NP: Tensor, recipe: Recipe) -> Tensor:
    """Apply the photometric operations and normalise.

    Args:
        views: (N, S, S, 3) uint8 crops.
        params_NP: (N, P) float32 of :func:`pipelines.parameters.draw_parameters`, on the same device.
        recipe: mean, std, the largest blur and the place of grey.

    Returns:
        (N, 3, S, S) float32, normalised, channels_last.
    """
    # Planes of one channel each: on a CPU the colour operations run twice as fast on them.
    x = views.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x = x.mul(1 / 255)
    if recipe.grey_before_jitter and recipe.grey_prob > 0:
        x = to_grey(x, params_NP)
    if recipe.jitter_prob > 0:
        x = jitter(x, params_NP)
    if not recipe.grey_before_jitter and recipe.grey_prob > 0:
        x = to_grey(x, params_NP)
    if recipe.blur_prob > 0:
        x = blur(x, params_NP[:, BLUR], recipe.blur_sigma_px[1])
    if recipe.solarize_prob > 0:
        bright = (_column(params_NP, SOLARIZE) > 0) & (x >= SOLARIZE_FROM)
        x = torch.where(bright, 1 - x, x)
    # Numbers, not tensors: a tensor made of them here would be one more upload.
    planes = [
        (plane - mean) / std for plane, mean, std in zip(x.unbind(1), recipe.mean, recipe.std, strict=True)
    ]
    return torch.stack(planes, dim=1).contiguous(memory_format=torch.channels_last)


def _column(params_NP: Tensor, column: int) -> Tensor:
    return params_NP[:, column, None, None, None]


def luma(x: Tensor) -> Tensor:
    """(N, 3, S, S) in [0, 1] → (N, 1, S, S) brightness as the eye weighs it."""
    red, green, blue = LUMA
    return red * x[:, 0:1] + green * x[:, 1:2] + blue * x[:, 2:3]


def to_grey(x: Tensor, params_NP: Tensor) -> Tensor:
    """Make the marked views grey; torchvision's ``RandomGrayscale``."""
    return torch.where(_column(params_NP, GREY) > 0, luma(x), x)


def jitter(x: Tensor, params_NP: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in each view's own order; torchvision's ``ColorJitter``."""
    places_N6 = params_NP[:, PLACES]
    for place in range(3):
        x = _blend(x, params_NP, places_N6[:, place])
    x = shift_hue(x, params_NP[:, HUE])
    for place in range(3, 6):
        x = _blend(x, params_NP, places_N6[:, place])
    return x


def _blend(x: Tensor, params_NP: Tensor, which_N: Tensor) -> Tensor:
    """factor · x + (1 − factor) · other, clamped: other is black, the mean grey, or the grey picture."""
    which = which_N[:, None, None, None]
    grey = luma(x)
    mean_grey = grey.mean(dim=(2, 3), keepdim=True)
    other = torch.where(which == BY_CONTRAST, mean_grey, torch.where(which == BY_SATURATION, grey, 0.0))
    factor = torch.where(
        which == BY_BRIGHTNESS,
        _column(params_NP, BRIGHTNESS),
        torch.where(which == BY_CONTRAST, _column(params_NP, CONTRAST), _column(params_NP, SATURATION)),
    )
    return torch.where(which > 0, torch.lerp(other.expand_as(x), x, factor).clamp(0, 1), x)


def shift_hue(x: Tensor, turns_N: Tensor) -> Tensor:
    """Shift the hue through HSV by the given turns of the colour circle.

    Args:
        x: (N, 3, S, S) float32 in [0, 1].
        turns_N: (N,) float32 in [−0.5, 0.5]; 0 leaves a view as it is.
    """
    red, green, blue = x.unbind(dim=1)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    safe_chroma = torch.where(chroma > 0, chroma, 1.0)
    sector = torch.where(
        value == red,
        (green - blue) / safe_chroma,
        torch.where(value == green, 2 + (blue - red) / safe_chroma, 4 + (red - green) / safe_chroma),
    )
    hue6 = torch.remainder(sector + 6 * turns_N[:, None, None], 6)
    # HSV → RGB in closed form: channel = value − chroma · clamp(min(k, 4 − k), 0, 1), k = (n + hue) mod 6.
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = torch.remainder(offset + hue6, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.where(turns_N[:, None, None, None] != 0, torch.stack(channels, dim=1), x)


def blur(x: Tensor, sigma_N: Tensor, largest_sigma: float) -> Tensor:
    """Gaussian blur with reflected borders, a standard deviation per view.

    Blurring along one axis, border and all, is a product with an S × S band matrix, so the whole batch
    takes two batched products whatever its standard deviations are.

    Args:
        x: (N, 3, S, S) float32.
        sigma_N: (N,) float32 pixels; 0 leaves a view as it is.
        largest_sigma: pixels; see :func:`blur_radius_px`.
    """
    side = x.shape[-1]
    band_NSS = _blur_matrix(sigma_N, side, blur_radius_px(largest_sigma, side))[:, None]
    return band_NSS @ x.contiguous() @ band_NSS.transpose(2, 3)


def _blur_matrix(sigma_N: Tensor, side: int, radius: int) -> Tensor:
    offset_K = torch.arange(-radius, radius + 1, device=sigma_N.device, dtype=torch.float32)
    # No blur is a kernel so narrow that all its weight is at the centre.
    weight_NK = torch.exp(-0.5 * (offset_K / sigma_N[:, None].clamp(min=1e-3)) ** 2)
    weight_NK = weight_NK / weight_NK.sum(dim=1, keepdim=True)
    row_S = torch.arange(side, device=sigma_N.device)
    source_SK = (row_S[:, None] + offset_K.long()).abs()
    source_SK = torch.where(source_SK >= side, 2 * (side - 1) - source_SK, source_SK)
    band_NSS = weight_NK.new_zeros((len(sigma_N), side, side))
    return band_NSS.scatter_add_(
        2,
        source_SK.expand(len(sigma_N), -1, -1),
        weight_NK[:, None].expand(-1, side, -1),
    )
