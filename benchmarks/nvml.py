"""How busy a GPU is by NVIDIA's management library, where the package nvidia-ml-py is installed."""

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

_EVERY_S = 0.2


@dataclass
class Watch:
    """What was seen of a GPU so far."""

    busy_percent: list[int] = field(default_factory=list)
    """Share of the time in which at least one kernel ran, in one sample after the other."""

    @property
    def idle_percent(self) -> float | None:
        """Mean share of the time in which no kernel ran; None where nothing could be seen."""
        return round(100 - statistics.fmean(self.busy_percent), 1) if self.busy_percent else None


@contextmanager
def watching(device: torch.device) -> Iterator[Watch]:
    """Look at the GPU a few times a second while the ``with`` block runs; without NVML nothing is seen."""
    watch, over = Watch(), threading.Event()

    def look() -> None:
        while not over.wait(_EVERY_S):
            try:
                watch.busy_percent.append(torch.cuda.utilization(device))
            except Exception:  # no package, no driver, no permission: NVML's own errors share no other base
                return

    thread = threading.Thread(target=look, daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield watch
    finally:
        over.set()
        if device.type == "cuda":
            thread.join()
