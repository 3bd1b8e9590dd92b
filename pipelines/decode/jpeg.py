"""Read, check and decode single JPEGs from Python, and convert pixels to planes.

Conversion and verification use this module. The loader uses :mod:`pipelines.kernels.jpeg_crops`, and this
module only for JPEGs that the kernel could not decode. libturbojpeg reports damage inside the coded data of a
JPEG; PIL does not.
"""

import ctypes
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.kernels.jpeg_crops import TABLE_MISSING, missing_table
from pipelines.kernels.turbojpeg import (
    TJCS_CMYK,
    TJCS_RGB,
    TJCS_YCBCR,
    TJCS_YCCK,
    TJERR_FATAL,
    TJFLAG_ACCURATEDCT,
    TJPF_CMYK,
    TJPF_GRAY,
    TJPF_RGB,
    TJSAMP_420,
    library,
)

# Warnings of libjpeg without loss of pixels. After all others ("premature end", "bad Huffman code"), pixels
# are missing.
_HARMLESS = (
    "extraneous bytes",
    "adobe color transform",
    "invalid sos parameters",
    "jfif revision",
    "density",
)


@dataclass(frozen=True)
class Verdict:
    """The result of checking one JPEG by decoding it completely."""

    state: Literal["whole", "irregular", "damaged"]
    """whole: no warning; irregular: warnings, but no missing pixels; damaged: pixels are missing."""
    width: int
    height: int
    message: str = ""
    """The decoder's message, empty for a whole image."""


class Header(NamedTuple):
    """The header of a JPEG."""

    width: int
    height: int
    subsampling: int
    """A TJSAMP number; −1 for a subsampling that TurboJPEG does not know."""
    colours: int
    """A TJCS number."""

    @property
    def is_colour(self) -> bool:
        """True for three components, Y, Cb, Cr or R, G, B."""
        return self.colours in (TJCS_RGB, TJCS_YCBCR)

    @property
    def is_usual(self) -> bool:
        """True if TurboJPEG knows the subsampling. Other images may fail in programs that use TurboJPEG."""
        return self.subsampling >= 0

    @property
    def is_yuv420(self) -> bool:
        """True for Y, Cb, Cr at 4:2:0, which :meth:`Jpeg.planes` can decode."""
        return (self.subsampling, self.colours) == (TJSAMP_420, TJCS_YCBCR)


class Planes(NamedTuple):
    """An image of H × W px as uint8 planes at 4:2:0: full-range BT.601, chroma positions as in JPEG."""

    y: NDArray[np.uint8]
    """(H, W)"""
    u: NDArray[np.uint8]
    """(ceil(H/2), ceil(W/2))"""
    v: NDArray[np.uint8]
    """(ceil(H/2), ceil(W/2))"""

    def packed(self) -> NDArray[np.uint8]:
        """Y, U, V in one array, rows without padding, as MODE_YUV420 stores them."""
        return np.concatenate([plane.reshape(-1) for plane in self])


class _PlaneBuffer:
    """Memory for planes in TurboJPEG's layout: one array per plane, Y padded to even sides."""

    def __init__(self, width: int, height: int) -> None:
        self._size = height, width
        half = (height + 1) // 2, (width + 1) // 2
        self.arrays = [np.empty(shape, np.uint8) for shape in ((2 * half[0], 2 * half[1]), half, half)]
        self.addresses = (ctypes.c_void_p * 3)(*(plane.ctypes.data for plane in self.arrays))
        self.strides = (ctypes.c_int * 3)(*(plane.shape[1] for plane in self.arrays))

    def planes(self) -> Planes:
        """The planes without the padding."""
        height, width = self._size
        y, u, v = self.arrays
        return Planes(y[:height, :width], u, v)


class Jpeg:
    """One JPEG and the TurboJPEG handle that decodes it, for use by one thread.

    A handle is used for one image only: after an error it may fail for the next image too, and it keeps the
    tables of the image before. Creating a handle takes less than a microsecond.

    Args:
        content: the encoded bytes. The constructor reads only the header.

    Raises:
        MemoryError: if libturbojpeg has no memory for a handle.
    """

    header: Header | None
    """The header; None if the decoder cannot use it."""

    def __init__(self, content: bytes | NDArray[np.uint8]) -> None:
        self._lib = library()
        self._handle = ctypes.c_void_p(self._lib.tjInitDecompress())
        if not self._handle.value:
            raise MemoryError("libturbojpeg has no memory for a decoder")
        self._data = np.frombuffer(content, np.uint8)
        self._source = self._data.ctypes.data, self._data.size
        self._numbers, self._fault = self._read_header()
        self.header = None if self._fault else self._numbers

    def __del__(self) -> None:
        if (handle := getattr(self, "_handle", None)) and handle.value:
            self._lib.tjDestroy(handle)

    def _read_header(self) -> tuple[Header, str]:
        """The header, and why it cannot be used ("" if it can)."""
        numbers = [ctypes.c_int(0) for _ in range(4)]
        code = self._lib.tjDecompressHeader3(self._handle, *self._source, *map(ctypes.byref, numbers))
        header = Header(*(n.value for n in numbers))
        if header.width < 1 or header.height < 1:
            return header, self._message() if code != 0 else "there is no image in it"
        # tjDecompressHeader3 reports an unknown subsampling as fatal, but decoding works.
        if code != 0 and header.is_usual and self._is_fatal():
            return header, self._message()
        return header, TABLE_MISSING.get(missing_table(self._data), "")

    def check(self) -> Verdict:
        """Decode the JPEG completely and report whether it is whole. Runs without the GIL."""
        width, height, _, colours = self._numbers
        if self._fault:
            return Verdict("damaged", width, height, self._fault)
        # Entropy decoding finds the damage. Decoding to grey at an eighth of the size does it completely, and
        # little else.
        pixels = TJPF_CMYK if colours in (TJCS_CMYK, TJCS_YCCK) else TJPF_GRAY
        small_width, small_height = (width + 7) // 8, (height + 7) // 8
        scratch = np.empty(small_width * small_height * (4 if pixels == TJPF_CMYK else 1), np.uint8)
        target = scratch.ctypes.data, small_width, 0, small_height, pixels, 0
        return self._verdict(self._lib.tjDecompress2(self._handle, *self._source, *target))

    def planes(self) -> Planes:
        """Decode to the planes that the file stores, by the accurate inverse DCT.

        Warnings without loss of pixels are ignored.

        Raises:
            ValueError: if pixels are missing, with the decoder's message; or if the JPEG is not Y, Cb, Cr at
                4:2:0.
        """
        if self.header is None or not self.header.is_yuv420:
            raise ValueError("not a JPEG of Y, Cb, Cr at 4:2:0; decode it to RGB and use encode_planes")
        width, height, _, _ = self.header
        buffer = _PlaneBuffer(width, height)
        target = buffer.addresses, width, buffer.strides, height, TJFLAG_ACCURATEDCT
        verdict = self._verdict(self._lib.tjDecompressToYUVPlanes(self._handle, *self._source, *target))
        if verdict.state == "damaged":
            raise ValueError(verdict.message)
        return buffer.planes()

    def _verdict(self, code: int) -> Verdict:
        """The verdict for the return code of a complete decode."""
        width, height, _, _ = self._numbers
        if code == 0:
            return Verdict("whole", width, height)
        message = self._message()
        harmless = not self._is_fatal() and any(words in message.lower() for words in _HARMLESS)
        return Verdict("irregular" if harmless else "damaged", width, height, message)

    def _is_fatal(self) -> bool:
        return bool(self._lib.tjGetErrorCode(self._handle) == TJERR_FATAL)

    def _message(self) -> str:
        return _message(self._lib, self._handle)


def _message(lib: ctypes.CDLL, handle: ctypes.c_void_p) -> str:
    """A handle's last error or warning."""
    message: bytes = lib.tjGetErrorStr2(handle)
    return message.decode("utf-8", "replace")


def check_jpeg(content: bytes | NDArray[np.uint8]) -> Verdict:
    """Decode a JPEG completely and report whether it is whole. Runs without the GIL."""
    return Jpeg(content).check()


def read_header(content: bytes | NDArray[np.uint8]) -> Header | None:
    """Read the header of a JPEG without decoding it; None if the decoder cannot use it."""
    return Jpeg(content).header


def encode_planes(rgb_HW3: NDArray[np.uint8]) -> Planes:
    """Convert RGB to planes. Each chroma sample is the mean of its 2 × 2 pixels.

    If the number of rows or columns is odd, the last one is repeated.

    Args:
        rgb_HW3: (H, W, 3) uint8.

    Raises:
        ValueError: if the array is not (H, W, 3) uint8, or is empty.
        MemoryError: if libturbojpeg has no memory for a handle.
    """
    if rgb_HW3.ndim != 3 or rgb_HW3.shape[2] != 3 or rgb_HW3.dtype != np.uint8 or not rgb_HW3.size:
        raise ValueError(f"pixels are {rgb_HW3.dtype} of shape {rgb_HW3.shape}; give (H, W, 3) uint8")
    lib = library()
    handle = ctypes.c_void_p(lib.tjInitCompress())
    if not handle.value:
        raise MemoryError("libturbojpeg has no memory for an encoder")
    height, width, _ = rgb_HW3.shape
    pixels = np.ascontiguousarray(rgb_HW3)
    buffer = _PlaneBuffer(width, height)
    try:
        code = lib.tjEncodeYUVPlanes(
            handle, pixels.ctypes.data, width, 0, height, TJPF_RGB,
            buffer.addresses, buffer.strides, TJSAMP_420, 0,
        )  # fmt: skip
        if code != 0:
            message = _message(lib, handle)
            raise ValueError(f"TurboJPEG cannot convert {width} × {height} px to planes: {message}")
    finally:
        lib.tjDestroy(handle)
    return buffer.planes()
