"""Antialiased bilinear resampling of a crop, in numba, with PIL's own arithmetic.

Two separable passes with a triangle filter that widens when it shrinks, coefficients in 22-bit fixed point
and a rounded uint8 picture between the passes: bit for bit what PIL's ``resize`` of the cropped picture gives
where it too takes the horizontal pass first (Pillow 13 takes the vertical one first where it is cheaper), and
within one grey level of it elsewhere.

Shape letters: H, W of the decoded picture, h, w of the crop, S side of the view, T filter taps.
"""

import numba
import numpy as np
from numpy.typing import NDArray

_PRECISION_BITS = 22
_ROUND = 1 << (_PRECISION_BITS - 1)


@numba.njit(nogil=True, cache=True)
def max_taps(in_px: int, out_px: int) -> int:
    """T: the most input pixels that one output pixel is made of."""
    return int(np.ceil(max(in_px / out_px, 1.0))) * 2 + 1


@numba.njit(nogil=True, cache=True)
def fill_weights(
    in_px: int,
    out_px: int,
    first_S: NDArray[np.int32],
    taps_S: NDArray[np.int32],
    weight_ST: NDArray[np.int32],
) -> None:
    """Write for each output pixel its first input pixel, how many it takes, and their weights × 2²²."""
    scale = in_px / out_px
    support = max(scale, 1.0)
    for out in range(out_px):
        centre = (out + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        taps = min(int(centre + support + 0.5), in_px) - first
        total = 0.0
        for tap in range(taps):
            total += max(1.0 - abs((tap + first - centre + 0.5) / support), 0.0)
        for tap in range(taps):
            share = max(1.0 - abs((tap + first - centre + 0.5) / support), 0.0) / total
            weight_ST[out, tap] = int(share * (1 << _PRECISION_BITS) + 0.5)
        first_S[out] = first
        taps_S[out] = taps


@numba.njit(nogil=True, cache=True)
def resample_crop(
    picture_HW3: NDArray[np.uint8],
    top: int,
    left: int,
    height: int,
    width: int,
    out_SS3: NDArray[np.uint8],
) -> None:
    """Write the crop, resampled to S × S, into ``out_SS3``. The crop must lie within the picture."""
    side = out_SS3.shape[0]
    first_S = np.empty(side, np.int32)
    taps_S = np.empty(side, np.int32)
    weight_ST = np.empty((side, max_taps(max(height, width), side)), np.int32)

    rows_hS3 = np.empty((height, side * 3), np.uint8)
    fill_weights(width, side, first_S, taps_S, weight_ST)
    for y in range(height):
        source = picture_HW3[top + y]
        target = rows_hS3[y]
        for out in range(side):
            red, green, blue = _ROUND, _ROUND, _ROUND
            start = left + first_S[out]
            for tap in range(taps_S[out]):
                weight = weight_ST[out, tap]
                red += weight * source[start + tap, 0]
                green += weight * source[start + tap, 1]
                blue += weight * source[start + tap, 2]
            target[3 * out] = red >> _PRECISION_BITS
            target[3 * out + 1] = green >> _PRECISION_BITS
            target[3 * out + 2] = blue >> _PRECISION_BITS

    fill_weights(height, side, first_S, taps_S, weight_ST)
    sums_C = np.empty(side * 3, np.int32)
    out_SC = out_SS3.reshape(side, side * 3)
    for out in range(side):
        sums_C[:] = _ROUND
        for tap in range(taps_S[out]):
            weight = weight_ST[out, tap]
            row_C = rows_hS3[first_S[out] + tap]
            for c in range(side * 3):
                sums_C[c] += weight * row_C[c]
        for c in range(side * 3):
            out_SC[out, c] = sums_C[c] >> _PRECISION_BITS
