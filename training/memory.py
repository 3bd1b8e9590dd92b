"""What the C library does with memory that a training step on a CPU gives back."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Options of glibc's mallopt(3)."""


def keep_freed_memory() -> bool:
    """Have freed memory kept for the next step, and not given back to the system after each.

    A step takes and frees the same large tensors as the one before. By default glibc maps each anew, and the
    system clears every page of it before it is used: some 5,000 page faults in a step of the demo's encoder,
    and none with this, at the same peak of memory. It is for the whole process, and cannot be taken back.

    Returns whether it could be done; other C libraries have no such call.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))
