"""The TurboJPEG that FFCV is linked with: one binding for the loader's decoder and the converter's check."""

import ctypes
import functools

from pipelines.beton import import_ffcv


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
