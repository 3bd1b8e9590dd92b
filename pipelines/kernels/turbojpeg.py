"""libturbojpeg: the loader's decoder, planes, and whether a JPEG is whole.

PIL gives pixels for a JPEG that is damaged inside its coded data without a word; libturbojpeg warns.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.kernels.jpeg_markers import TABLE_MISSING, missing_table

State = Literal["whole", "irregular", "damaged"]
TJPF_RGB, TJPF_GRAY, TJPF_CMYK = 0, 6, 11
TJCS_RGB, TJCS_YCBCR, TJCS_CMYK, TJCS_YCCK = 0, 1, 3, 4
TJSAMP_444, TJSAMP_422, TJSAMP_420, TJSAMP_440 = 0, 1, 2, 4
TJFLAG_ACCURATEDCT = 4096
TJERR_FATAL = 1
LIBRARY_VARIABLE = "LIBTURBOJPEG"
"""The environment variable that names the library's file."""
INSTALL = f"`apt-get install libturbojpeg0` brings it, or name its file in {LIBRARY_VARIABLE}"
_SYSTEM_NAME = "libturbojpeg.so.0"
# The first with tjGetErrorCode. 3.x still has all functions of 2.x.
_OLDEST = "2.0"
_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_ulong
_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "tjInitDecompress": ([], _POINTER),
    "tjInitCompress": ([], _POINTER),
    "tjDestroy": ([_POINTER], _INT),
    # handle, JPEG, its size, and where to put width, height, subsampling, colours
    "tjDecompressHeader3": ([_POINTER, _POINTER, _SIZE, *[ctypes.POINTER(_INT)] * 4], _INT),
    # handle, JPEG, its size, pixels, width, pitch, height, pixel format, flags
    "tjDecompress2": ([_POINTER, _POINTER, _SIZE, _POINTER, *[_INT] * 5], _INT),
    # handle, JPEG, its size, planes, width, strides, height, flags
    "tjDecompressToYUVPlanes": ([_POINTER, _POINTER, _SIZE, _POINTER, _INT, _POINTER, _INT, _INT], _INT),
    # handle, pixels, width, pitch, height, pixel format, planes, strides, subsampling, flags
    "tjEncodeYUVPlanes": ([_POINTER, _POINTER, *[_INT] * 4, _POINTER, _POINTER, _INT, _INT], _INT),
    "tjGetErrorCode": ([_POINTER], _INT),
    "tjGetErrorStr2": ([_POINTER], ctypes.c_char_p),
}
# libjpeg's warnings that cost no pixel; any other ("premature end", "bad Huffman code") means lost data.
_HARMLESS = (
    "extraneous bytes",
    "adobe color transform",
    "invalid sos parameters",
    "jfif revision",
    "density",
)


@dataclass(frozen=True)
class Verdict:
    """What the decoder said of one JPEG."""

    state: State
    """whole: not a word; irregular: all pixels there, but the decoder warned; damaged: pixels are missing."""
    width: int
    height: int
    message: str = ""
    """The decoder's own words, empty for a whole picture."""


class Header(NamedTuple):
    """What the header of a JPEG says."""

    width: int
    height: int
    subsampling: int
    """TurboJPEG's TJSAMP number, −1 for one that it has no name for."""
    colours: int
    """TurboJPEG's TJCS number."""

    @property
    def is_colour(self) -> bool:
        """True for three components, Y, Cb, Cr or R, G, B."""
        return self.colours in (TJCS_RGB, TJCS_YCBCR)

    @property
    def is_usual(self) -> bool:
        """True where every program that uses TurboJPEG can be expected to decode it."""
        return self.subsampling >= 0

    @property
    def is_yuv420(self) -> bool:
        """True for Y, Cb, Cr at 4:2:0, whose planes ``Jpeg.planes`` gives."""
        return (self.subsampling, self.colours) == (TJSAMP_420, TJCS_YCBCR)


class Planes(NamedTuple):
    """A picture of H × W px as uint8 planes at 4:2:0: JFIF's full-range BT.601, chroma sited as in JPEG."""

    y: npt.NDArray[np.uint8]
    """(H, W)"""
    u: npt.NDArray[np.uint8]
    """(ceil(H/2), ceil(W/2))"""
    v: npt.NDArray[np.uint8]
    """(ceil(H/2), ceil(W/2))"""

    def packed(self) -> npt.NDArray[np.uint8]:
        """Return Y, U, V one after the other, rows without padding: a payload of MODE_YUV420."""
        return np.concatenate([plane.reshape(-1) for plane in self])


class _PlaneBuffer:
    """Memory for planes as TurboJPEG lays them out: Y padded to even sides, each plane its own array."""

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
    """One JPEG, and the TurboJPEG handle that decodes it; for one thread.

    No other picture gets the handle: one that has seen an error fails for the next picture too, and one that
    has seen a picture lends its tables to the next. Making one takes less than a microsecond.
    """

    header: Header | None
    """What the header says; None where the decoder cannot use it."""

    def __init__(self, payload: bytes | npt.NDArray[np.uint8]) -> None:
        """Read the header; nothing is decoded."""
        self._lib = library()
        self._handle = ctypes.c_void_p(self._lib.tjInitDecompress())
        if not self._handle.value:
            raise MemoryError("TurboJPEG gave no decoder")
        self._data = np.frombuffer(payload, np.uint8)
        self._source = self._data.ctypes.data, self._data.size
        self._said, self._fault = self._read_header()
        self.header = None if self._fault else self._said

    def __del__(self) -> None:
        if (handle := getattr(self, "_handle", None)) and handle.value:
            self._lib.tjDestroy(handle)

    def _read_header(self) -> tuple[Header, str]:
        """The header, and why it cannot be used, "" where it can."""
        numbers = [ctypes.c_int(0) for _ in range(4)]
        code = self._lib.tjDecompressHeader3(self._handle, *self._source, *map(ctypes.byref, numbers))
        header = Header(*(n.value for n in numbers))
        if header.width < 1 or header.height < 1:
            return header, self._message() if code != 0 else "there is no picture in it"
        # An unknown subsampling counts as fatal here and hinders no decoder.
        if code != 0 and header.is_usual and self._is_fatal():
            return header, self._message()
        return header, TABLE_MISSING.get(missing_table(self._data), "")

    def check(self) -> Verdict:
        """Decode it completely and say whether it is whole. Runs without the interpreter's lock."""
        width, height, _, colours = self._said
        if self._fault:
            return Verdict("damaged", width, height, self._fault)
        # In grey at one eighth the entropy decoding, where damage shows, is complete, the rest nearly free.
        pixels = TJPF_CMYK if colours in (TJCS_CMYK, TJCS_YCCK) else TJPF_GRAY
        small_width, small_height = (width + 7) // 8, (height + 7) // 8
        scratch = np.empty(small_width * small_height * (4 if pixels == TJPF_CMYK else 1), np.uint8)
        target = scratch.ctypes.data, small_width, 0, small_height, pixels, 0
        return self._verdict(self._lib.tjDecompress2(self._handle, *self._source, *target))

    def planes(self) -> Planes:
        """Decode it to its own planes: by the accurate transform, no conversion of colours or sizes.

        Raises ValueError, with the decoder's words, where pixels are missing, and where the JPEG is not of
        Y, Cb, Cr at 4:2:0; warnings that cost no pixel are passed over.
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
        """What the return code of a complete decode means."""
        width, height, _, _ = self._said
        if code == 0:
            return Verdict("whole", width, height)
        message = self._message()
        harmless = not self._is_fatal() and any(words in message.lower() for words in _HARMLESS)
        return Verdict("irregular" if harmless else "damaged", width, height, message)

    def _is_fatal(self) -> bool:
        return bool(self._lib.tjGetErrorCode(self._handle) == TJERR_FATAL)

    def _message(self) -> str:
        words: bytes = self._lib.tjGetErrorStr2(self._handle)
        return words.decode("utf-8", "replace")


class _Encoder:
    """One TurboJPEG handle, for one picture."""

    def __init__(self) -> None:
        self._lib = library()
        self._handle = ctypes.c_void_p(self._lib.tjInitCompress())
        if not self._handle.value:
            raise MemoryError("TurboJPEG gave no encoder")

    def __del__(self) -> None:
        if (handle := getattr(self, "_handle", None)) and handle.value:
            self._lib.tjDestroy(handle)

    def planes(self, rgb_HW3: npt.NDArray[np.uint8]) -> Planes:
        height, width, _ = rgb_HW3.shape
        pixels = np.ascontiguousarray(rgb_HW3)
        buffer = _PlaneBuffer(width, height)
        code = self._lib.tjEncodeYUVPlanes(
            self._handle, pixels.ctypes.data, width, 0, height, TJPF_RGB,
            buffer.addresses, buffer.strides, TJSAMP_420, 0,
        )  # fmt: skip
        if code != 0:
            words: bytes = self._lib.tjGetErrorStr2(self._handle)
            raise ValueError(f"TurboJPEG made no planes of {width} × {height} px: {words.decode()}")
        return buffer.planes()


@functools.cache
def library() -> ctypes.CDLL:
    """libturbojpeg, with the types of the functions used here declared.

    It is the file that the environment variable LIBTURBOJPEG names, or else the one FFCV is linked with where
    FFCV is installed (which is not imported: that takes seconds and sets torch's threads), or else the
    system's.

    Pointers, but for those of tjDecompressHeader3, are declared as plain addresses, which compiled code can
    pass too: ``uint8 **planes`` is the address of three addresses, ``int *strides`` that of three int32.

    Raises:
        ImportError: if there is none.
        ValueError: if LIBTURBOJPEG names something else.
    """
    if named := os.environ.get(LIBRARY_VARIABLE):
        try:
            return _load(named)
        except (OSError, AttributeError) as error:
            raise ValueError(
                f"{LIBRARY_VARIABLE} is {named!r}, which is no libturbojpeg {_OLDEST} or newer ({error}); "
                "name its file, or unset the variable to take the system's"
            ) from error
    unusable = []
    for place in (*_linked_with_ffcv(), _SYSTEM_NAME):
        try:
            return _load(place)
        except (OSError, AttributeError) as error:
            unusable.append(str(error))
    raise ImportError(f"libturbojpeg {_OLDEST} or newer was not found ({'; '.join(unusable)}). {INSTALL}")


def is_found() -> bool:
    """Whether there is a libturbojpeg. Raises ValueError as `library`."""
    try:
        library()
    except ImportError:
        return False
    return True


def _linked_with_ffcv() -> Iterator[str]:
    """FFCV's compiled part, through which the functions of the libturbojpeg it is linked with are found."""
    with contextlib.suppress(ImportError):
        spec = importlib.util.find_spec("ffcv")
        for folder in (spec.submodule_search_locations if spec else None) or ():
            yield from sorted(map(str, Path(folder).glob("_libffcv*.so")))


def _load(name: str) -> ctypes.CDLL:
    """Open a library and declare its functions; AttributeError names the first that it lacks."""
    lib = ctypes.CDLL(name)
    for function, (arguments, result) in _FUNCTIONS.items():
        found = getattr(lib, function)
        found.argtypes, found.restype = arguments, result
    return lib


def check_jpeg(payload: bytes | npt.NDArray[np.uint8]) -> Verdict:
    """Decode a JPEG completely and say whether it is whole. Runs without the interpreter's lock."""
    return Jpeg(payload).check()


def read_header(payload: bytes | npt.NDArray[np.uint8]) -> Header | None:
    """Return what the header of a JPEG says, None where the decoder cannot use it. Decodes nothing."""
    return Jpeg(payload).header


def encode_planes(rgb_HW3: npt.NDArray[np.uint8]) -> Planes:
    """Convert (H, W, 3) uint8 RGB to planes; each chroma sample is the mean of its 2 × 2 pixels.

    A last odd row or column counts twice. Raises ValueError where the array is another.
    """
    if rgb_HW3.ndim != 3 or rgb_HW3.shape[2] != 3 or rgb_HW3.dtype != np.uint8 or not rgb_HW3.size:
        raise ValueError(f"pixels are {rgb_HW3.dtype} of shape {rgb_HW3.shape}; give (H, W, 3) uint8")
    return _Encoder().planes(rgb_HW3)
