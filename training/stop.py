"""Stopping a run from outside without losing a step."""

import signal
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from training.distributed import Launch


class StopRequest:
    """Remembers SIGTERM and SIGINT, so that the loop can end after a whole step, everywhere the same.

    A context manager: after it, signals do what they did before. SIGINT stays ignored where the program was
    started so: shells do that to what runs in the background, which Ctrl-C is not meant for. Where one of
    several processes fails, signals stay remembered: torchrun's to the others must not cut short what they
    say.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether the processes have agreed to stop."""
        self._signalled = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and dist.is_initialized():
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, _number: int, _frame: object) -> None:
        self._signalled = True

    def agreed(self, launch: Launch, *, ask: bool) -> bool:
        """Whether to stop now. Several processes must all ``ask`` after the same step; one alone need not."""
        if launch.world_size == 1:
            self.requested = self._signalled
        elif ask:
            flag = torch.tensor(self._signalled, device=launch.device, dtype=torch.uint8)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.requested = bool(flag)
        return self.requested
