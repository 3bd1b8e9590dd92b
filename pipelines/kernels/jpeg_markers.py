"""What a JPEG's markers say, without decoding it: does it bring its own tables, is it turned?

Markers are walked as libjpeg walks them (ITU-T T.81, annex B): bytes between a segment and the next marker
are skipped, among them the coded data of a scan.
"""

import numpy as np
from numpy.typing import NDArray

from pipelines.kernels.compiled import kernel

EXIF_ORIENTATION = 0x0112
QUANTISATION, HUFFMAN = 1, 2
"""Kinds of tables, as :func:`missing_table` returns them."""
TABLE_MISSING = {
    QUANTISATION: "it uses a quantisation table that it does not define",
    HUFFMAN: "it uses a Huffman table that it does not define",
}
"""What is wrong with a JPEG, by the kind of table it lacks."""


@kernel
def missing_table(jpeg_C: NDArray[np.uint8]) -> int:
    """The kind of table that a JPEG uses and does not define, 0 where it defines all, or is no JPEG.

    A decoder fills in the tables of the picture before, or standard ones, so that pixels of such a stream
    depend on the decoder. Looks at every scan that a decoder reads; damage elsewhere is left to the decoder.
    """
    quantisation, dc, ac = 0, 0, 0  # bit t: table t is defined
    frame_at, num_components, huffman, progressive = 0, 0, False, False
    if len(jpeg_C) < 2 or jpeg_C[0] != 0xFF or jpeg_C[1] != 0xD8:
        return 0
    at = 2
    while True:
        while at + 1 < len(jpeg_C) and (jpeg_C[at] != 0xFF or jpeg_C[at + 1] in (0x00, 0xFF)):
            at += 1
        if at + 4 > len(jpeg_C):
            return 0
        marker = int(jpeg_C[at + 1])
        at += 2
        if marker == 0xD9:  # end of image
            return 0
        if 0xD0 <= marker <= 0xD8 or marker == 0x01:  # markers without a segment
            continue
        stop = at + _number(jpeg_C, at, 2, False)
        at += 2
        if stop > len(jpeg_C):
            return 0
        if marker == 0xDB:
            while at < stop:
                quantisation |= 1 << (int(jpeg_C[at]) & 15)
                at += 1 + (128 if jpeg_C[at] >> 4 else 64)
        elif marker == 0xC4:
            while at + 17 <= stop:
                if jpeg_C[at] & 16:
                    ac |= 1 << (int(jpeg_C[at]) & 15)
                else:
                    dc |= 1 << (int(jpeg_C[at]) & 15)
                at += 17 + int(jpeg_C[at + 1 : at + 17].sum())
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC8, 0xCC):
            if marker not in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA) or at + 6 > stop:
                return 0  # no decoder here reads it
            frame_at, num_components = at + 6, int(jpeg_C[at + 5])
            huffman, progressive = marker <= 0xC2, marker in (0xC2, 0xCA)
            if frame_at + 3 * num_components > stop:
                return 0
        elif marker == 0xDA and at < stop:
            in_scan = int(jpeg_C[at])
            spectrum_at = at + 1 + 2 * in_scan
            if num_components == 0 or spectrum_at + 3 > stop:
                return 0
            needs_dc = not progressive or (jpeg_C[spectrum_at] == 0 and jpeg_C[spectrum_at + 2] >> 4 == 0)
            needs_ac = not progressive or jpeg_C[spectrum_at] != 0
            for c in range(in_scan):
                component, tables = jpeg_C[at + 1 + 2 * c], int(jpeg_C[at + 2 + 2 * c])
                for k in range(num_components):
                    if jpeg_C[frame_at + 3 * k] == component:
                        if not quantisation >> (int(jpeg_C[frame_at + 3 * k + 2]) & 15) & 1:
                            return QUANTISATION
                        break
                if huffman and needs_dc and not dc >> (tables >> 4) & 1:
                    return HUFFMAN
                if huffman and needs_ac and not ac >> (tables & 15) & 1:
                    return HUFFMAN
            if in_scan == num_components and not progressive:
                return 0  # the only scan
        at = stop


@kernel
def is_turned(jpeg_C: NDArray[np.uint8]) -> bool:
    """Whether the EXIF tag of a JPEG asks for a rotation or a mirror.

    Pictures that were converted have none left; shards that were only indexed may.
    """
    at = 2
    while at + 10 < len(jpeg_C) and jpeg_C[at] == 0xFF and jpeg_C[at + 1] != 0xDA:
        size = _number(jpeg_C, at + 2, 2, False)
        exif = jpeg_C[at + 1] == 0xE1 and jpeg_C[at + 4] == 0x45 and jpeg_C[at + 5] == 0x78  # "Ex"
        if exif and at + 2 + size <= len(jpeg_C):
            return _asks_for_a_turn(jpeg_C[at + 10 : at + 2 + size])
        at += 2 + size
    return False


@kernel
def _asks_for_a_turn(tiff_C: NDArray[np.uint8]) -> bool:
    """Whether the orientation in the first directory of a TIFF header is one of 2 … 8."""
    if len(tiff_C) < 8:
        return False
    little = tiff_C[0] == 0x49
    start = _number(tiff_C, 4, 4, little)
    if start + 2 > len(tiff_C):
        return False
    for k in range(_number(tiff_C, start, 2, little)):
        entry = start + 2 + 12 * k
        if entry + 12 > len(tiff_C):
            return False
        if _number(tiff_C, entry, 2, little) == EXIF_ORIENTATION:
            return 2 <= _number(tiff_C, entry + 8, 2, little) <= 8
    return False


@kernel
def _number(bytes_C: NDArray[np.uint8], start: int, num: int, little: bool) -> int:
    """An unsigned number of some bytes, of either order."""
    value = 0
    for i in range(num):
        value = value << 8 | int(bytes_C[start + num - 1 - i if little else start + i])
    return value
