"""Crop boxes, drawn by address for every backend alike.

A box is (top, left, height, width) in pixels of the decoded picture. Shape letters: N samples, V views.
"""

import math

import torch
from torch import Tensor

from pipelines.randomness import Purpose, bits
from pipelines.recipe import Recipe

_ATTEMPTS = 10
_DRAWS = 4  # area, ratio, top, left


def draw_boxes(
    recipe: Recipe, seed: int, epoch: int, index_N: Tensor, height_N: Tensor, width_N: Tensor
) -> Tensor:
    """Draw the crop boxes of a batch.

    The distribution is torchvision's ``RandomResizedCrop``: ten attempts at an area share uniform in
    ``crop_scale`` and a log-uniform ratio; if none fits, the largest centred box within the ratio range.
    For ``crop="center"`` a square of ``center_share`` times the short side, in the middle.

    Args:
        recipe: crop kind, scale and ratio.
        seed: of the run.
        epoch: number of the epoch.
        index_N: (N,) int64 positions in the compiled set.
        height_N: (N,) int64 pixels.
        width_N: (N,) int64 pixels.

    Returns:
        (N, V, 4) int32 boxes, each within its picture and at least one pixel wide and high.
    """
    if recipe.crop == "center":
        box_N4 = _center_box(recipe.center_share, height_N, width_N)
        return box_N4[:, None].repeat(1, recipe.num_views, 1)
    views = [
        _random_box(
            recipe, bits(seed, epoch, index_N, Purpose.CROP, _ATTEMPTS * _DRAWS, view), height_N, width_N
        )
        for view in range(recipe.num_views)
    ]
    return torch.stack(views, dim=1)


def _center_box(share: float, height_N: Tensor, width_N: Tensor) -> Tensor:
    side_N = (torch.minimum(height_N, width_N).double() * share).round().long().clamp(min=1)
    top_N, left_N = (height_N - side_N) // 2, (width_N - side_N) // 2
    return torch.stack([top_N, left_N, side_N, side_N], dim=1).to(torch.int32)


def _random_box(recipe: Recipe, bits_NR: Tensor, height_N: Tensor, width_N: Tensor) -> Tensor:
    u_NAD = (bits_NR.double() * 2.0**-32).view(-1, _ATTEMPTS, _DRAWS)
    height_N1, width_N1 = height_N[:, None], width_N[:, None]
    low, high = recipe.crop_scale
    area_NA = (height_N1 * width_N1).double() * (low + (high - low) * u_NAD[..., 0])
    log_low, log_high = math.log(recipe.crop_ratio[0]), math.log(recipe.crop_ratio[1])
    ratio_NA = torch.exp(log_low + (log_high - log_low) * u_NAD[..., 1])
    w_NA = torch.sqrt(area_NA * ratio_NA).round().long()
    h_NA = torch.sqrt(area_NA / ratio_NA).round().long()
    fits_NA = (w_NA > 0) & (w_NA <= width_N1) & (h_NA > 0) & (h_NA <= height_N1)
    top_NA = (u_NAD[..., 2] * (height_N1 - h_NA + 1)).floor().long()
    left_NA = (u_NAD[..., 3] * (width_N1 - w_NA + 1)).floor().long()
    boxes_NA4 = torch.stack([top_NA, left_NA, h_NA, w_NA], dim=2)

    # argmax finds the first True: the first attempt that fits.
    first_N = fits_NA.to(torch.uint8).argmax(dim=1)
    drawn_N4 = boxes_NA4[torch.arange(len(first_N)), first_N]
    fallback_N4 = _fallback_box(recipe, height_N, width_N)
    return torch.where(fits_NA.any(dim=1, keepdim=True), drawn_N4, fallback_N4).to(torch.int32)


def _fallback_box(recipe: Recipe, height_N: Tensor, width_N: Tensor) -> Tensor:
    low, high = recipe.crop_ratio
    ratio_N = width_N.double() / height_N.double()
    w_N = torch.where(ratio_N > high, (height_N.double() * high).round().long(), width_N).clamp(min=1)
    h_N = torch.where(ratio_N < low, (width_N.double() / low).round().long(), height_N).clamp(min=1)
    # Rounding may not take a box past its picture.
    w_N, h_N = torch.minimum(w_N, width_N), torch.minimum(h_N, height_N)
    return torch.stack([(height_N - h_N) // 2, (width_N - w_N) // 2, h_N, w_N], dim=1)
