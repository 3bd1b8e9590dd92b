"""The training device: uploads that do not block the host, one batch prepared ahead, and memory settings."""

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
    """Set the C library to keep freed memory for reuse instead of returning it to the system.

    Batches and training steps on a CPU repeatedly allocate and free large tensors of the same sizes. By
    default, glibc maps new pages for each of them, and the system clears every page: some 5,000 page faults
    in a training step of the demo's encoder. With this setting there are none, and the peak of memory is the
    same. The setting applies to the whole process and cannot be undone.

    Returns:
        Whether it was set. C libraries other than glibc have no such option.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor from the host to a device. For a GPU, the copy is asynchronous."""
    # torch reuses pinned memory only after all copies from it are complete.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class RunAheadLimit:
    """Limits the number of batches with unfinished work on a GPU, so that the host does not run far ahead."""

    def __init__(self, device: torch.device, limit: int) -> None:
        """Allow at most ``limit`` batches with unfinished work."""
        self._device, self._limit = device, limit
        self._pending: deque[torch.cuda.Event] = deque()

    def __len__(self) -> int:
        """Number of batches that may have unfinished work."""
        return len(self._pending)

    def mark(self) -> None:
        """Record that all work of a batch is queued; wait for the oldest batch if there are too many."""
        self._pending.append(record_event(self._device))
        while self._pending and (len(self._pending) > self._limit or self._pending[0].query()):
            self._pending.popleft().synchronize()


def record_event(device: torch.device) -> torch.cuda.Event:
    """Record an event that is complete when all work queued so far on the GPU's current stream is."""
    # blocking=True: a host thread that waits for the event sleeps, so its core is free for decoding.
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


def synchronize(device: torch.device) -> None:
    """Wait for all work on a GPU's current stream of this thread; does nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def prefetch(
    batches: Generator[T, None, None], tensors_of: Callable[[T], list[Tensor]], device: torch.device
) -> Generator[T, None, None]:
    """Yield batches. Batch i + 1 is prepared before batch i is yielded.

    On a GPU, the uploads and kernels of a batch are queued on a side stream, where they run in parallel with
    the training step on the batch before. The current stream waits for them when the batch is yielded. On a
    CPU nothing runs in parallel; each batch is only requested one step early.

    Args:
        batches: a generator, closed at the end.
        tensors_of: returns all tensors of a batch. Their memory is reused only after the current stream has
            finished its work on them.
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
    """One stream for all loaders of a process, because torch reuses freed memory only on its own stream."""
    return torch.cuda.Stream(device)


def _prepare(
    batches: Generator[T, None, None], stream: torch.cuda.Stream | None
) -> tuple[T, torch.cuda.Event | None] | None:
    """The next batch and the event that marks its completion; None at the end."""
    with torch.cuda.stream(stream):
        for batch in batches:
            return batch, stream.record_event() if stream else None
    return None
