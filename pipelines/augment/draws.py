"""Random crop boxes and random photometric parameters: every view has one box and one row of parameters.

Both are drawn on the host, for every backend in the same way, from the address of the sample
(:mod:`pipelines.randomness`). The decoder crops and flips by the box. :mod:`pipelines.augment.photometric` on
a GPU and :mod:`pipelines.augment.photometric_cpu` on a CPU apply the parameters.

- A box is five int32: top, left, height and width in pixels of the decoded image, and 1 if the view is
  flipped left to right. The flip is part of the box because resampling can write columns in either order at
  no cost.
- The parameters of a view are 13 float32, in the columns named below. An operation that is not applied has
  parameters without effect: factor 1, hue 0, blur 0.

Shape letters: N samples, V views, P parameters.
"""

import math

import numpy as np
from numpy.typing import NDArray

from pipelines.kernels.compiled import kernel
from pipelines.randomness import Draw, Purpose, key_of, words
from pipelines.recipe import Recipe

# Columns of the parameters: factors of brightness, contrast and saturation; hue shift in turns; 1 to make the
# view grey; standard deviation of the blur in pixels; 1 to solarise.
BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, BLUR, SOLARIZE = range(7)
# Columns 7 … 12 hold the random order of the colour jitter: which of the three blends (0 for none) is applied
# at each of three places before the hue shift and at each of three places after it. The hue shift itself has
# a fixed place, so that batched code computes this expensive operation only once.
PLACES = slice(7, 13)
BY_BRIGHTNESS, BY_CONTRAST, BY_SATURATION = 1, 2, 3
NUM_PARAMETERS = 13
SOLARIZE_FROM = 127.5 / 255  # 128 is the first level that is inverted, also after rounding to 16 bits
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL and torchvision use it

_CROP, _PHOTOMETRIC = int(Purpose.CROP), int(Purpose.PHOTOMETRIC)
# Attempts at a random box. Each uses one block of four random numbers: area, ratio, top, left. The block
# after the last attempt decides the flip.
_ATTEMPTS = 10
_PARAMETER_BLOCKS = 4  # blocks of four random numbers for the parameters of one view
_FIRST_PLACE = PLACES.start
_UNIT = 2.0**-32


def draw_boxes(recipe: Recipe, draw: Draw, size_N2: NDArray[np.int64]) -> NDArray[np.int32]:
    """Draw the crop boxes of some samples.

    The distribution is that of torchvision's ``RandomResizedCrop``: ten attempts at an area share uniform in
    ``crop_scale`` and a log-uniform ratio; if no box fits, the largest centred box within the ratio range.
    For ``crop="center"`` the box is a centred square of ``center_share`` times the short side.

    Args:
        recipe: crop kind, scale and ratio, probability of a flip.
        draw: the address of the samples.
        size_N2: (N, 2) int64 heights and widths in pixels.

    Returns:
        (N, V, 5) int32 boxes. Each lies within its image and has at least one pixel.
    """
    boxes_NV5 = np.empty((len(draw.index_N), recipe.num_views, 5), np.int32)
    log_ratio = math.log(recipe.crop_ratio[0]), math.log(recipe.crop_ratio[1])
    share = recipe.center_share if recipe.crop == "center" else 0.0
    _draw_boxes(
        key_of(draw.seed),
        draw.epoch,
        draw.index_N,
        size_N2,
        recipe.crop_scale,
        log_ratio,
        share,
        recipe.flip_prob,
        boxes_NV5,
    )
    return boxes_NV5


@kernel
def _draw_boxes(
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
    """Fill in the boxes; ``center_share`` is 0 for random crops."""
    for n in range(len(index_N)):
        height, width = size_N2[n]
        for v in range(boxes_NV5.shape[1]):
            box = boxes_NV5[n, v]
            if center_share > 0:
                _center_box(height, width, center_share, box)
            else:
                _random_box(key, epoch, index_N[n], v, height, width, scale, log_ratio, box)
            flip = words(key, epoch, index_N[n], _CROP, v, _ATTEMPTS)[0]
            box[4] = flip * _UNIT < flip_prob


@kernel
def _center_box(height: int, width: int, share: float, box: NDArray[np.int32]) -> None:
    side = max(1, int(np.rint(min(height, width) * share)))
    box[0], box[1], box[2], box[3] = (height - side) // 2, (width - side) // 2, side, side


@kernel
def _random_box(
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
    # No attempt fits: take the largest centred box within the ratio range, and no larger than the image.
    low, high = np.exp(log_ratio[0]), np.exp(log_ratio[1])
    w, h = width, height
    if width / height > high:
        w = min(max(1, int(np.rint(height * high))), width)
    elif width / height < low:
        h = min(max(1, int(np.rint(width / low))), height)
    box[0], box[1], box[2], box[3] = (height - h) // 2, (width - w) // 2, h, w


def blur_radius_px(largest_sigma: float, side: int) -> int:
    """Radius of the blur's kernel: three times the largest standard deviation, at most side − 1."""
    return min(int(3 * largest_sigma + 0.5), side - 1)


def draw_parameters(recipe: Recipe, draw: Draw) -> NDArray[np.float32]:
    """Draw the photometric parameters of some samples.

    Args:
        recipe: strengths and probabilities of the operations.
        draw: the address of the samples.

    Returns:
        (V, N, P) float32; the columns are named at the top of this file.
    """
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue_turns)
    probabilities = (recipe.jitter_prob, recipe.grey_prob, recipe.solarize_prob, recipe.blur_prob)
    params_VNP = np.zeros((recipe.num_views, len(draw.index_N), NUM_PARAMETERS), np.float32)
    _draw_parameters(
        key_of(draw.seed),
        draw.epoch,
        draw.index_N,
        strengths,
        probabilities,
        recipe.blur_sigma_px,
        params_VNP,
    )
    return params_VNP


@kernel
def _draw_parameters(
    key: int,
    epoch: int,
    index_N: NDArray[np.int64],
    strengths: tuple[float, float, float, float],
    probabilities: tuple[float, float, float, float],
    sigma_range: tuple[float, float],
    params_VNP: NDArray[np.float32],
) -> None:
    u = np.empty(4 * _PARAMETER_BLOCKS, np.float32)
    for v in range(params_VNP.shape[0]):
        for n in range(len(index_N)):
            for block in range(_PARAMETER_BLOCKS):
                drawn = words(key, epoch, index_N[n], _PHOTOMETRIC, v, block)
                for i in range(4):
                    # The upper 24 bits: as many as a float32 in [0, 1) can hold.
                    u[4 * block + i] = np.float32(drawn[i] >> 8) * np.float32(2.0**-24)
            params = params_VNP[v, n]
            jitter = u[0] < probabilities[0]
            params[GREY] = u[1] < probabilities[1]
            params[SOLARIZE] = u[2] < probabilities[2]
            if u[3] < probabilities[3]:
                params[BLUR] = sigma_range[0] + (sigma_range[1] - sigma_range[0]) * u[4]
            for column in range(3):
                strength = strengths[column] if jitter else 0.0
                params[BRIGHTNESS + column] = 1 + strength * (2 * u[5 + column] - 1)
            params[HUE] = strengths[3] * (2 * u[8] - 1) if jitter else 0.0
            _order_jitters(u[9:13], params)


@kernel
def _order_jitters(key_4: NDArray[np.float32], params: NDArray[np.float32]) -> None:
    """Fill in the places: sort brightness, contrast, saturation and hue by their random keys."""
    hue_rank = 0
    for j in range(3):
        hue_rank += key_4[j] <= key_4[3]
    for which in range(3):
        rank = key_4[3] < key_4[which]
        for j in range(3):
            rank += key_4[j] < key_4[which] or (key_4[j] == key_4[which] and j < which)
        place = rank if rank < hue_rank else rank - hue_rank - 1 + 3
        params[_FIRST_PLACE + place] = which + 1
