"""What the half hour measures: its parts, their rows with cost and limit, sizes, how rates are measured."""

import math
import pkgutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch

from benchmarks.timing import summary
from pipelines.workers import usable_cores

PartName = Literal["check", "ceilings", "loader", "nvjpeg", "step", "train", "dali"]
PARTS: tuple[PartName, ...] = get_args(PartName)
SOURCES: Mapping[PartName, str] = {
    "check": "benchmarks.half_hour.hardware:gpu_tests",
    "ceilings": "benchmarks.half_hour.hardware:ceilings",
    "loader": "benchmarks.half_hour.loading:loader",
    "nvjpeg": "benchmarks.half_hour.hardware:nvjpeg",
    "step": "benchmarks.half_hour.steps:step",
    "train": "benchmarks.half_hour.runs:real_runs",
    "dali": "benchmarks.half_hour.loading:dali",
}
"""Part → the function that lists its rows."""
_AGREEMENT = 0.1
_QUEUED_S = 0.05


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    arch: str
    crop_px: int
    batch_size: int
    queue_len: int
    num_images: int  # images to draw where there are no photographs
    num_entries: int
    """Entries of the long set, which repeats the images so that an epoch has hundreds of steps."""
    train_steps: int  # steps of a real run, including the stop and the resume
    log_every_s: float
    matrix_side: int
    copy_mib: int
    turns: int
    turn_s: float  # minimum length of a turn
    warm_up_calls: int  # maximum length of a rate's warm-up


FULL = Size("resnet50", 224, 256, 65536, 1024, 51200, 320, 1.0, 8192, 1024, 5, 1.0, 30)
TINY = Size("resnet10w16", 32, 8, 64, 40, 800, 200, 0.1, 256, 1, 2, 0.05, 6)


@dataclass(frozen=True)
class Images:
    """The images that loaders read; a path is empty where there is no such set."""

    how: str  # what they are, in a sentence
    folder: str = ""  # class folders of JPEG files
    beton: str = ""  # the same images compiled
    shards: str = ""  # the same images compiled into shards
    long: str = ""  # the compiled file, with each image repeated

    def path(self) -> str:
        """Return the set that the loader and real runs read."""
        return self.long or self.folder


@dataclass(frozen=True)
class Setup:
    """What every row depends on."""

    device: str
    tiny: bool
    out: str  # folder for logs and intermediate files
    images: Images

    @property
    def size(self) -> Size:
        """How large everything is."""
        return TINY if self.tiny else FULL

    @property
    def on(self) -> torch.device:
        """The device to measure."""
        return torch.device("cuda", 0) if self.device == "cuda" else torch.device(self.device)

    def settle(self) -> None:
        """Wait until the device has done everything that was queued."""
        if self.device == "cuda":
            torch.cuda.synchronize(self.on)


@dataclass(frozen=True)
class Row:
    """One row of a part."""

    measure: Callable[[], dict[str, Any]]
    """Returns the figures; raises ImportError where a package is missing."""
    cost_s: float  # estimate; a row starts only where its part has as much time left
    limit_s: float  # the row is ended when it takes longer than this
    needs_gpu: bool = False
    alone: bool = False
    """Needs a process of its own, because a library keeps the GPU's memory until the process ends."""


def rows_of(source: str, setup: Setup) -> dict[str, Row]:
    """Return name → row of a part, the most important first; ``source`` is "module:function"."""
    return cast(Callable[[Setup], dict[str, Row]], pkgutil.resolve_name(source))(setup)


def row(setup: Setup, cost_s: float, measure: Callable[..., dict[str, Any]], *args: Any, **more: bool) -> Row:
    """Return a row that calls ``measure(setup, *args)``; in a tiny run its cost is 1 s."""
    cost_s, limit_s = (1.0, 240.0) if setup.tiny else (cost_s, 2 * cost_s + 60)
    return Row(partial(measure, setup, *args), cost_s, limit_s, **more)


def published_name(method: str, precision: str = "bf16") -> str:
    """Return the row of the published formulation, which the method's other steps are compared with."""
    return f"{method}, published, {precision}"


def rates(
    call: Callable[[], object],
    items: float,
    setup: Setup,
    unit: str = "samples/s",
    *,
    least: int = 3,
    most_queued: int = 64,
) -> dict[str, Any]:
    """Measure items per second of ``call``, without compilation and warm-up.

    The warm-up ends when two consecutive calls take the same time within a tenth, or after the size's maximum
    of calls. The turns follow.

    Args:
        call: does the work once, or queues it.
        items: what one call counts for.
        setup: the device, and the number and length of turns.
        unit: of the rate.
        least: minimum number of calls of the warm-up.
        most_queued: the device is waited for after so many calls, or after as many as take 0.05 s.

    Returns:
        median, low, high and turns, the unit, and the share of the host's cores that this process used.
    """

    def timed(num: int) -> float:
        start = time.perf_counter()
        for _ in range(num):
            call()
        setup.settle()
        return time.perf_counter() - start

    before, last = math.inf, timed(1)
    for number in range(1, setup.size.warm_up_calls):
        if number >= least and abs(last - before) <= _AGREEMENT * last:
            break
        before, last = last, timed(1)
    queued = max(1, min(most_queued, int(_QUEUED_S / last)))
    turns = []
    cpu_start, start = time.process_time(), time.perf_counter()
    for _ in range(setup.size.turns):
        num, elapsed = 0, 0.0
        while elapsed < setup.size.turn_s:
            elapsed += timed(queued)
            num += queued
        turns.append(items * num / elapsed)
    cpu_share = (time.process_time() - cpu_start) / (time.perf_counter() - start) / usable_cores(0)
    return {**summary(turns), "unit": unit, "cpu_share": round(cpu_share, 4)}


def peak_mib(setup: Setup, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``measure`` returns and, on a GPU, the peak memory of torch's tensors."""
    if setup.device != "cuda":
        return measure()
    torch.cuda.reset_peak_memory_stats(setup.on)
    figures = measure()
    return {**figures, "peak_mib": round(torch.cuda.max_memory_allocated(setup.on) / 2**20, 1)}
