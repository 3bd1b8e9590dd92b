"""What a peer is: how it is opened for each of the two kinds of work, its configuration, its exact crops.

The two kinds are *crops*, two uint8 crops of an image at the recipe's scale and ratio without a flip, and
*recipe*, two views after the whole augmentation, normalised float32.

Shape letters: N images, V views, S side in pixels.
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.recipe import Recipe
from pipelines.sets.folder import FolderListing

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
    """What a loader has to load."""

    folder: Path  # the images as JPEG files in class folders
    beton: Path  # the same images compiled into one file
    shards: Path  # the same images compiled into a folder of shards
    recipe: Recipe
    batch_size: int
    num_threads: int  # threads, or processes, of the loader


@dataclass(frozen=True)
class FixedCrops:
    """Crops that every peer makes at the same boxes, to compare pixels."""

    beton: Path
    shards: Path
    files: tuple[Path, ...]  # the N images as files
    index_N: NDArray[np.int64]  # their positions in either compiled set
    boxes_NV4: NDArray[np.int32]  # (N, V, 4) top, left, height, width in pixels
    crop_px: int  # S

    def cut(self, images: Iterable[Any], cut: Callable[..., Any]) -> NDArray[np.uint8]:
        """(N, V, S, S, 3): each view is ``cut(image, top, left, height, width)``."""
        boxes = zip(images, self.boxes_NV4.tolist(), strict=True)
        return np.stack([[np.asarray(cut(image, *box)) for box in boxes_V4] for image, boxes_V4 in boxes])


@dataclass(frozen=True)
class PeerWork:
    """How a peer does one kind of work."""

    open: Callable[[Job], Iterator[object]]
    """Returns an endless iterator over batches; closing it frees what it holds."""
    configured: str  # how the peer is set up, and where that differs from the others
    queued: int = 0  # finished batches that may wait in its queues, …
    queued_per_thread: int = 0  # … and how many more for each thread
    settle: Callable[[], None] | None = None
    """Waits until the batches handed out are finished, where a device still works on them."""
    one_thread: bool = False
    """The work runs on one thread, and its rate is multiplied by the number of threads of the job."""


@dataclass(frozen=True)
class Peer:
    """A loader to measure. A string in place of a kind of work says why it is left out."""

    name: str
    crops: PeerWork | str
    recipe: PeerWork | str
    fixed_crops: Callable[[FixedCrops], NDArray[np.uint8]] | str
    """(N, V, S, S, 3) uint8 at the given boxes, by the same operations as the work `crops`."""
    antialiased: bool | None = True
    """Whether shrinking takes all pixels into account; None where nothing is resampled."""

    def work(self, name: WorkName) -> PeerWork | str:
        """Return one of the two kinds."""
        return self.crops if name == "crops" else self.recipe


def synchronizer(device: torch.device) -> Callable[[], None] | None:
    """Return ``PeerWork.settle`` for a device that batches are made on."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else None


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a class folder in the order of its compiled set."""
    listing = FolderListing(folder)
    return [folder / listing.path(i) for i in range(len(listing))]


def shuffled_batches(folder: Path, batch_size: int) -> Iterator[list[Path]]:
    """Yield batches of files without end, for libraries that leave the order to their user."""
    files = image_files(folder)
    endless = (files[i] for _ in count() for i in torch.randperm(len(files)).tolist())
    while True:
        yield list(islice(endless, batch_size))


@cache
def hush_numba() -> None:
    """Suppress numba's harmless ``KeyError`` in finalisers; see :mod:`benchmarks.peers.with_ffcv`."""
    report = sys.unraisablehook

    def hook(message: "sys.UnraisableHookArgs") -> None:
        finalising = isinstance(message.object, weakref.finalize)
        if not (finalising and isinstance(message.exc_value, KeyError)):
            report(message)

    sys.unraisablehook = hook
