"""Decode and crop a slice of a batch in one compiled loop: the core of the ``ffcv`` backend.

The input is a flat array with the encoded bytes of N images, and V crop boxes for each. The output is N × V
uint8 RGB views of S × S px, and a status for each image. libturbojpeg decodes a JPEG once, to the Y, U and V
planes that the file stores. Every view is resampled directly from these planes
(:mod:`pipelines.kernels.resample`). Images that a set stores as planes or as pixels are cropped without a
copy. The loop runs without the GIL on the calling thread.

Two problems that libturbojpeg ignores are found before decoding, in the markers of the JPEG: missing tables,
and an EXIF tag that rotates the image. The markers are read as libjpeg reads them (ITU-T T.81, annex B):
bytes between a segment and the next marker, such as the coded data of a scan, are skipped.

Shape letters: N images, V views, S side in pixels, C bytes.
"""

import numpy as np
from numpy.typing import NDArray

from pipelines.kernels.compiled import call_int, call_int64, kernel
from pipelines.kernels.resample import SLACK, crop_planes, crop_rgb, make_scratch
from pipelines.kernels.turbojpeg import (
    TJCS_YCBCR,
    TJFLAG_ACCURATEDCT,
    TJPF_RGB,
    TJSAMP_420,
    TJSAMP_422,
    TJSAMP_440,
    TJSAMP_444,
    Functions,
)
from pipelines.sets.beton import MODE_JPEG, MODE_YUV420

# Status of an image, besides 0 for success and libturbojpeg's own return code, −1.
WRONG_SIZE = -2  # the size in the header is not the size in the set's index
NO_DECODER = -3  # libturbojpeg could not allocate a decoder
ROTATED = -4  # the EXIF tag rotates or mirrors the image, which libturbojpeg ignores
NO_TABLE = -5  # a table is missing, see missing_table
EXIF_ORIENTATION = 0x0112
QUANTISATION, HUFFMAN = 1, 2
"""Kinds of tables, as :func:`missing_table` returns them."""
TABLE_MISSING = {
    QUANTISATION: "it uses a quantisation table that it does not define",
    HUFFMAN: "it uses a Huffman table that it does not define",
}
"""Messages for each kind of missing table."""
_SOI, _EOI, _SOS, _DQT, _DHT, _APP1 = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xE1
# libjpeg upsamples the chroma of narrower images in another way, by repeating it. Those are decoded to RGB.
_MIN_PLANE_SIDE = 8


@kernel
def crop_images(
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
    """Cut all views of some images.

    Args:
        functions: of :func:`pipelines.kernels.turbojpeg.functions`.
        data_C: memory with the encoded images, and SLACK more bytes at the end.
        address_N: index of each image's first byte in ``data_C``.
        num_bytes_N: number of bytes of each image.
        mode_N: how each image is stored, MODE_JPEG, MODE_RAW or MODE_YUV420.
        size_N2: heights and widths in px that the set's index gives.
        boxes_NV5: see :mod:`pipelines.augment.draws`; with V = 0, images are only decoded.
        out_NVSS3: (N, V, S, S, 3) uint8, receives the views.
        status_N: receives 0 for each image that was decoded, else libturbojpeg's return code −1, WRONG_SIZE,
            ROTATED, NO_TABLE or NO_DECODER.
    """
    scratch = make_scratch(out_NVSS3.shape[2], boxes_NV5[:, :, 2:4].max() if boxes_NV5.size else 1)
    decoded_C = np.empty(SLACK, np.uint8)
    header_4, starts_3 = np.empty(4, np.int32), np.empty(3, np.int64)
    for n in range(len(address_N)):
        size = int(size_N2[n, 0]), int(size_N2[n, 1])
        start, stop = int(address_N[n]), int(address_N[n] + num_bytes_N[n])
        pixels_C, is_planes, halved = data_C, mode_N[n] == MODE_YUV420, (True, True)
        status_N[n] = 0
        if mode_N[n] == MODE_JPEG:
            status_N[n], is_planes, halved, decoded_C = _decode_jpeg(
                functions, data_C[start:stop], size, decoded_C, header_4, starts_3
            )
            pixels_C, start = decoded_C, 0
        if status_N[n] == 0:
            layout = _plane_layout(size, halved, mode_N[n] == MODE_JPEG)
            for v in range(boxes_NV5.shape[1]):
                b = boxes_NV5[n, v]
                box = int(b[0]), int(b[1]), int(b[2]), int(b[3]), int(b[4])
                out_C = out_NVSS3[n, v].reshape(-1)
                if is_planes:
                    starts = start, start + layout[0], start + layout[1]
                    pitches = layout[2], layout[3]
                    crop_planes(pixels_C, starts, pitches, size, halved, box, out_C, scratch)
                else:
                    crop_rgb(pixels_C[start:], size[1], box, out_C, scratch)


@kernel
def _decode_jpeg(
    functions: Functions,
    jpeg_C: NDArray[np.uint8],
    size: tuple[int, int],
    decoded_C: NDArray[np.uint8],
    header_4: NDArray[np.int32],
    starts_3: NDArray[np.int64],
) -> tuple[int, bool, tuple[bool, bool], NDArray[np.uint8]]:
    """Check and decode one JPEG to ``decoded_C``, or to a new array if that is too small.

    A new decoder is made for every JPEG, which takes a thousandth of the time of decoding. A decoder that is
    reused keeps errors and tables of the image before, so a view would depend on other images.

    Returns:
        The status; whether the result is planes (else RGB); whether chroma rows and chroma columns are
        halved; and the array that holds the result.
    """
    is_planes, halved = False, (False, False)
    decoder = call_int64(functions.init, ())
    status = _read_header(functions, decoder, jpeg_C, size, header_4)
    if status == 0 and missing_table(jpeg_C):
        status = NO_TABLE
    if status == 0 and _is_rotated(jpeg_C):
        status = ROTATED
    if status == 0:
        # Allocate only after the checks: a damaged index may give a size larger than the memory.
        num_bytes = 3 * (size[1] + 1) * (size[0] + 1) + SLACK
        if len(decoded_C) < num_bytes:
            decoded_C = np.empty(num_bytes, np.uint8)
        is_planes, halved = _choose_format(header_4, size)
        layout = _plane_layout(size, halved, True)
        at = np.int64(decoded_C.ctypes.data)
        starts_3[0], starts_3[1], starts_3[2] = at, at + layout[0], at + layout[1]
        status = _decode(functions, decoder, jpeg_C, size, is_planes, starts_3)
    if decoder != 0:
        call_int(functions.destroy, (decoder,))
    return status, is_planes, halved, decoded_C


@kernel
def _read_header(
    functions: Functions,
    decoder: int,
    jpeg_C: NDArray[np.uint8],
    size: tuple[int, int],
    header_4: NDArray[np.int32],
) -> int:
    """Fill in width, height, subsampling and colour space; returns a status."""
    if decoder == 0:
        return NO_DECODER
    at = np.int64(header_4.ctypes.data)  # an unsigned address plus a number would be a float
    targets = (at, at + 4, at + 8, at + 12)
    status = call_int(functions.header, (decoder, jpeg_C.ctypes.data, len(jpeg_C), *targets))
    if status != 0:
        return int(status)
    return 0 if header_4[0] == size[1] and header_4[1] == size[0] else WRONG_SIZE


@kernel
def _choose_format(header_4: NDArray[np.int32], size: tuple[int, int]) -> tuple[bool, tuple[bool, bool]]:
    """Whether to decode to planes, and whether the chroma's rows and columns are halved.

    Other subsamplings and colour spaces are rare; libturbojpeg decodes them to RGB.
    """
    sampling = header_4[2]
    is_planes = (
        header_4[3] == TJCS_YCBCR
        and min(size) >= _MIN_PLANE_SIDE
        and sampling in (TJSAMP_444, TJSAMP_422, TJSAMP_420, TJSAMP_440)
    )
    return is_planes, (sampling in (TJSAMP_420, TJSAMP_440), sampling in (TJSAMP_420, TJSAMP_422))


@kernel
def _plane_layout(
    size: tuple[int, int], halved: tuple[bool, bool], padded: bool
) -> tuple[int, int, int, int]:
    """Offsets of U and V from Y in bytes, and the pitches of Y and of the chroma.

    libturbojpeg pads Y to whole chroma samples; our own compiled sets do not.
    """
    height, width = size
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
    size: tuple[int, int],
    to_planes: bool,
    starts_3: NDArray[np.int64],
) -> int:
    """Decode to planes that begin at the addresses ``starts_3``, or to RGB at the first of them.

    The caller must own all memory that is passed to C by its address: numba frees a local array after its
    last use, which may be the expression that takes its address.
    """
    height, width = size
    source = (decoder, jpeg_C.ctypes.data, len(jpeg_C))
    if not to_planes:
        target = (starts_3[0], width, 0, height, TJPF_RGB, TJFLAG_ACCURATEDCT)
        return int(call_int(functions.to_rgb, source + target))
    planes = (starts_3.ctypes.data, width, 0, height, TJFLAG_ACCURATEDCT)
    return int(call_int(functions.to_planes, source + planes))


# ------------------------------------------------------------------------------------------------------------
# Markers


@kernel
def missing_table(jpeg_C: NDArray[np.uint8]) -> int:
    """The kind of table that a JPEG uses but does not define; 0 if none is missing, or for other files.

    A decoder replaces a missing table by that of the image before, or by a standard one. So the pixels of
    such a file depend on the decoder. Every scan that a decoder reads is checked. Other damage is not looked
    for; the decoder reports it.
    """
    quantisation, dc, ac = 0, 0, 0  # bit t: table t is defined
    frame, frame_at = 0, 0  # marker of the frame, and where its components begin
    if len(jpeg_C) < 2 or jpeg_C[0] != 0xFF or jpeg_C[1] != _SOI:
        return 0
    stop = 2
    while True:
        marker, at, stop = _next_segment(jpeg_C, stop)
        if marker == 0:
            return 0
        if marker == _DQT:
            while at < stop:
                quantisation |= 1 << (int(jpeg_C[at]) & 15)
                at += 1 + (128 if jpeg_C[at] >> 4 else 64)
        elif marker == _DHT:
            while at + 17 <= stop:
                if jpeg_C[at] & 16:
                    ac |= 1 << (int(jpeg_C[at]) & 15)
                else:
                    dc |= 1 << (int(jpeg_C[at]) & 15)
                at += 17 + int(jpeg_C[at + 1 : at + 17].sum())
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC8, 0xCC):
            # No decoder used here reads frames of other kinds.
            if marker not in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA) or at + 6 > stop:
                return 0
            frame, frame_at = marker, at + 6
            if frame_at + 3 * int(jpeg_C[at + 5]) > stop:
                return 0
        elif marker == _SOS and at < stop:
            num_components = int(jpeg_C[frame_at - 1]) if frame else 0
            if num_components == 0 or at + 4 + 2 * int(jpeg_C[at]) > stop:
                return 0
            missing = _missing_in_scan(jpeg_C, at, frame, frame_at, (quantisation, dc, ac))
            is_only_scan = jpeg_C[at] == num_components and frame not in (0xC2, 0xCA)
            if missing or is_only_scan:
                return missing


@kernel
def _next_segment(jpeg_C: NDArray[np.uint8], at: int) -> tuple[int, int, int]:
    """Marker, start and stop of the next segment from ``at`` on. Marker 0 means that there is none."""
    while True:
        while at + 1 < len(jpeg_C) and (jpeg_C[at] != 0xFF or jpeg_C[at + 1] in (0x00, 0xFF)):
            at += 1
        if at + 4 > len(jpeg_C):
            return 0, at, at
        marker = int(jpeg_C[at + 1])
        at += 2
        if marker == _EOI:
            return 0, at, at
        if 0xD0 <= marker <= _SOI or marker == 0x01:  # markers without a segment
            continue
        stop = at + _read_number(jpeg_C, at, 2, False)
        return (marker, at + 2, stop) if stop <= len(jpeg_C) else (0, at, at)


@kernel
def _missing_in_scan(
    jpeg_C: NDArray[np.uint8], at: int, frame: int, frame_at: int, defined: tuple[int, int, int]
) -> int:
    """The kind of table that is missing for the scan with its header at ``at``; 0 for none."""
    quantisation, dc, ac = defined
    huffman, progressive = frame <= 0xC2, frame in (0xC2, 0xCA)
    spectrum_at = at + 1 + 2 * int(jpeg_C[at])
    needs_dc = not progressive or (jpeg_C[spectrum_at] == 0 and jpeg_C[spectrum_at + 2] >> 4 == 0)
    needs_ac = not progressive or jpeg_C[spectrum_at] != 0
    for c in range(int(jpeg_C[at])):
        component, tables = jpeg_C[at + 1 + 2 * c], int(jpeg_C[at + 2 + 2 * c])
        for k in range(int(jpeg_C[frame_at - 1])):
            if jpeg_C[frame_at + 3 * k] == component:
                if not quantisation >> (int(jpeg_C[frame_at + 3 * k + 2]) & 15) & 1:
                    return QUANTISATION
                break
        if huffman and needs_dc and not dc >> (tables >> 4) & 1:
            return HUFFMAN
        if huffman and needs_ac and not ac >> (tables & 15) & 1:
            return HUFFMAN
    return 0


@kernel
def _is_rotated(jpeg_C: NDArray[np.uint8]) -> bool:
    """Whether the EXIF tag of a JPEG rotates or mirrors the image.

    Conversion applies the tag and removes it. Existing shards that were only indexed may have it.
    """
    at = 2
    while at + 10 < len(jpeg_C) and jpeg_C[at] == 0xFF and jpeg_C[at + 1] != _SOS:
        size = _read_number(jpeg_C, at + 2, 2, False)
        exif = jpeg_C[at + 1] == _APP1 and jpeg_C[at + 4] == 0x45 and jpeg_C[at + 5] == 0x78  # "Ex"
        if exif and at + 2 + size <= len(jpeg_C):
            return 2 <= _orientation(jpeg_C[at + 10 : at + 2 + size]) <= 8
        at += 2 + size
    return False


@kernel
def _orientation(tiff_C: NDArray[np.uint8]) -> int:
    """The orientation in the first directory of a TIFF header; 0 if there is none."""
    if len(tiff_C) < 8:
        return 0
    little = tiff_C[0] == 0x49
    start = _read_number(tiff_C, 4, 4, little)
    if start + 2 > len(tiff_C):
        return 0
    for k in range(_read_number(tiff_C, start, 2, little)):
        entry = start + 2 + 12 * k
        if entry + 12 > len(tiff_C):
            return 0
        if _read_number(tiff_C, entry, 2, little) == EXIF_ORIENTATION:
            return _read_number(tiff_C, entry + 8, 2, little)
    return 0


@kernel
def _read_number(bytes_C: NDArray[np.uint8], start: int, num: int, little: bool) -> int:
    """An unsigned number of ``num`` bytes, little-endian or big-endian."""
    value = 0
    for i in range(num):
        value = value << 8 | int(bytes_C[start + num - 1 - i if little else start + i])
    return value
