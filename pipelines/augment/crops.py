"""Crop boxes, drawn by address for every backend alike.

A box is (top, left, height, width, mirrored): pixels of the decoded picture, and 1 where the view is flipped
left to right. Flipping belongs to the crop because there it costs nothing.

Shape letters: N samples, V views.
"""

import math

import numpy as np
from numpy.typing import NDArray

from pipelines.kernels.compiled import kernel
from pipelines.randomness import Purpose, key_of, words
from pipelines.recipe import Recipe

_ATTEMPTS = 10
"""Each takes one block of draws: area, ratio, top, left. The block after the last decides the flip."""
_CROP = int(Purpose.CROP)
_UNIT = 2.0**-32


def draw_boxes(
    recipe: Recipe, seed: int, epoch: int, index_N: NDArray[np.int64], size_N2: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Draw the crop boxes of a batch.

    The distribution is torchvision's ``RandomResizedCrop``: ten attempts at an area share uniform in
    ``crop_scale`` and a log-uniform ratio; if none fits, the largest centred box within the ratio range.
    For ``crop="center"`` a square of ``center_share`` times the short side, in the middle.

    Args:
        recipe: crop kind, scale and ratio, probability of a flip.
        seed: of the run.
        epoch: number of the epoch.
        index_N: (N,) int64 positions in the compiled set.
        size_N2: (N, 2) int64 heights and widths in pixels.

    Returns:
        (N, V, 5) int32 boxes, each within its picture and at least one pixel wide and high.
    """
    boxes_NV5 = np.empty((len(index_N), recipe.num_views, 5), np.int32)
    log_ratio = math.log(recipe.crop_ratio[0]), math.log(recipe.crop_ratio[1])
    share = recipe.center_share if recipe.crop == "center" else 0.0
    _draw(
        key_of(seed),
        epoch,
        index_N,
        size_N2,
        recipe.crop_scale,
        log_ratio,
        share,
        recipe.flip_prob,
        boxes_NV5,
    )
    return boxes_NV5


@kernel
def _draw(
    key: int,
    epoch: int,
    index_N: NDArray[np.int64],
    size_N2: NDArray[np.int64],
    scale: tuple[float, float],
    log_ratio: tuple[float, float],
    center_share: float,
    flip_prob: float,
    boxes_NV5: NDArray[np.int32],
) -> None:
    for n in range(len(index_N)):
        height, width = size_N2[n]
        for v in range(boxes_NV5.shape[1]):
            box = boxes_NV5[n, v]
            if center_share > 0:
                _center(height, width, center_share, box)
            else:
                _random(key, epoch, index_N[n], v, height, width, scale, log_ratio, box)
            flip = words(key, epoch, index_N[n], _CROP, v, _ATTEMPTS)[0]
            box[4] = flip * _UNIT < flip_prob


@kernel
def _center(height: int, width: int, share: float, box: NDArray[np.int32]) -> None:
    side = max(1, int(np.rint(min(height, width) * share)))
    box[0], box[1], box[2], box[3] = (height - side) // 2, (width - side) // 2, side, side


@kernel
def _random(
    key: int,
    epoch: int,
    index: int,
    view: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    log_ratio: tuple[float, float],
    box: NDArray[np.int32],
) -> None:
    for attempt in range(_ATTEMPTS):
        drawn = words(key, epoch, index, _CROP, view, attempt)
        area = height * width * (scale[0] + (scale[1] - scale[0]) * (drawn[0] * _UNIT))
        ratio = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * (drawn[1] * _UNIT))
        w, h = int(np.rint(np.sqrt(area * ratio))), int(np.rint(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            box[0] = int(drawn[2] * _UNIT * (height - h + 1))
            box[1] = int(drawn[3] * _UNIT * (width - w + 1))
            box[2], box[3] = h, w
            return
    # None fits: the largest centred box within the ratio's range. Rounding may not take it past its picture.
    low, high = np.exp(log_ratio[0]), np.exp(log_ratio[1])
    w, h = width, height
    if width / height > high:
        w = min(max(1, int(np.rint(height * high))), width)
    elif width / height < low:
        h = min(max(1, int(np.rint(width / low))), height)
    box[0], box[1], box[2], box[3] = (height - h) // 2, (width - w) // 2, h, w
