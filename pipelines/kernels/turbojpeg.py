"""Find libturbojpeg, declare its functions, and return their addresses for compiled code.

:mod:`pipelines.decode.jpeg` calls the functions from Python, and :mod:`pipelines.kernels.jpeg_crops` calls
them from compiled code.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.kernels.compiled import address_of

TJPF_RGB, TJPF_GRAY, TJPF_CMYK = 0, 6, 11
TJCS_RGB, TJCS_YCBCR, TJCS_CMYK, TJCS_YCCK = 0, 1, 3, 4
TJSAMP_444, TJSAMP_422, TJSAMP_420, TJSAMP_440 = 0, 1, 2, 4
TJFLAG_ACCURATEDCT = 4096
TJERR_FATAL = 1
LIBRARY_VARIABLE = "LIBTURBOJPEG"
"""The environment variable that may hold the path of the library."""
INSTALL = f"install it with `apt-get install libturbojpeg0`, or set {LIBRARY_VARIABLE} to its path"
_SYSTEM_NAME = "libturbojpeg.so.0"
# The first version with tjGetErrorCode. Versions 3.x have all functions of 2.x.
_OLDEST = "2.0"
_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_ulong
# Pointers are declared as plain addresses, which compiled code can pass too: `uint8 **planes` is the address
# of three addresses, `int *strides` is the address of three int32. Only tjDecompressHeader3 declares typed
# pointers.
_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "tjInitDecompress": ([], _POINTER),
    "tjInitCompress": ([], _POINTER),
    "tjDestroy": ([_POINTER], _INT),
    # handle, JPEG, its size, and where to put width, height, subsampling, colour space
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


class Functions(NamedTuple):
    """Addresses, as integers, of the functions that compiled code calls."""

    init: int
    destroy: int
    header: int
    to_rgb: int
    to_planes: int


@functools.cache
def functions() -> Functions:
    """Find the functions that compiled code calls. Raises the errors of :func:`library`."""
    found = library()
    return Functions(
        address_of(found.tjInitDecompress),
        address_of(found.tjDestroy),
        address_of(found.tjDecompressHeader3),
        address_of(found.tjDecompress2),
        address_of(found.tjDecompressToYUVPlanes),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Load libturbojpeg and declare the functions that are used.

    These places are searched in order: the path in the environment variable LIBTURBOJPEG; the library with
    which an installed FFCV is linked; the system's library. FFCV itself is not imported, because that takes
    seconds and changes torch's number of threads.

    Raises:
        ImportError: if there is no libturbojpeg.
        ValueError: if LIBTURBOJPEG does not name a libturbojpeg.
    """
    if named := os.environ.get(LIBRARY_VARIABLE):
        try:
            return _load(named)
        except (OSError, AttributeError) as error:
            raise ValueError(
                f"{LIBRARY_VARIABLE} is {named!r}, which is not libturbojpeg {_OLDEST} or newer ({error}); "
                "set it to the path of the library, or unset the variable to use the system's"
            ) from error
    failures = []
    for name in (*_linked_with_ffcv(), _SYSTEM_NAME):
        try:
            return _load(name)
        except (OSError, AttributeError) as error:
            failures.append(str(error))
    raise ImportError(f"libturbojpeg {_OLDEST} or newer was not found ({'; '.join(failures)}); {INSTALL}")


def is_found() -> bool:
    """Whether libturbojpeg is found. Raises ValueError as :func:`library` does."""
    try:
        library()
    except ImportError:
        return False
    return True


def _linked_with_ffcv() -> Iterator[str]:
    """Paths of FFCV's compiled module. Loading it also loads the libturbojpeg that it is linked with."""
    with contextlib.suppress(ImportError):
        spec = importlib.util.find_spec("ffcv")
        for folder in (spec.submodule_search_locations if spec else None) or ():
            yield from sorted(map(str, Path(folder).glob("_libffcv*.so")))


def _load(name: str) -> ctypes.CDLL:
    """Open a library and declare its functions. Raises AttributeError if it lacks one."""
    lib = ctypes.CDLL(name)
    for function, (arguments, result) in _FUNCTIONS.items():
        found = getattr(lib, function)
        found.argtypes, found.restype = arguments, result
    return lib
