"""The photometric stage for machines without a GPU: one view at a time, in compiled loops.

In: uint8 crops and the parameters of :mod:`pipelines.augment.draws`. Out: normalised float32 views. The
operations and their order are those of :mod:`pipelines.augment.photometric`, and results are equal within a
hundredth of a grey level (a test holds that).

The batched stage makes about forty passes over a whole batch. This module makes at most three passes over a
view. Passes 1 and 2 work on pieces of about a thousand pixels, which stay in the L1 cache:

1. All operations before the contrast. Contrast needs the mean grey of their result. A view without contrast
   skips this pass.
2. All other operations, up to the blur along rows.
3. The blur along columns, only for views with a blur.

The last pass also solarises and normalises. An operation that is not applied to a view costs nothing. The
three colour planes are separate arrays, so every loop runs over contiguous float32 and vectorises.

No kernel here uses fastmath. With fastmath the last bits depend on where a function is inlined, so a kernel
loaded from the disk cache would differ from the same kernel just compiled.

Shape letters: N batch, V views, S side in pixels, C pixels of a piece, P parameters, K blur taps.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.augment.draws import (
    BLUR,
    BRIGHTNESS,
    BY_CONTRAST,
    BY_SATURATION,
    GREY,
    HUE,
    LUMA,
    PLACES,
    SOLARIZE,
    SOLARIZE_FROM,
    blur_radius_px,
)
from pipelines.kernels.compiled import kernel
from pipelines.recipe import Recipe

_Floats = NDArray[np.float32]
_Planes = tuple[_Floats, _Floats, _Floats]
"""Red, green and blue in [0, 1], (C,) each."""
_RED, _GREEN, _BLUE = (np.float32(share) for share in LUMA)
_FIRST_PLACE = PLACES.start
_PIECE_PX = 1024
_HUE, _GREY = 4, 5  # numbers of operations, after the three blends


class _Scratch(NamedTuple):
    """Memory for one view."""

    x_3C: _Floats  # (3, S²) planes between passes 1 and 2
    rows_3C: _Floats  # (3, S²) planes blurred along rows
    weight_K: _Floats  # blur weights of the centre and of one side
    padded: _Floats  # one row with its reflected borders
    operations: NDArray[np.int64]  # operations that are applied to the view, in their order


def augment_on_cpu(
    views_NVSS3: NDArray[np.uint8],
    params_VNP: _Floats,
    recipe: Recipe,
    out_VNSS3: _Floats,
    first: int = 0,
) -> None:
    """Apply the photometric operations and normalise; see :func:`pipelines.augment.photometric.augment`.

    Runs on the calling thread without the GIL, so several threads may work on one batch.

    Args:
        views_NVSS3: (n, V, S, S, 3) uint8 crops.
        params_VNP: (V, n, P) float32 of :func:`pipelines.augment.draws.draw_parameters`.
        recipe: mean, std, the largest blur, and whether grey comes before the jitter.
        out_VNSS3: (V, N, S, S, 3) float32; samples first … first + n − 1 are written.
        first: position of these samples in the batch.
    """
    scale = np.float32(1) / np.array(recipe.std, np.float32)
    offset = np.array(recipe.mean, np.float32) * -scale
    radius = blur_radius_px(recipe.blur_sigma_px[1], out_VNSS3.shape[2])
    grey_first = recipe.grey_before_jitter
    _augment_views(views_NVSS3, params_VNP, (scale, offset), radius, grey_first, out_VNSS3, first)


@kernel
def _augment_views(
    views_NVSS3: NDArray[np.uint8],
    params_VNP: _Floats,
    normalise: tuple[_Floats, _Floats],
    radius: int,
    grey_first: bool,
    out_VNSS3: _Floats,
    first: int,
) -> None:
    num, num_views, side = views_NVSS3.shape[:3]
    # The blur adds taps three at a time on each side.
    reach = -(-radius // 3) * 3
    scratch = _Scratch(
        np.empty((3, side * side), np.float32),
        np.empty((3, side * side), np.float32),
        np.empty(reach + 1, np.float32),
        np.zeros(side + 2 * reach, np.float32),
        np.empty(8, np.int64),
    )
    for v in range(num_views):
        for n in range(num):
            params = params_VNP[v, n]
            view_C3, out_C3 = views_NVSS3[n, v].reshape(-1), out_VNSS3[v, first + n].reshape(-1)
            operations = scratch.operations[: _list_operations(params, grey_first, scratch.operations)]
            view_radius = _blur_weights(params[BLUR], radius, scratch.weight_K)
            _augment_view(view_C3, side, params, operations, normalise, view_radius, scratch, out_C3)


@kernel
def _list_operations(params: _Floats, grey_first: bool, operations: NDArray[np.int64]) -> int:
    """List the operations that are applied to one view, in their order; returns how many."""
    num = 0
    if grey_first and params[GREY] > 0:
        operations[num] = _GREY
        num += 1
    for place in range(7):
        operation = _HUE if place == 3 else int(params[_FIRST_PLACE + place - (place > 3)])
        is_identity = params[HUE] == 0 if operation == _HUE else params[BRIGHTNESS - 1 + operation] == 1
        if operation > 0 and not is_identity:
            operations[num] = operation
            num += 1
    if not grey_first and params[GREY] > 0:
        operations[num] = _GREY
        num += 1
    return num


@kernel
def _augment_view(
    view_C3: NDArray[np.uint8],
    side: int,
    params: _Floats,
    operations: NDArray[np.int64],
    normalise: tuple[_Floats, _Floats],
    radius: int,
    scratch: _Scratch,
    out_C3: _Floats,
) -> None:
    """Augment one view in at most three passes; ``radius`` is 0 for no blur."""
    size, solarize = side * side, params[SOLARIZE] > 0
    piece = max(1, _PIECE_PX // side) * side
    contrast_at = len(operations)
    for place in range(len(operations)):
        if operations[place] == BY_CONTRAST:
            contrast_at = place
    has_contrast = contrast_at < len(operations)
    grey = np.float32(0)
    if has_contrast:
        grey = _apply_until_contrast(view_C3, piece, operations[:contrast_at], params, scratch.x_3C)
    for start in range(0, size, piece):
        stop = min(start + piece, size)
        # Without pass 1, all pieces use the same memory, which stays in the cache.
        at = start if has_contrast else 0
        rgb = _slice_planes(scratch.x_3C, at, at + stop - start)
        if has_contrast:
            for plane in rgb:
                _blend(plane, params[BRIGHTNESS - 1 + BY_CONTRAST], grey)
            _apply(operations[contrast_at + 1 :], params, rgb)
        else:
            _load(view_C3[3 * start : 3 * stop], rgb)
            _apply(operations, params, rgb)
        if radius > 0:
            for c in range(3):
                blurred = scratch.rows_3C[c, start:stop]
                _blur_rows(rgb[c], side, scratch.weight_K, scratch.padded, blurred)
        else:
            _store(rgb, solarize, normalise, out_C3[3 * start : 3 * stop])
    if radius > 0:
        row = _slice_planes(scratch.x_3C, 0, side)
        for y in range(side):
            for c in range(3):
                _blur_column(scratch.rows_3C[c], y, side, scratch.weight_K, row[c])
            _store(row, solarize, normalise, out_C3[3 * y * side : 3 * (y + 1) * side])


@kernel
def _apply_until_contrast(
    view_C3: NDArray[np.uint8], piece: int, operations: NDArray[np.int64], params: _Floats, x_3C: _Floats
) -> np.float32:
    """Pass 1: apply the operations before the contrast; returns the mean grey of the result."""
    size, total = x_3C.shape[1], 0.0
    for start in range(0, size, piece):
        stop = min(start + piece, size)
        rgb = _slice_planes(x_3C, start, stop)
        _load(view_C3[3 * start : 3 * stop], rgb)
        _apply(operations, params, rgb)
        total += _sum_of_luma(rgb)
    return np.float32(total / size)


@kernel
def _slice_planes(x_3C: _Floats, start: int, stop: int) -> _Planes:
    return x_3C[0, start:stop], x_3C[1, start:stop], x_3C[2, start:stop]


@kernel
def _load(view_C3: NDArray[np.uint8], rgb: _Planes) -> None:
    """Separate interleaved bytes into planes in [0, 1]."""
    red, green, blue = rgb
    unit = np.float32(1 / 255)
    for i in range(len(red)):
        red[i] = view_C3[3 * i] * unit
        green[i] = view_C3[3 * i + 1] * unit
        blue[i] = view_C3[3 * i + 2] * unit


@kernel
def _apply(operations: NDArray[np.int64], params: _Floats, rgb: _Planes) -> None:
    """Apply the listed operations in place. Contrast cannot be among them."""
    for operation in operations:
        if operation == _HUE:
            _shift_hue(rgb, np.float32(6 * params[HUE]))
        elif operation == _GREY:
            _blend_with_grey(rgb, np.float32(0))
        elif operation == BY_SATURATION:
            _blend_with_grey(rgb, params[BRIGHTNESS - 1 + operation])
        else:
            for plane in rgb:
                _blend(plane, params[BRIGHTNESS - 1 + operation], np.float32(0))


@kernel
def _blend(plane: _Floats, factor: np.float32, other: np.float32) -> None:
    """factor · x + (1 − factor) · other, clamped: brightness with 0, contrast with the mean grey."""
    rest = (np.float32(1) - factor) * other
    for i in range(len(plane)):
        plane[i] = min(max(factor * plane[i] + rest, np.float32(0)), np.float32(1))


@kernel
def _blend_with_grey(rgb: _Planes, factor: np.float32) -> None:
    """factor · x + (1 − factor) · grey of the pixel, clamped: saturation, or greyscale with factor 0."""
    red, green, blue = rgb
    rest = np.float32(1) - factor
    for i in range(len(red)):
        grey = rest * (_RED * red[i] + _GREEN * green[i] + _BLUE * blue[i])
        red[i] = min(max(factor * red[i] + grey, np.float32(0)), np.float32(1))
        green[i] = min(max(factor * green[i] + grey, np.float32(0)), np.float32(1))
        blue[i] = min(max(factor * blue[i] + grey, np.float32(0)), np.float32(1))


@kernel
def _sum_of_luma(rgb: _Planes) -> float:
    """Sum of the grey of all pixels, as sixteen parallel sums, because one running sum does not vectorise."""
    red, green, blue = rgb
    sums = np.zeros(16, np.float32)
    whole = len(red) // 16 * 16
    for start in range(0, whole, 16):
        for j in range(16):
            i = start + j
            sums[j] += _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]
    total = 0.0
    for j in range(16):
        total += sums[j]
    for i in range(whole, len(red)):
        total += _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]
    return total


@kernel
def _shift_hue(rgb: _Planes, shift: np.float32) -> None:
    """Shift the hue as :func:`.photometric.shift_hue` does; ``shift`` is in sixths of a turn."""
    red, green, blue = rgb
    zero, one, four, six = np.float32(0), np.float32(1), np.float32(4), np.float32(6)
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        value = max(r, max(g, b))
        chroma = value - min(r, min(g, b))
        inverse = one / chroma if chroma > zero else zero
        by_blue = four + (r - g) * inverse
        by_green = np.float32(2) + (b - r) * inverse
        by_red = (g - b) * inverse
        hue = (by_red if value == r else (by_green if value == g else by_blue)) + shift
        hue = hue + six if hue < zero else hue
        hue = hue - six if hue >= six else hue
        k = hue + np.float32(5)
        k = k - six if k >= six else k
        red[i] = value - chroma * min(max(min(k, four - k), zero), one)
        k = hue + np.float32(3)
        k = k - six if k >= six else k
        green[i] = value - chroma * min(max(min(k, four - k), zero), one)
        k = hue + one
        k = k - six if k >= six else k
        blue[i] = value - chroma * min(max(min(k, four - k), zero), one)


@kernel
def _blur_weights(sigma: np.float32, largest_radius: int, weight_K: _Floats) -> int:
    """Fill in the weights, zero beyond the radius; returns the radius, 0 for no blur.

    Beyond 4.5 σ a weight is below 5e-5 and is left out.
    """
    if sigma <= 0:
        return 0
    radius = min(largest_radius, int(4.5 * sigma) + 1)
    total = 0.0
    for k in range(len(weight_K)):
        weight_K[k] = np.exp(-0.5 * (k / sigma) ** 2) if k <= radius else 0.0
        total += weight_K[k] if k == 0 else 2 * weight_K[k]
    for k in range(len(weight_K)):
        weight_K[k] /= np.float32(total)
    return radius


@kernel
def _blur_rows(source_C: _Floats, side: int, weight_K: _Floats, padded: _Floats, target_C: _Floats) -> None:
    """Blur along each row, borders reflected."""
    reach = len(weight_K) - 1
    for at in range(0, len(source_C), side):
        row, target = source_C[at : at + side], target_C[at : at + side]
        padded[reach : reach + side] = row
        for k in range(min(reach, side - 1)):
            padded[reach - 1 - k] = row[k + 1]
            padded[reach + side + k] = row[side - 2 - k]
        weight = weight_K[0]
        for x in range(side):
            target[x] = weight * row[x]
        for k in range(1, reach, 3):
            if weight_K[k] == 0:
                break
            left = padded[reach - k - 2 : reach - k + side]
            right = padded[reach + k : reach + k + 2 + side]
            _add_three(left, right, weight_K[k], weight_K[k + 1], weight_K[k + 2], target)


@kernel
def _add_three(
    left: _Floats, right: _Floats, near: np.float32, middle: np.float32, far: np.float32, target: _Floats
) -> None:
    """Add three taps of each side to a row."""
    for x in range(len(target)):
        target[x] += (
            near * (left[x + 2] + right[x])
            + middle * (left[x + 1] + right[x + 1])
            + far * (left[x] + right[x + 2])
        )


@kernel
def _blur_column(rows_C: _Floats, y: int, side: int, weight_K: _Floats, target: _Floats) -> None:
    """Row y of the blur along columns, borders reflected."""
    weight, row = weight_K[0], rows_C[y * side : (y + 1) * side]
    for x in range(side):
        target[x] = weight * row[x]
    for k in range(1, len(weight_K), 3):
        if weight_K[k] == 0:
            break
        up_1, down_1 = _reflected(rows_C, y - k, side), _reflected(rows_C, y + k, side)
        up_2, down_2 = _reflected(rows_C, y - k - 1, side), _reflected(rows_C, y + k + 1, side)
        up_3, down_3 = _reflected(rows_C, y - k - 2, side), _reflected(rows_C, y + k + 2, side)
        near, middle, far = weight_K[k], weight_K[k + 1], weight_K[k + 2]
        for x in range(side):
            target[x] += (
                near * (up_1[x] + down_1[x]) + middle * (up_2[x] + down_2[x]) + far * (up_3[x] + down_3[x])
            )


@kernel
def _reflected(rows_C: _Floats, y: int, side: int) -> _Floats:
    """Row y of the view; rows beyond the border are reflected."""
    y = abs(y)
    y = y if y < side else max(2 * (side - 1) - y, 0)
    return rows_C[y * side : (y + 1) * side]


@kernel
def _store(rgb: _Planes, solarize: bool, normalise: tuple[_Floats, _Floats], out_C3: _Floats) -> None:
    """Solarise if ``solarize``, normalise, and interleave the planes."""
    red, green, blue = rgb
    scale_3, offset_3 = normalise
    if solarize:
        for plane in rgb:
            for i in range(len(plane)):
                x = plane[i]
                plane[i] = np.float32(1) - x if x >= np.float32(SOLARIZE_FROM) else x
    for i in range(len(red)):
        out_C3[3 * i] = red[i] * scale_3[0] + offset_3[0]
        out_C3[3 * i + 1] = green[i] * scale_3[1] + offset_3[1]
        out_C3[3 * i + 2] = blue[i] * scale_3[2] + offset_3[2]
