"""The training device and its memory: uploads that do not block, batches prepared one ahead of their use."""

import ctypes
import functools
import platform
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Options of glibc's mallopt(3)."""


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next batch or step; the system does not get it back.

    Batches and training steps on a CPU allocate and free the same large tensors over and over. By default
    glibc maps each of them anew, and the system clears every page before it is used: some 5,000 page faults
    in a step of the demo's encoder. With this there are none, at the same peak of memory. The setting applies
    to the whole process and cannot be undone.

    Returns:
        Whether it could be set; C libraries other than glibc have no such option.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor of the host to a device; a GPU copies it while the host continues."""
    # torch reuses pinned memory only after the copies from it are over.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class RunAheadLimit:
    """Bounds how far the host runs ahead of a GPU."""

    def __init__(self, device: torch.device, limit: int) -> None:
        """At most ``limit`` batches have work on the GPU that is not over."""
        self._device, self._limit = device, limit
        self._pending: deque[torch.cuda.Event] = deque()

    def __len__(self) -> int:
        """Number of batches with work that is not known to be over."""
        return len(self._pending)

    def mark(self) -> None:
        """Call when all work of a batch is queued; waits for the oldest batch if there are too many."""
        self._pending.append(record_event(self._device))
        while self._pending and (len(self._pending) > self._limit or self._pending[0].query()):
            self._pending.popleft().synchronize()


def record_event(device: torch.device) -> torch.cuda.Event:
    """An event that occurs when all work now queued on a GPU's current stream is over."""
    # With a blocking event the waiting host thread sleeps, and its core can decode.
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


def synchronize(device: torch.device) -> None:
    """Wait for all work that this thread has queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def prefetch(
    batches: Generator[T, None, None], tensors_of: Callable[[T], list[Tensor]], device: torch.device
) -> Generator[T, None, None]:
    """Prepare each batch before the training step on the batch before it is queued.

    On a GPU, uploads and kernels of a batch are queued on a side stream, where they fill the gaps of a
    training step. The current stream waits for them when the batch is yielded. On a CPU nothing runs in
    parallel; batches are only requested one ahead.

    Args:
        batches: makes the batches; closed at the end.
        tensors_of: all tensors of a batch that training uses. Their memory is reused only after the current
            stream's work on them.
        device: the training device.
    """
    stream = _side_stream(device) if device.type == "cuda" else None
    with closing(batches):
        following = _prepare(batches, stream)
        while following is not None:
            batch, ready = following
            following = _prepare(batches, stream)
            if ready is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(ready)
                for tensor in tensors_of(batch):
                    tensor.record_stream(current)
            yield batch


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loaders of a process, because torch reuses freed memory only on the same stream."""
    return torch.cuda.Stream(device)


def _prepare(
    batches: Generator[T, None, None], stream: torch.cuda.Stream | None
) -> tuple[T, torch.cuda.Event | None] | None:
    """The next batch and the event after which it is complete; None at the end."""
    with torch.cuda.stream(stream):
        for batch in batches:
            return batch, stream.record_event() if stream else None
    return None
