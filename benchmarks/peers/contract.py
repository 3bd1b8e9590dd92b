"""What a peer is: how it is opened for each of the two works, how it is configured, how exact its crops are.

The two works are *crops*, two uint8 crops of a picture at the recipe's scale and ratio without a flip, and
*recipe*, two views after the whole augmentation, normalised float32.

Shape letters: N pictures, V views, S side in pixels.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.recipe import Recipe

WorkName = Literal["crops", "recipe"]
WORKS: tuple[WorkName, ...] = get_args(WorkName)
OURS = "ours"
OURS_ON_SHARDS = "ours, on shards"
OURS_DALI = "ours, DALI decodes"
OURS_STREAM = "ours, DALI's own reader"
OURS_GPU_DECODES = "ours, DALI decodes on the GPU"
TORCHVISION_PIL = "torchvision + PIL"
TORCHVISION_V2 = "torchvision v2"
FFCV = "ffcv, a decode per view"
DALI_ONCE = "DALI CPU, decode once and crop twice"
DALI_TWICE = "DALI CPU, region decode twice"
DALI_GPU_ONCE = "DALI GPU, decode once and crop twice"
DALI_GPU_TWICE = "DALI GPU, region decode twice"
TORCHVISION_GPU = "torchvision v2 on the GPU, nvJPEG"
SPDL_FFMPEG = "SPDL, FFmpeg filters"
SPDL_TORCHVISION = "SPDL, torchvision operators"
DECODE_LIMIT = "libjpeg-turbo decode only"


@dataclass(frozen=True)
class Job:
    """What a loader is asked to do."""

    folder: Path
    """The pictures as JPEG files in class folders."""
    beton: Path
    """The same pictures compiled into one file."""
    shards: Path
    """The same pictures compiled into a folder of shards."""
    recipe: Recipe
    """What a view looks like."""
    batch_size: int
    """Pictures per batch."""
    num_threads: int
    """Threads, or processes, of the loader."""


@dataclass(frozen=True)
class FixedCrops:
    """Crops that every peer is asked for alike, to compare pixels."""

    beton: Path
    """The pictures compiled into one file."""
    shards: Path
    """The same compiled into a folder of shards."""
    files: tuple[Path, ...]
    """The N pictures as files."""
    index_N: NDArray[np.int64]
    """Their positions in either compiled set."""
    boxes_NV4: NDArray[np.int32]
    """(N, V, 4) top, left, height, width in pixels."""
    crop_px: int
    """S."""

    def empty(self) -> NDArray[np.uint8]:
        """(N, V, S, S, 3) memory for the crops."""
        num, num_views, _ = self.boxes_NV4.shape
        return np.empty((num, num_views, self.crop_px, self.crop_px, 3), np.uint8)


@dataclass(frozen=True)
class Work:
    """How a peer does one of the two works."""

    open: Callable[[Job], Iterator[object]]
    """Batches without end, one for each `next`; closing the iterator frees what it holds."""
    configured: str
    """How the peer is set up and where that differs from the others, in a sentence."""
    queued: int = 0
    """At most so many finished batches wait while nobody asks for one, and for each thread …"""
    queued_per_thread: int = 0
    """… so many more."""
    settle: Callable[[], None] | None = None
    """Waits until the batches handed out are finished, where a device still works on them."""
    one_thread: bool = False
    """The work runs on one thread and its rate counts times the threads of the job."""


def settle(device: torch.device) -> Callable[[], None] | None:
    """What ``Work.settle`` is for a device that tensors are made on."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else None


@dataclass(frozen=True)
class Peer:
    """A loader to measure. What it does not offer is a sentence that says why."""

    name: str
    crops: Work | str
    recipe: Work | str
    fixed_crops: Callable[[FixedCrops], NDArray[np.uint8]] | str
    """(N, V, S, S, 3) uint8 at the boxes asked for, by the very operations of the work `crops`."""
    antialiased: bool | None
    """Whether shrinking takes all pixels into account; None where nothing is resampled."""


def works(name: WorkName, peers: Sequence[Peer]) -> dict[str, Work | str]:
    """What each peer, by its name, offers of one of the two works, or why not."""
    return {peer.name: peer.crops if name == "crops" else peer.recipe for peer in peers}


@cache
def hush_numba() -> None:
    """Keep a harmless message off the terminal.

    FFCV changes a type that numba shares (see :mod:`benchmarks.peers.with_ffcv`), and its own functions were
    compiled for the other state of it: where one is finalised, numba looks up an overload that it cannot
    find; Python reports that as an exception ignored.
    """
    report = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        of_finalizer = isinstance(unraisable.object, weakref.finalize)
        if not (of_finalizer and isinstance(unraisable.exc_value, KeyError)):
            report(unraisable)

    sys.unraisablehook = hook
