"""What the half hour measures: its parts, their rows with cost and limit, sizes, and how a rate is taken.

python -m benchmarks.half_hour --help
"""

import math
import pkgutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from benchmarks.timing import summary
from pipelines.workers import usable_cores

PartName = Literal["check", "ceilings", "loader", "nvjpeg", "step", "train", "dali"]
PARTS: tuple[PartName, ...] = get_args(PartName)
SOURCES: Mapping[PartName, str] = {
    "check": "benchmarks.half_hour.hardware:check",
    "ceilings": "benchmarks.half_hour.hardware:ceilings",
    "loader": "benchmarks.half_hour.loading:loader",
    "nvjpeg": "benchmarks.half_hour.hardware:nvjpeg",
    "step": "benchmarks.half_hour.steps:step",
    "train": "benchmarks.half_hour.runs:train",
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
    num_images: int
    """Images to draw where there are no photographs."""
    num_entries: int
    """Entries of the long set, which repeats the images so that an epoch has hundreds of steps."""
    train_steps: int
    """Steps of a real run, the stop and the resume included."""
    log_every_s: float
    matrix_side: int
    copy_mib: int
    turns: int
    turn_s: float
    """Least length of a turn."""
    warm_up_calls: int
    """A rate's warm-up has at most so many."""


FULL = Size("resnet50", 224, 256, 65536, 1024, 51200, 320, 1.0, 8192, 1024, 5, 1.0, 30)
TINY = Size("resnet10w16", 32, 8, 64, 40, 800, 200, 0.1, 256, 1, 2, 0.05, 6)


@dataclass(frozen=True)
class Images:
    """The images that loaders read; a path is empty where there is no such set."""

    how: str
    """What they are, in a sentence."""
    folder: str = ""
    """Class folders of JPEG files."""
    beton: str = ""
    """The same images compiled."""
    shards: str = ""
    """The same images compiled into shards."""
    long: str = ""
    """Of the compiled file, with each image repeated."""

    def path(self) -> str:
        """The set that the loader and real runs read."""
        return self.long or self.folder


@dataclass(frozen=True)
class Setup:
    """What every row must know."""

    device: str
    tiny: bool
    out: str
    """Folder for what is made on the way."""
    images: Images

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Setup":
        """The inverse of ``dataclasses.asdict``."""
        return cls(**{**plain, "images": Images(**plain["images"])})

    @property
    def size(self) -> Size:
        """How large everything is."""
        return TINY if self.tiny else FULL

    @property
    def on(self) -> torch.device:
        """The device to measure."""
        return torch.device("cuda", 0) if self.device == "cuda" else torch.device(self.device)

    def config(self) -> dict[str, Any]:
        """What figures depend on, for the JSON."""
        return {"device": self.device, "tiny": self.tiny, **asdict(self.size)}

    def settle(self) -> None:
        """Wait until the device has done all that was queued."""
        if self.device == "cuda":
            torch.cuda.synchronize(self.on)


@dataclass(frozen=True)
class Row:
    """One row of a part."""

    measure: Callable[[], dict[str, Any]]
    """Returns the figures; an ImportError says which package is missing."""
    cost_s: float
    """Estimate; a row begins only where its part has as much time left."""
    limit_s: float
    """The row is ended when it takes longer than this."""
    needs_gpu: bool = False
    alone: bool = False
    """Needs a process of its own, because a library keeps the GPU's memory to the end of a process."""


def rows_of(source: str, setup: Setup) -> dict[str, Row]:
    """Name → row of a part, the most important first; ``source``: "module:function"."""
    list_rows = cast(Callable[[Setup], dict[str, Row]], pkgutil.resolve_name(source))
    return list_rows(setup)


def rates(
    call: Callable[[], object],
    items: float,
    setup: Setup,
    unit: str = "samples/s",
    *,
    least: int = 3,
    most_queued: int = 64,
) -> dict[str, Any]:
    """Items per second of ``call``, without compilation and warm-up.

    The warm-up ends when two calls in a row take the same time within a tenth, or after the most calls that
    the size allows; then follow the turns.

    Args:
        call: does the work once, or queues it.
        items: what one call counts for.
        setup: the device, and how many turns of which length.
        unit: of the rate.
        least: calls that the warm-up has at least.
        most_queued: calls after which the device is waited for, or as many as take 0.05 s.

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
    """What ``measure`` returns and, on a GPU, the greatest amount of memory that torch's tensors took."""
    if setup.device != "cuda":
        return measure()
    torch.cuda.reset_peak_memory_stats(setup.on)
    figures = measure()
    return {**figures, "peak_mib": round(torch.cuda.max_memory_allocated(setup.on) / 2**20, 1)}


def row(
    setup: Setup, cost_s: float, measure: Callable[..., dict[str, Any]], *words: Any, **more: bool
) -> Row:
    """A row that calls ``measure(setup, *words)``; a tiny one costs next to nothing, but may be slow."""
    cost_s, limit_s = (1.0, 240.0) if setup.tiny else (cost_s, 2 * cost_s + 60)
    return Row(partial(measure, setup, *words), cost_s, limit_s, **more)


def published_name(method: str, precision: str = "bf16") -> str:
    """The row of the published formulation, which the other steps of a method are compared with."""
    return f"{method}, published, {precision}"


def files_below(folder: str) -> list[Path]:
    """Image files of class folders, in order."""
    return sorted(path for path in Path(folder).glob("*/*") if path.is_file())
