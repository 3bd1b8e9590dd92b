"""Stopping a run from outside without losing a step."""

import signal

import torch
import torch.distributed as dist

from engine.launch import Launch


class StopRequest:
    """Remembers SIGTERM and SIGINT, so that the loop can end after a whole step, everywhere the same."""

    def __init__(self) -> None:
        self.requested = False
        """Whether the processes have agreed to stop."""
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

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
