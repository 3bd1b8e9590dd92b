"""Whether a GPU decodes JPEGs in hardware: nvJPEG, the library that would use the unit, is asked for it.

No list of GPUs is kept here; what has a unit differs within one compute capability.
"""

import contextlib
import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

BACKEND_HARDWARE = 3
"""NVJPEG_BACKEND_HARDWARE of nvjpeg.h."""
SUCCESS, ARCH_MISMATCH = 0, 7
"""NVJPEG_STATUS_SUCCESS and NVJPEG_STATUS_ARCH_MISMATCH of nvjpeg.h."""
_SYSTEM_NAMES = ("libnvjpeg.so.13", "libnvjpeg.so.12")


class JpegUnit(NamedTuple):
    """What was found out about a GPU's unit for JPEGs."""

    present: bool
    why_not: str = ""
    """Why it cannot be counted on, as half a sentence; "" where it is present."""


def find_jpeg_unit(device: torch.device, load: Callable[[str], Any] = ctypes.CDLL) -> JpegUnit:
    """Ask nvJPEG for a decoder in hardware on a GPU, and give it back.

    Args:
        device: a GPU. A CPU has nothing to ask, and asking would start CUDA.
        load: opens a library by its file or name; raises OSError where there is none.
    """
    assert device.type == "cuda", f"only a GPU can have a JPEG unit, not {device}"
    statuses = []
    with torch.cuda.device(device):
        for name in _candidates():
            try:
                library = load(name)
            except OSError:
                continue
            status = _hardware_status(library)
            if status == SUCCESS:
                return JpegUnit(True)
            statuses.append(status)
    if not statuses:
        return JpegUnit(False, "nvJPEG's library was not found (pip install nvidia-nvjpeg)")
    if ARCH_MISMATCH in statuses:
        return JpegUnit(False, f"nvJPEG reports no JPEG unit (status {ARCH_MISMATCH})")
    return JpegUnit(False, f"nvJPEG could not look for a JPEG unit (status {statuses[0]})")


def _candidates() -> Iterator[str]:
    """The libraries inside NVIDIA's wheels, the newest first, then the system's."""
    with contextlib.suppress(ImportError):
        spec = importlib.util.find_spec("nvidia")
        folders = (spec.submodule_search_locations if spec else None) or ()
        found = [file for folder in folders for file in Path(folder).glob("**/lib/libnvjpeg.so.1*")]
        yield from sorted(map(str, found), key=lambda file: file.rpartition(".so.")[2], reverse=True)
    yield from _SYSTEM_NAMES


def _hardware_status(library: Any) -> int:
    """The status of making, and destroying, a handle that decodes in hardware."""
    pointer = ctypes.c_void_p
    library.nvjpegCreateEx.argtypes = [ctypes.c_int, pointer, pointer, ctypes.c_uint, ctypes.POINTER(pointer)]
    library.nvjpegDestroy.argtypes = [pointer]
    handle = pointer()
    status = int(library.nvjpegCreateEx(BACKEND_HARDWARE, None, None, 0, ctypes.byref(handle)))
    if status == SUCCESS:
        library.nvjpegDestroy(handle)
    return status
