"""From the host to a device without either waiting: memory lent for copies, batches made ready one ahead."""

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Uploads:
    """Copies of host memory to a device that are still under way, and the memory they read."""

    def __init__(self, device: torch.device, most: int) -> None:
        """Copies go to ``device``; at most so many of them, the oldest is waited for."""
        self._device, self._most = device, most
        self._held: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def __len__(self) -> int:
        """Copies that are not known to be over."""
        return len(self._held)

    def pinned(self, column: Tensor) -> Tensor:
        """In memory that can be copied while the host goes on, where there is a device to copy to."""
        return column.pin_memory() if self._device.type == "cuda" else column

    def hold(self, memory: Tensor) -> None:
        """Keep memory from being overwritten before the device has read it; wait if there is much of it."""
        # A blocking event lets a host that waits sleep, so that its core can decode.
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._held.append((event, memory))
        while self._held and (len(self._held) > self._most or self._held[0][0].query()):
            self._held.popleft()[0].synchronize()


def one_ahead(
    batches: Generator[T, None, None], tensors_of: Callable[[T], list[Tensor]], device: torch.device
) -> Iterator[T]:
    """Queue each batch's uploads and operators before the step of the batch before it is queued.

    They run on a stream beside the present one, so that copies and small kernels fill the gaps of a step; the
    present stream waits for them when the batch is handed out. On a CPU nothing runs beside anything, and the
    batches are only asked for one ahead.

    tensors_of: all that the training will use of a batch; its memory is not given away before the training's
    stream is through with it.
    """
    stream = _side_stream(device) if device.type == "cuda" else None
    with closing(batches):
        waiting = _queued(batches, stream)
        while waiting is not None:
            batch, ready = waiting
            waiting = _queued(batches, stream)
            if ready is not None:
                present = torch.cuda.current_stream(device)
                present.wait_event(ready)
                for tensor in tensors_of(batch):
                    tensor.record_stream(present)
            yield batch
            del batch


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loaders of a process: memory that one stream has freed does not serve another."""
    return torch.cuda.Stream(device)


def _queued(
    batches: Iterator[T], stream: torch.cuda.Stream | None
) -> tuple[T, torch.cuda.Event | None] | None:
    """The next batch and the event that says it is made; None at the end."""
    with torch.cuda.stream(stream):
        for batch in batches:
            return batch, stream.record_event() if stream else None
    return None
