"""From encoded pictures to crops in one compiled loop: the inside of the ``ffcv`` backend.

A JPEG is decoded once, to the planes it is made of, and every view is cut out of those; planes and pixels
that are stored as such are not even copied. The loop holds no lock and belongs to the thread that calls it.

Shape letters: N pictures, V views, S side in pixels.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.kernels.compiled import kernel
from pipelines.kernels.jpeg_markers import is_turned, missing_table
from pipelines.kernels.native import address_of, call_int, call_word
from pipelines.kernels.resample import SLACK, crop_planes, crop_rgb, make_scratch
from pipelines.kernels.turbojpeg import (
    TJCS_YCBCR,
    TJFLAG_ACCURATEDCT,
    TJPF_RGB,
    TJSAMP_420,
    TJSAMP_422,
    TJSAMP_440,
    TJSAMP_444,
    library,
)
from pipelines.sets.beton import MODE_JPEG, MODE_YUV420

WRONG_SIZE = -2
"""Status of a picture whose header disagrees with the set's index."""
TURNED = -4
"""Status of a JPEG that its EXIF tag wants turned, which libturbojpeg leaves to others."""
NO_DECODER = -3
"""Status where libturbojpeg had no memory for a decoder."""
NO_TABLE = -5
"""Status of a JPEG that lacks a table it needs; see :func:`pipelines.kernels.jpeg_markers.missing_table`."""
# libjpeg enlarges the chroma of narrower pictures by repeating it.
_LEAST_SIDE = 8


class Functions(NamedTuple):
    """Addresses of libturbojpeg's functions, as numbers."""

    init: int
    destroy: int
    header: int
    to_rgb: int
    to_planes: int


@cache
def functions() -> Functions:
    """Find libturbojpeg's functions; raises as :func:`pipelines.kernels.turbojpeg.library` does."""
    found = library()
    return Functions(
        address_of(found.tjInitDecompress),
        address_of(found.tjDestroy),
        address_of(found.tjDecompressHeader3),
        address_of(found.tjDecompress2),
        address_of(found.tjDecompressToYUVPlanes),
    )


@kernel
def crop_pictures(
    functions: Functions,
    data_C: NDArray[np.uint8],
    address_N: NDArray[np.int64],
    num_bytes_N: NDArray[np.int64],
    mode_N: NDArray[np.uint8],
    size_N2: NDArray[np.int64],
    boxes_NV5: NDArray[np.int32],
    out_NVSS3: NDArray[np.uint8],
    status_N: NDArray[np.int64],
) -> None:
    """Cut all views of some pictures.

    Args:
        functions: of :func:`functions`.
        data_C: memory that holds the encoded pictures, with SLACK bytes behind them.
        address_N: where in it each begins.
        num_bytes_N: how long each is.
        mode_N: how it is stored, MODE_JPEG, MODE_RAW or MODE_YUV420.
        size_N2: heights and widths by the index.
        boxes_NV5: see :mod:`pipelines.augment.crops`; of no views, for decoding alone.
        out_NVSS3: (N, V, S, S, 3) uint8 views.
        status_N: becomes 0 for a sound picture, else libturbojpeg's return code, WRONG_SIZE, TURNED,
            NO_TABLE or NO_DECODER.

    Every JPEG gets a decoder of its own. One that has seen an error, or another picture's tables, would let
    the views depend on the pictures before; making one takes a thousandth of a decode.
    """
    side = out_NVSS3.shape[2]
    largest = boxes_NV5[:, :, 2:4].max() if boxes_NV5.size else 1
    scratch = make_scratch(side, largest)
    decoded_C = np.empty(SLACK, np.uint8)
    header, starts_3 = np.empty(4, np.int32), np.empty(3, np.int64)
    for n in range(len(address_N)):
        height, width = size_N2[n]
        start, stop = int(address_N[n]), int(address_N[n] + num_bytes_N[n])
        pixels_C, planes, halved = data_C, mode_N[n] == MODE_YUV420, (True, True)
        layout = _plane_layout(height, width, halved, False)
        status_N[n] = 0
        if mode_N[n] == MODE_JPEG:
            jpeg_C = data_C[start:stop]
            decoder = call_word(functions.init, ())
            status_N[n] = _read_header(functions, decoder, jpeg_C, height, width, header)
            if status_N[n] == 0 and missing_table(jpeg_C):
                status_N[n] = NO_TABLE
            if status_N[n] == 0 and is_turned(jpeg_C):
                status_N[n] = TURNED
            if status_N[n] == 0:
                # Only now: a damaged index may promise a picture larger than the memory.
                if len(decoded_C) < 3 * (width + 1) * (height + 1) + SLACK:
                    decoded_C = np.empty(3 * (width + 1) * (height + 1) + SLACK, np.uint8)
                planes, halved = _kind(header, height, width)
                layout = _plane_layout(height, width, halved, True)
                at = np.int64(decoded_C.ctypes.data)
                starts_3[0], starts_3[1], starts_3[2] = at, at + layout[0], at + layout[1]
                status_N[n] = _decode(functions, decoder, jpeg_C, height, width, planes, starts_3)
            if decoder != 0:
                call_int(functions.destroy, (decoder,))
            pixels_C, start = decoded_C, 0
        if status_N[n] == 0:
            for v in range(boxes_NV5.shape[1]):
                b = boxes_NV5[n, v]
                box = int(b[0]), int(b[1]), int(b[2]), int(b[3]), int(b[4])
                out_C = out_NVSS3[n, v].reshape(side * side * 3)
                if planes:
                    starts = start, start + layout[0], start + layout[1]
                    pitches = layout[2], layout[3]
                    crop_planes(pixels_C, starts, pitches, (height, width), halved, box, out_C, scratch)
                else:
                    crop_rgb(pixels_C[start:], width, box, out_C, scratch)


@kernel
def _read_header(
    functions: Functions,
    decoder: int,
    jpeg_C: NDArray[np.uint8],
    height: int,
    width: int,
    header: NDArray[np.int32],
) -> int:
    """Fill in width, height, subsampling and colour space; returns a status."""
    if decoder == 0:
        return NO_DECODER
    at = np.int64(header.ctypes.data)  # an unsigned address plus a number would be a float
    places = (at, at + 4, at + 8, at + 12)
    status = call_int(functions.header, (decoder, jpeg_C.ctypes.data, len(jpeg_C), *places))
    if status != 0:
        return int(status)
    return 0 if header[0] == width and header[1] == height else WRONG_SIZE


@kernel
def _kind(header: NDArray[np.int32], height: int, width: int) -> tuple[bool, tuple[bool, bool]]:
    """Whether to decode to planes, and whether the chroma's rows and columns are halved.

    Anything but the usual kinds is decoded to RGB by libturbojpeg, which knows them all.
    """
    sampling = header[2]
    planes = (
        header[3] == TJCS_YCBCR
        and min(height, width) >= _LEAST_SIDE
        and sampling in (TJSAMP_444, TJSAMP_422, TJSAMP_420, TJSAMP_440)
    )
    return planes, (sampling in (TJSAMP_420, TJSAMP_440), sampling in (TJSAMP_420, TJSAMP_422))


@kernel
def _plane_layout(
    height: int, width: int, halved: tuple[bool, bool], padded: bool
) -> tuple[int, int, int, int]:
    """Where U and V begin behind Y, and the pitches of Y and of U and V.

    libturbojpeg pads Y to whole samples of the chroma; our own compiled sets do not.
    """
    chroma_rows = (height + 1) // 2 if halved[0] else height
    chroma_pitch = (width + 1) // 2 if halved[1] else width
    rows = 2 * chroma_rows if padded and halved[0] else height
    pitch = 2 * chroma_pitch if padded and halved[1] else width
    return rows * pitch, rows * pitch + chroma_rows * chroma_pitch, pitch, chroma_pitch


@kernel
def _decode(
    functions: Functions,
    decoder: int,
    jpeg_C: NDArray[np.uint8],
    height: int,
    width: int,
    planes: bool,
    starts_3: NDArray[np.int64],
) -> int:
    """Decode to planes that begin at the addresses ``starts_3``, or to RGB at the first of them.

    Whatever C is given the address of belongs to the caller: numba frees an array of ours after its last
    mention, which may be the taking of its address.
    """
    source = (decoder, jpeg_C.ctypes.data, len(jpeg_C))
    if not planes:
        target = (starts_3[0], width, 0, height, TJPF_RGB, TJFLAG_ACCURATEDCT)
        return int(call_int(functions.to_rgb, source + target))
    to_planes = (starts_3.ctypes.data, width, 0, height, TJFLAG_ACCURATEDCT)
    return int(call_int(functions.to_planes, source + to_planes))


@kernel
def read_pieces(
    pread: int,
    file_N: NDArray[np.int32],
    address_N: NDArray[np.int64],
    num_bytes_N: NDArray[np.int64],
    start_N: NDArray[np.int64],
    data_C: NDArray[np.uint8],
) -> int:
    """Read pieces of open files one after the other; returns −1, or the first that could not be had."""
    for n in range(len(address_N)):
        done, wanted = 0, int(num_bytes_N[n])
        while done < wanted:
            place = np.int64(data_C.ctypes.data) + start_N[n] + done
            got = call_word(pread, (file_N[n], place, wanted - done, int(address_N[n]) + done))
            if got <= 0:
                return n
            done += got
    return -1


@cache
def pread_address() -> int:
    """Where the C library's ``pread`` lies."""
    return address_of(ctypes.CDLL(None, use_errno=True).pread)
