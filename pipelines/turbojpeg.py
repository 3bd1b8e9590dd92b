"""The TurboJPEG that FFCV is linked with: the loader's decoder, and whether a JPEG is whole.

PIL gives pixels for a JPEG that is damaged inside its coded data without a word; libturbojpeg warns.
"""

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.beton import import_ffcv

State = Literal["whole", "irregular", "damaged"]
_TJPF_RGB, _TJPF_CMYK = 0, 11
_TJCS_CMYK, _TJCS_YCCK = 3, 4
_TJERR_FATAL = 1
# libjpeg's warnings that cost no pixel; any other ("premature end", "bad Huffman code") means lost data.
_HARMLESS = (
    "extraneous bytes",
    "adobe color transform",
    "invalid sos parameters",
    "jfif revision",
    "density",
)
_local = threading.local()


@dataclass(frozen=True)
class Verdict:
    """What the decoder said of one JPEG."""

    state: State
    """whole: not a word; irregular: all pixels there, but the decoder warned; damaged: pixels are missing."""
    width: int
    height: int
    message: str = ""
    """The decoder's own words, empty for a whole picture."""


class _Decoder:
    """One TurboJPEG handle and its scratch memory; not to be shared by threads."""

    def __init__(self) -> None:
        self._lib = library()
        self._handle = ctypes.c_void_p(self._lib.tjInitDecompress())
        if not self._handle.value:
            raise MemoryError("TurboJPEG gave no decoder")
        self._scratch = np.zeros(0, np.uint8)

    def __del__(self) -> None:
        if (handle := getattr(self, "_handle", None)) and handle.value:
            self._lib.tjDestroy(handle)

    def check(self, payload: npt.NDArray[np.uint8]) -> Verdict:
        size = [ctypes.c_int(0) for _ in range(4)]
        data = payload.ctypes.data
        references = [ctypes.byref(n) for n in size]
        code = self._lib.tjDecompressHeader3(self._handle, data, payload.size, *references)
        width, height = size[0].value, size[1].value
        if code != 0 and (width < 1 or height < 1 or self._is_fatal()):
            return Verdict("damaged", width, height, self._message())
        # At one eighth the entropy decoding, where damage shows, is complete, and the rest is nearly free.
        small_width, small_height = (width + 7) // 8, (height + 7) // 8
        if self._scratch.size < small_width * small_height * 4:
            self._scratch = np.empty(small_width * small_height * 4, np.uint8)
        target = self._scratch.ctypes.data
        pixels = _TJPF_CMYK if size[3].value in (_TJCS_CMYK, _TJCS_YCCK) else _TJPF_RGB
        code = self._lib.tjDecompress2(
            self._handle, data, payload.size, target, small_width, 0, small_height, pixels, 0
        )
        if code == 0:
            return Verdict("whole", width, height)
        message = self._message()
        harmless = not self._is_fatal() and any(words in message.lower() for words in _HARMLESS)
        return Verdict("irregular" if harmless else "damaged", width, height, message)

    def _is_fatal(self) -> bool:
        return bool(self._lib.tjGetErrorCode(self._handle) == _TJERR_FATAL)

    def _message(self) -> str:
        words: bytes = self._lib.tjGetErrorStr2(self._handle)
        return words.decode("utf-8", "replace")


@functools.cache
def library() -> ctypes.CDLL:
    """FFCV's compiled library, through which TurboJPEG's functions are found, with their types declared.

    Raises ImportError where FFCV is missing.
    """
    import_ffcv()
    import ffcv._libffcv

    lib = ctypes.CDLL(ffcv._libffcv.__file__)
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_ulong
    lib.tjInitDecompress.argtypes, lib.tjInitDecompress.restype = [], pointer
    lib.tjDestroy.argtypes = [pointer]
    lib.tjDecompressHeader3.argtypes = [pointer, pointer, size, *[ctypes.POINTER(integer)] * 4]
    # handle, JPEG, its size, pixels, width, pitch, height, pixel format, flags
    lib.tjDecompress2.argtypes = [pointer, pointer, size, pointer, *[integer] * 5]
    lib.tjGetErrorCode.argtypes = [pointer]
    lib.tjGetErrorStr2.argtypes, lib.tjGetErrorStr2.restype = [pointer], ctypes.c_char_p
    return lib


def check_jpeg(payload: bytes | npt.NDArray[np.uint8]) -> Verdict:
    """Decode a JPEG completely and say whether it is whole. Runs without the interpreter's lock."""
    decoder: _Decoder | None = getattr(_local, "decoder", None)
    if decoder is None:
        decoder = _local.decoder = _Decoder()
    return decoder.check(np.frombuffer(payload, np.uint8))
