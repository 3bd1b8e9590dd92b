"""Photometric augmentation of a batch: flip, colour jitter, grey, blur, solarise, normalise.

The parameters of every view are drawn on the host by address and sent to the device as one small tensor;
the stage itself is batched torch code of fixed shapes with no host sync. An operation that does not fire for
a view gets its identity parameter, so all views take the same path. Semantics are torchvision's: factors and
hue as in ``ColorJitter``, its four operations in an order drawn per view, blur with reflected borders as in
``GaussianBlur``.

Shape letters: N views, S side in pixels, P parameters.
"""

import torch
from torch import Tensor

from pipelines.randomness import Purpose, uniform
from pipelines.recipe import Recipe

# Columns of the parameter tensor.
FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, BLUR, SOLARIZE = range(8)
# Columns 8 … 13: which blend (0 none, 1 brightness, 2 contrast, 3 saturation) goes into each of the three
# places before the hue shift and the three after it.
PLACES = slice(8, 14)
NUM_PARAMETERS = 14
_NUM_DRAWS = 16
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as PIL and torchvision use it


def draw_parameters(recipe: Recipe, seed: int, epoch: int, index_N: Tensor, view: int) -> Tensor:
    """(N, P) float32 parameters of one view of each sample; columns are named at the top of this file."""
    u_ND = uniform(seed, epoch, index_N, Purpose.PHOTOMETRIC, _NUM_DRAWS, view)
    params_NP = torch.zeros(len(index_N), NUM_PARAMETERS)
    params_NP[:, FLIP] = (u_ND[:, 0] < recipe.flip_prob).float()
    params_NP[:, GREY] = (u_ND[:, 2] < recipe.grey_prob).float()
    params_NP[:, SOLARIZE] = (u_ND[:, 3] < recipe.solarize_prob).float()

    low, high = recipe.blur_sigma_px
    sigma_N = low + (high - low) * u_ND[:, 5]
    params_NP[:, BLUR] = torch.where(u_ND[:, 4] < recipe.blur_prob, sigma_N, 0.0)

    jitter_N = u_ND[:, 1] < recipe.jitter_prob
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation)
    for column, strength in zip((BRIGHTNESS, CONTRAST, SATURATION), strengths, strict=True):
        factor_N = 1 + strength * (2 * u_ND[:, 5 + column] - 1)
        params_NP[:, column] = torch.where(jitter_N, factor_N, 1.0)
    params_NP[:, HUE] = torch.where(jitter_N, recipe.hue_turns * (2 * u_ND[:, 9] - 1), 0.0)
    params_NP[:, PLACES] = _blend_places(u_ND[:, 10:14])
    return params_NP


def _blend_places(key_N4: Tensor) -> Tensor:
    """Turn four random keys into an order of brightness, contrast, saturation and hue.

    Hue is the dear one, so it is computed once: blends ordered before it go to the first three places, the
    others to the last three. (N, 6) float32 of 0 … 3.
    """
    rank_N4 = key_N4.argsort(dim=1).argsort(dim=1)
    hue_rank_N1 = rank_N4[:, 3:]
    place_N3 = torch.where(rank_N4[:, :3] < hue_rank_N1, rank_N4[:, :3], rank_N4[:, :3] - hue_rank_N1 - 1 + 3)
    places_N6 = torch.zeros(len(key_N4), 6)
    return places_N6.scatter_(1, place_N3, torch.tensor([[1.0, 2.0, 3.0]]).expand(len(key_N4), 3))


def augment(views: Tensor, params_NP: Tensor, recipe: Recipe) -> Tensor:
    """Apply the photometric operations and normalise.

    Args:
        views: (N, S, S, 3) uint8 crops.
        params_NP: (N, P) float32 of :func:`draw_parameters`, on the same device.
        recipe: mean, std, the largest blur and the place of grey.

    Returns:
        (N, 3, S, S) float32, normalised, channels_last.
    """
    # Planes of one channel each: on a CPU the colour operations run twice as fast on them.
    x = views.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    if recipe.flip_prob > 0:
        x = torch.where(_column(params_NP, FLIP) > 0, x.flip(3), x)
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
        bright = (_column(params_NP, SOLARIZE) > 0) & (x >= 128 / 255)
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
    other = torch.where(which == 2, mean_grey, torch.where(which == 3, grey, 0.0))
    factor = torch.where(
        which == 1,
        _column(params_NP, BRIGHTNESS),
        torch.where(which == 2, _column(params_NP, CONTRAST), _column(params_NP, SATURATION)),
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


def blur_radius_px(largest_sigma: float, side: int) -> int:
    """How far the blur's kernel reaches: three times the largest standard deviation, at most side − 1."""
    return min(int(3 * largest_sigma + 0.5), side - 1)


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
