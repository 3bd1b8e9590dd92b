"""The photometric stage for machines without a GPU: the same operations, one view at a time, in numba.

:mod:`pipelines.augment.photometric` takes some forty passes over a whole batch. Here a view is swept at most
three times, in pieces that stay in the nearest cache: up to the contrast, which needs the mean of all that
came before it; from there through the blur along rows; and the blur along columns. Operations that do not
fire cost nothing. Equal to the batched stage within a hundredth of a grey level, held by test.

Shape letters: N batch, V views, S side in pixels, C pixels of a piece, P parameters, K blur taps.
"""

import numpy as np
from numpy.typing import NDArray

from pipelines.augment.parameters import (
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
_RED, _GREEN, _BLUE = (np.float32(share) for share in LUMA)
_FIRST_PLACE = PLACES.start
_PIECE_PX = 1024
_HUE, _GREY = 4, 5  # after the three blends
# No fastmath anywhere: what the compiler makes of it depends on where a function is inlined, and a kernel
# loaded from the cache would differ in its last bits from the one just compiled.


def augment_on_cpu(
    views_NVSS3: NDArray[np.uint8],
    params_VNP: NDArray[np.float32],
    recipe: Recipe,
    out_VNSS3: NDArray[np.float32],
    first: int = 0,
) -> None:
    """Apply the photometric operations and normalise; see :func:`pipelines.augment.photometric.augment`.

    Runs on the calling thread and without the interpreter's lock, so several threads may share a batch.

    Args:
        views_NVSS3: (n, V, S, S, 3) uint8 crops.
        params_VNP: (V, n, P) float32 of :func:`pipelines.augment.parameters.draw_parameters`.
        recipe: mean, std, the largest blur and the place of grey.
        out_VNSS3: (V, N, S, S, 3) float32, whose samples first … first + n − 1 are written.
        first: where in the batch these samples stand.
    """
    scale = np.float32(1) / np.array(recipe.std, np.float32)
    offset = np.array(recipe.mean, np.float32) * -scale
    _augment_views(
        views_NVSS3,
        params_VNP,
        offset,
        scale,
        blur_radius_px(recipe.blur_sigma_px[1], out_VNSS3.shape[2]),
        recipe.grey_before_jitter,
        out_VNSS3,
        first,
    )


@kernel
def _augment_views(
    views_NVSS3: NDArray[np.uint8],
    params_VNP: _Floats,
    offset_3: _Floats,
    scale_3: _Floats,
    radius: int,
    grey_first: bool,
    out_VNSS3: _Floats,
    first: int,
) -> None:
    num, num_views, side = views_NVSS3.shape[:3]
    x_3C = np.empty((3, side * side), np.float32)
    rows_3C = np.empty((3, side * side), np.float32)
    # The blur takes taps three at a time from each side.
    reach = -(-radius // 3) * 3
    weight_K = np.empty(reach + 1, np.float32)
    padded = np.zeros(side + 2 * reach, np.float32)
    program = np.empty(8, np.int64)
    for v in range(num_views):
        for n in range(num):
            params = params_VNP[v, n]
            _augment_view(
                views_NVSS3[n, v].reshape(side * side * 3),
                side,
                params,
                program[: _write_program(params, grey_first, program)],
                offset_3,
                scale_3,
                _blur_weights(params[BLUR], radius, weight_K),
                weight_K,
                padded,
                x_3C,
                rows_3C,
                out_VNSS3[v, first + n].reshape(side * side * 3),
            )


@kernel
def _write_program(params: _Floats, grey_first: bool, program: NDArray[np.int64]) -> int:
    """List the operations of one view that fire, in their order; returns how many."""
    num = 0
    if grey_first and params[GREY] > 0:
        program[num] = _GREY
        num += 1
    for place in range(7):
        which = _HUE if place == 3 else int(params[_FIRST_PLACE + place - (place > 3)])
        idle = params[HUE] == 0 if which == _HUE else params[BRIGHTNESS - 1 + which] == 1
        if which > 0 and not idle:
            program[num] = which
            num += 1
    if not grey_first and params[GREY] > 0:
        program[num] = _GREY
        num += 1
    return num


@kernel
def _augment_view(
    view_C3: NDArray[np.uint8],
    side: int,
    params: _Floats,
    program: NDArray[np.int64],
    offset_3: _Floats,
    scale_3: _Floats,
    radius: int,
    weight_K: _Floats,
    padded: _Floats,
    x_3C: _Floats,
    rows_3C: _Floats,
    out_C3: _Floats,
) -> None:
    size = side * side
    piece = max(1, _PIECE_PX // side) * side
    split = len(program)
    for place in range(len(program)):
        if program[place] == BY_CONTRAST:
            split = place
    grey = np.float32(0)
    if split < len(program):
        total = 0.0
        for start in range(0, size, piece):
            stop = min(start + piece, size)
            red, green, blue = x_3C[0, start:stop], x_3C[1, start:stop], x_3C[2, start:stop]
            _load(view_C3[3 * start : 3 * stop], red, green, blue)
            _run(program[:split], params, red, green, blue)
            total += _sum_of_luma(red, green, blue)
        grey = np.float32(total / size)
    for start in range(0, size, piece):
        stop = min(start + piece, size)
        # Without a sweep before this one, one piece of memory serves them all and stays in the cache.
        at = start if split < len(program) else 0
        end = at + stop - start
        red, green, blue = x_3C[0, at:end], x_3C[1, at:end], x_3C[2, at:end]
        if split < len(program):
            for c in range(3):
                _mix_with(x_3C[c, at:end], params[BRIGHTNESS - 1 + BY_CONTRAST], grey)
            _run(program[split + 1 :], params, red, green, blue)
        else:
            _load(view_C3[3 * start : 3 * stop], red, green, blue)
            _run(program, params, red, green, blue)
        if radius > 0:
            for c in range(3):
                _blur_rows(x_3C[c, at:end], side, weight_K, padded, rows_3C[c, start:stop])
        else:
            _store(red, green, blue, params[SOLARIZE] > 0, offset_3, scale_3, out_C3[3 * start : 3 * stop])
    if radius > 0:
        red, green, blue = x_3C[0, :side], x_3C[1, :side], x_3C[2, :side]
        for y in range(side):
            for c in range(3):
                _blur_column(rows_3C[c], y, side, weight_K, x_3C[c, :side])
            at = 3 * y * side
            _store(red, green, blue, params[SOLARIZE] > 0, offset_3, scale_3, out_C3[at : at + 3 * side])


@kernel
def _load(view_C3: NDArray[np.uint8], red: _Floats, green: _Floats, blue: _Floats) -> None:
    unit = np.float32(1 / 255)
    for i in range(len(red)):
        red[i] = view_C3[3 * i] * unit
        green[i] = view_C3[3 * i + 1] * unit
        blue[i] = view_C3[3 * i + 2] * unit


@kernel
def _run(program: NDArray[np.int64], params: _Floats, red: _Floats, green: _Floats, blue: _Floats) -> None:
    for which in program:
        if which == _HUE:
            _shift_hue(red, green, blue, np.float32(6 * params[HUE]))
        elif which == _GREY:
            _mix_with_grey(red, green, blue, np.float32(0))
        elif which == BY_SATURATION:
            _mix_with_grey(red, green, blue, params[BRIGHTNESS - 1 + which])
        else:
            for plane in (red, green, blue):
                _mix_with(plane, params[BRIGHTNESS - 1 + which], np.float32(0))


@kernel
def _mix_with(plane: _Floats, factor: np.float32, other: np.float32) -> None:
    """factor · x + (1 − factor) · other, clamped: brightness with 0, contrast with the mean grey."""
    rest = (np.float32(1) - factor) * other
    for i in range(len(plane)):
        plane[i] = min(max(factor * plane[i] + rest, np.float32(0)), np.float32(1))


@kernel
def _mix_with_grey(red: _Floats, green: _Floats, blue: _Floats, factor: np.float32) -> None:
    """The same with each pixel's own grey: saturation."""
    rest = np.float32(1) - factor
    for i in range(len(red)):
        grey = rest * (_RED * red[i] + _GREEN * green[i] + _BLUE * blue[i])
        red[i] = min(max(factor * red[i] + grey, np.float32(0)), np.float32(1))
        green[i] = min(max(factor * green[i] + grey, np.float32(0)), np.float32(1))
        blue[i] = min(max(factor * blue[i] + grey, np.float32(0)), np.float32(1))


@kernel
def _sum_of_luma(red: _Floats, green: _Floats, blue: _Floats) -> float:
    # Sixteen sums side by side, because one sum alone would have to be taken one number after the other.
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
def _shift_hue(red: _Floats, green: _Floats, blue: _Floats, shift: np.float32) -> None:
    """Through HSV and back as :func:`.photometric.shift_hue`; ``shift`` in sixths of a turn."""
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
    """Weights of the centre and of one side, zero beyond the radius; returns the radius, 0 for no blur.

    Beyond 4.5 σ a weight is below 5e-5 and left out.
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
    """Along each row, borders reflected."""
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
            _add_three(
                padded[reach - k - 2 : reach - k + side],
                padded[reach + k : reach + k + 2 + side],
                weight_K[k],
                weight_K[k + 1],
                weight_K[k + 2],
                target,
            )


@kernel
def _add_three(
    left: _Floats, right: _Floats, near: np.float32, middle: np.float32, far: np.float32, target: _Floats
) -> None:
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
    y = abs(y)
    y = y if y < side else max(2 * (side - 1) - y, 0)
    return rows_C[y * side : (y + 1) * side]


@kernel
def _store(
    red: _Floats,
    green: _Floats,
    blue: _Floats,
    solarize: bool,
    offset_3: _Floats,
    scale_3: _Floats,
    out_C3: _Floats,
) -> None:
    if solarize:
        for plane in (red, green, blue):
            for i in range(len(plane)):
                x = plane[i]
                plane[i] = np.float32(1) - x if x >= np.float32(SOLARIZE_FROM) else x
    for i in range(len(red)):
        out_C3[3 * i] = red[i] * scale_3[0] + offset_3[0]
        out_C3[3 * i + 1] = green[i] * scale_3[1] + offset_3[1]
        out_C3[3 * i + 2] = blue[i] * scale_3[2] + offset_3[2]
