"""Antialiased bilinear crops of a JPEG's planes or of RGB pixels, with SIMD vectors of sixteen values.

The input is a decoded image as flat uint8 memory, and a crop box in px. The output is one uint8 RGB view of
S × S px. The result equals PIL's ``resize`` of the cropped image within one grey level, if the image shrinks
less than 100-fold. As in PIL, the filter is a triangle that widens when the image shrinks, applied in two
separable passes.

The steps for one view:

1. For each axis, list the input pixels of each output pixel and their weights (:func:`fill_axis`). Weights
   are 16-bit fractions.
2. Resample sixteen rows of the view at a time. The vertical pass runs along the input rows and writes sums
   with 7 fractional bits to a strip. The strip is transposed, so that the horizontal pass can process the
   sixteen rows as one vector. A flip costs nothing: it reverses the list of step 1 for the columns.
3. Convert the sixteen rows from Y, U, V to R, G, B, transpose them back and write them.

Chroma planes of half size are not upsampled first. JPEG decoders upsample with the weights ¾ and ¼ ("fancy
upsampling"), which is a linear filter too. :func:`halve_axis` combines both filters into one, so each output
pixel needs only a few samples of the small plane. Colours are converted after the crop, because the crop has
fewer pixels.

Vectors (:mod:`pipelines.kernels.simd`) may read past the last element that is needed, so SLACK more bytes
must be readable after the image. Only :func:`make_scratch` allocates memory.

Shape letters: S side of the view, T filter taps, C elements of a flat array.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.kernels import simd
from pipelines.kernels.compiled import kernel
from pipelines.kernels.simd import LANES

_ROWS = LANES
"""Rows of the view that are resampled together."""
_FRACTION_BITS = 7
"""Fractional bits of a grey level between the passes. 255 · 2⁷ and its rounding errors fit into 16 bits."""
_LARGEST_WEIGHT = (1 << 16) - 1
SLACK = 64
"""Bytes that must be readable after the last byte of a plane."""


class Axis(NamedTuple):
    """The input pixels of each output pixel along one axis, and their weights."""

    first_S: NDArray[np.int32]  # first input pixel of each output pixel
    taps_S: NDArray[np.int32]  # number of input pixels from there on
    weight_ST: NDArray[np.uint16]  # their weights, times 2¹⁶


class Scratch(NamedTuple):
    """Working memory for one view at a time; see :func:`make_scratch` for its size."""

    rows: Axis  # how rows of Y or RGB are resampled
    columns: Axis  # the same for columns
    chroma_rows: Axis  # the same for rows of chroma, if they are halved
    chroma_columns: Axis  # the same for columns of chroma, if they are halved
    strip_C: NDArray[np.uint16]  # sixteen rows between the passes
    transposed_C: NDArray[np.uint16]  # the strip, transposed
    planes_C: NDArray[np.uint16]  # three planes of (S, 16): sixteen rows of the view, transposed
    bytes_C: NDArray[np.uint8]  # the planes as RGB bytes
    block_C: NDArray[np.uint8]  # three blocks of 16 × 16 bytes, and one row with its colours interleaved


@kernel
def _axis(side: int, taps: int) -> Axis:
    return Axis(np.empty(side, np.int32), np.empty(side, np.int32), np.empty((side, taps), np.uint16))


@kernel
def make_scratch(side: int, largest_px: int) -> Scratch:
    """Allocate working memory for views of ``side`` px and boxes with sides of up to ``largest_px``."""
    taps = 2 * int(np.ceil(max(largest_px / side, 1.0))) + 3
    padded = -(-side // LANES) * LANES
    strip = _ROWS * (3 * largest_px + 2 * LANES)
    return Scratch(
        _axis(side, taps),
        _axis(side, taps),
        _axis(side, taps),
        _axis(side, taps),
        np.empty(strip, np.uint16),
        np.empty(strip, np.uint16),
        np.zeros(3 * padded * _ROWS, np.uint16),
        np.zeros(3 * padded * _ROWS, np.uint8),
        np.empty(3 * LANES * LANES + 3 * LANES, np.uint8),
    )


@kernel
def fill_axis(axis: Axis, start: int, length: int, backwards: bool) -> None:
    """Set the weights that resize ``length`` pixels from ``start`` on to S; ``backwards`` flips them."""
    side = len(axis.first_S)
    scale = length / side
    support = max(scale, 1.0)
    step = 1.0 / support
    for number in range(side):
        out = side - 1 - number if backwards else number
        centre = (number + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        taps = min(int(centre + support + 0.5), length) - first
        total = 0.0
        for tap in range(taps):
            total += max(1.0 - abs((tap + first - centre + 0.5) * step), 0.0)
        unit = 65536.0 / total
        for tap in range(taps):
            weight = max(1.0 - abs((tap + first - centre + 0.5) * step), 0.0) * unit
            axis.weight_ST[out, tap] = min(int(weight + 0.5), _LARGEST_WEIGHT)
        axis.first_S[out] = start + first
        axis.taps_S[out] = taps


@kernel
def halve_axis(full: Axis, plane_px: int, half: Axis) -> None:
    """Set weights for a plane of half size that give the same result as ``full`` on the upsampled plane.

    Upsampling computes pixel 2i as ¾ sample i + ¼ sample i − 1, and pixel 2i + 1 as ¾ sample i + ¼ sample
    i + 1. At the borders, samples are repeated.
    """
    last = plane_px - 1
    for out in range(len(full.first_S)):
        begin, taps = full.first_S[out], full.taps_S[out]
        first = max((begin - 1) >> 1, 0)
        stop = min((begin + taps) >> 1, last)
        num = stop - first + 1
        weight_T = half.weight_ST[out]
        weight_T[:num] = 0
        for tap in range(taps):
            pixel, weight = begin + tap, int(full.weight_ST[out, tap])
            near = min(pixel >> 1, last)
            far = min(max(near - 1 + 2 * (pixel & 1), 0), last)
            quarter = weight >> 2
            weight_T[near - first] = min(int(weight_T[near - first]) + weight - quarter, _LARGEST_WEIGHT)
            weight_T[far - first] = min(int(weight_T[far - first]) + quarter, _LARGEST_WEIGHT)
        half.first_S[out] = first
        half.taps_S[out] = num


@kernel
def _span(axis: Axis) -> tuple[int, int]:
    """The first input pixel of an axis, and the number of input pixels that it covers."""
    a, b = 0, len(axis.first_S) - 1
    if axis.first_S[b] < axis.first_S[a]:
        a, b = b, a
    begin = axis.first_S[a]
    return begin, axis.first_S[b] + axis.taps_S[b] - begin


@kernel
def _vertical(
    plane_C: NDArray[np.uint8],
    start: int,
    pitch: int,
    width: int,
    rows: Axis,
    top: int,
    strip_C: NDArray[np.uint16],
    strip_pitch: int,
) -> None:
    """Resample ``width`` input columns from ``start`` on to the sixteen rows of the view from ``top`` on."""
    last = len(rows.first_S) - 1
    for r in range(_ROWS):
        out = min(top + r, last)
        taps = rows.taps_S[out]
        row = start + rows.first_S[out] * pitch
        for x in range(0, width, LANES):
            # mul_high rounds down. Half a unit per tap corrects the mean of the error.
            total = simd.splat(taps >> 1)
            at = row + x
            for tap in range(taps):
                sample = simd.shift_left(simd.load_u8(plane_C, at), _FRACTION_BITS)
                total = simd.add(total, simd.mul_high(sample, simd.splat(rows.weight_ST[out, tap])))
                at += pitch
            simd.store_u16(strip_C, r * strip_pitch + x, total)


@kernel
def _transpose(
    strip_C: NDArray[np.uint16], strip_pitch: int, width: int, transposed_C: NDArray[np.uint16]
) -> None:
    """Transpose the strip: ``transposed_C`` is (width, 16)."""
    for x in range(0, width, 8):
        for r in range(0, _ROWS, 8):
            simd.transpose_u16(strip_C, r * strip_pitch + x, strip_pitch, transposed_C, x * _ROWS + r, _ROWS)


@kernel
def _horizontal(
    transposed_C: NDArray[np.uint16],
    begin: int,
    channel: int,
    channels: int,
    columns: Axis,
    planes_C: NDArray[np.uint16],
    start: int,
) -> None:
    """Resample sixteen rows to S columns, for one of the input's interleaved channels."""
    step = channels * _ROWS
    for out in range(len(columns.first_S)):
        taps = columns.taps_S[out]
        total = simd.splat(taps >> 1)
        at = (columns.first_S[out] - begin) * step + channel * _ROWS
        for tap in range(taps):
            weight = simd.splat(columns.weight_ST[out, tap])
            total = simd.add(total, simd.mul_high(simd.load_u16(transposed_C, at), weight))
            at += step
        simd.store_u16(planes_C, start + out * _ROWS, total)


@kernel
def _to_rgb(planes_C: NDArray[np.uint16], size: int, bytes_C: NDArray[np.uint8]) -> None:
    """Convert Y, U, V to R, G, B by JFIF's full-range BT.601, with six fractional bits.

    Signed 16-bit fractions must be below 0.5. Larger factors are split: 1.402 v is v + 0.402 v.
    """
    middle, rounding = simd.splat(128 << 6), simd.splat(1 << 5)
    red_v, blue_u = simd.splat(int(0.402 * 65536 + 0.5)), simd.splat(int(0.228 * 65536 + 0.5))
    green_u, green_v = simd.splat(int(0.344136 * 65536 + 0.5)), simd.splat(int(0.285864 * 65536 + 0.5))
    for i in range(0, size, LANES):
        y = simd.add(simd.shift_right(simd.load_u16(planes_C, i), 1), rounding)
        u = simd.sub(simd.shift_right(simd.load_u16(planes_C, size + i), 1), middle)
        v = simd.sub(simd.shift_right(simd.load_u16(planes_C, 2 * size + i), 1), middle)
        red = simd.add(simd.add(y, v), simd.mul_high_signed(v, red_v))
        green = simd.sub(simd.sub(y, simd.mul_high_signed(u, green_u)), v)
        green = simd.add(green, simd.mul_high_signed(v, green_v))
        blue = simd.sub(simd.add(y, simd.add(u, u)), simd.mul_high_signed(u, blue_u))
        simd.store_u8(bytes_C, i, simd.shift_right_signed(red, 6))
        simd.store_u8(bytes_C, size + i, simd.shift_right_signed(green, 6))
        simd.store_u8(bytes_C, 2 * size + i, simd.shift_right_signed(blue, 6))


@kernel
def _round(planes_C: NDArray[np.uint16], size: int, bytes_C: NDArray[np.uint8]) -> None:
    """Round three planes of R, G, B to bytes."""
    rounding = simd.splat(1 << (_FRACTION_BITS - 1))
    for i in range(0, 3 * size, LANES):
        rounded = simd.add(simd.load_u16(planes_C, i), rounding)
        simd.store_u8(bytes_C, i, simd.shift_right(rounded, _FRACTION_BITS))


@kernel
def _write_rows(
    bytes_C: NDArray[np.uint8],
    size: int,
    side: int,
    top: int,
    block_C: NDArray[np.uint8],
    out_C: NDArray[np.uint8],
) -> None:
    """Transpose sixteen finished rows back, interleave their colours and write them to the view."""
    single = 3 * LANES * LANES
    for x in range(0, side, LANES):
        for c in range(3):
            simd.transpose_u8(bytes_C, c * size + x * _ROWS, _ROWS, block_C, c * LANES * LANES, LANES)
        for r in range(min(_ROWS, side - top)):
            red, green, blue = r * LANES, (LANES + r) * LANES, (2 * LANES + r) * LANES
            at = ((top + r) * side + x) * 3
            if x + LANES <= side:
                simd.interleave3(block_C, red, green, blue, out_C, at)
            else:
                simd.interleave3(block_C, red, green, blue, block_C, single)
                out_C[at : at + 3 * (side - x)] = block_C[single : single + 3 * (side - x)]


@kernel
def crop_planes(
    planes_C: NDArray[np.uint8],
    start_3: tuple[int, int, int],
    pitch_2: tuple[int, int],
    size: tuple[int, int],
    halved: tuple[bool, bool],
    box: tuple[int, int, int, int, int],
    out_C: NDArray[np.uint8],
    scratch: Scratch,
) -> None:
    """Write one view of an image in Y, U and V planes, as a JPEG stores them.

    Args:
        planes_C: memory with the three planes, and SLACK more bytes at the end.
        start_3: index of each plane's first byte.
        pitch_2: bytes from one row to the next, in Y and in the chroma planes.
        size: height and width of the image.
        halved: whether the chroma has half as many rows, and half as many columns (rounded up).
        box: top, left, height and width in px, within the image; and 1 to flip.
        out_C: (S, S, 3) view, flat.
        scratch: of :func:`make_scratch`.
    """
    side, num_bytes = len(scratch.rows.first_S), len(scratch.planes_C) // 3
    fill_axis(scratch.rows, box[0], box[2], False)
    fill_axis(scratch.columns, box[1], box[3], box[4] != 0)
    chroma_rows, chroma_columns = scratch.rows, scratch.columns
    if halved[0]:
        chroma_rows = scratch.chroma_rows
        halve_axis(scratch.rows, (size[0] + 1) // 2, chroma_rows)
    if halved[1]:
        chroma_columns = scratch.chroma_columns
        halve_axis(scratch.columns, (size[1] + 1) // 2, chroma_columns)
    strip_pitch = len(scratch.strip_C) // _ROWS
    for row in range(0, side, _ROWS):
        for c in range(3):
            rows, columns, pitch = scratch.rows, scratch.columns, pitch_2[0]
            if c > 0:
                rows, columns, pitch = chroma_rows, chroma_columns, pitch_2[1]
            begin, num = _span(columns)
            _vertical(planes_C, start_3[c] + begin, pitch, num, rows, row, scratch.strip_C, strip_pitch)
            _transpose(scratch.strip_C, strip_pitch, num, scratch.transposed_C)
            _horizontal(scratch.transposed_C, begin, 0, 1, columns, scratch.planes_C, c * num_bytes)
        _to_rgb(scratch.planes_C, num_bytes, scratch.bytes_C)
        _write_rows(scratch.bytes_C, num_bytes, side, row, scratch.block_C, out_C)


@kernel
def crop_rgb(
    pixels_C: NDArray[np.uint8],
    width: int,
    box: tuple[int, int, int, int, int],
    out_C: NDArray[np.uint8],
    scratch: Scratch,
) -> None:
    """Write one view of an image in interleaved RGB.

    Args:
        pixels_C: (H, W, 3) pixels, flat, and SLACK more bytes at the end.
        width: W.
        box: as for :func:`crop_planes`.
        out_C: (S, S, 3) view, flat.
        scratch: of :func:`make_scratch`.
    """
    side, size = len(scratch.rows.first_S), len(scratch.planes_C) // 3
    fill_axis(scratch.rows, box[0], box[2], False)
    fill_axis(scratch.columns, box[1], box[3], box[4] != 0)
    begin, num = _span(scratch.columns)
    pitch = len(scratch.strip_C) // _ROWS
    for row in range(0, side, _ROWS):
        _vertical(pixels_C, 3 * begin, 3 * width, 3 * num, scratch.rows, row, scratch.strip_C, pitch)
        _transpose(scratch.strip_C, pitch, 3 * num, scratch.transposed_C)
        for c in range(3):
            _horizontal(scratch.transposed_C, begin, c, 3, scratch.columns, scratch.planes_C, c * size)
        _round(scratch.planes_C, size, scratch.bytes_C)
        _write_rows(scratch.bytes_C, size, side, row, scratch.block_C, out_C)


@kernel
def _crop_views(
    pixels_C: NDArray[np.uint8], width: int, boxes_V5: NDArray[np.int32], out_VSS3: NDArray[np.uint8]
) -> None:
    """Write all views of one image in interleaved RGB."""
    scratch = make_scratch(out_VSS3.shape[1], boxes_V5[:, 2:4].max() if boxes_V5.size else 1)
    for v in range(len(boxes_V5)):
        b = boxes_V5[v]
        box = int(b[0]), int(b[1]), int(b[2]), int(b[3]), int(b[4])
        crop_rgb(pixels_C, width, box, out_VSS3[v].reshape(-1), scratch)


def crop_image(
    image_HW3: NDArray[np.uint8], boxes_V5: NDArray[np.int32], out_VSS3: NDArray[np.uint8]
) -> None:
    """Write all views of a decoded RGB image. Nothing is read past the end of the image."""
    height, width, _ = image_HW3.shape
    pixels_C = np.ascontiguousarray(image_HW3).reshape(-1)
    # The kernels read up to SLACK bytes past a box. Copy the image if that is past the end of its memory.
    if 3 * width < SLACK or (boxes_V5[:, 0] + boxes_V5[:, 2] >= height).any():
        pixels_C = np.concatenate([pixels_C, np.zeros(SLACK, np.uint8)])
    _crop_views(pixels_C, width, boxes_V5, out_VSS3)
