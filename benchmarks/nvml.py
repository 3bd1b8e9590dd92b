"""How busy a GPU is and what it draws, as NVIDIA's management library says, where that is installed."""

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
    """Share of the time in which at least one kernel ran."""
    watts: list[float] = field(default_factory=list)
    """Power drawn."""

    def summary(self) -> dict[str, float]:
        """Medians; empty where nothing could be seen."""
        if not self.busy_percent:
            return {}
        return {
            "nvml_busy_percent": statistics.median(self.busy_percent),
            "nvml_watts": statistics.median(self.watts),
        }


def is_there(device: torch.device) -> bool:
    """Whether NVML can be asked about ``device``: it is a GPU, and the package nvidia-ml-py is installed."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.utilization(device)
    except (ModuleNotFoundError, RuntimeError):
        return False
    return True


@contextmanager
def watching(device: torch.device) -> Iterator[Watch]:
    """Look at the GPU a few times a second while the ``with`` block runs."""
    watch, over = Watch(), threading.Event()

    def look() -> None:
        while not over.wait(_EVERY_S):
            watch.busy_percent.append(torch.cuda.utilization(device))
            watch.watts.append(torch.cuda.power_draw(device) / 1000)

    thread = threading.Thread(target=look, daemon=True) if is_there(device) else None
    if thread:
        thread.start()
    try:
        yield watch
    finally:
        over.set()
        if thread:
            thread.join()
