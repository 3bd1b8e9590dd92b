"""The worker threads. A task of a worker is one slice of a batch: fetch, crop and, on a CPU, augment it.

A worker draws the crop boxes, calls the decoder, replaces images that cannot be decoded and draws the
photometric parameters. If the training device is a CPU, it also applies the photometric stage, while the
views are still in the cache. A worker that is done with its slice takes the next one, which may belong to the
next batch. For a decoder that leaves crops on a GPU, a task is a whole batch, and there are two workers.

Shape letters: N images of a slice or batch, B bad ones among them, V views, S side in pixels, P parameters.
"""

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment.draws import draw_boxes, draw_parameters
from pipelines.augment.photometric_cpu import augment_on_cpu
from pipelines.decode import Decoder, DeviceDecoder
from pipelines.device import record_event, synchronize
from pipelines.kernels.compiled import kernel
from pipelines.randomness import Draw
from pipelines.recipe import Recipe
from pipelines.sets import Encoded, PictureSet, RankShare
from pipelines.sets.manifest import verify_hint

log = logging.getLogger(__name__)

DEVICE_WORKERS = 2
"""Worker threads of a decoder that crops on a device. One prepares a batch while the other one waits."""
_MIN_SLICE = 8
"""Images. For smaller slices, queueing costs more time than the better balance saves."""
_READERS_PER_THREAD = 4
"""Threads that read from the disk, for each thread that decodes."""
_ALIGNMENT = 64
"""Of host memory for pixels, in bytes."""
_MAX_TRIES = 16
"""Neighbours that are tried as replacement of an image that cannot be decoded."""
_MAX_BAD_SHARE, _MIN_BAD_LIMIT = 0.01, 10
"""The run stops if more than this share of an epoch's images is bad, and more than this number of images."""
_MAX_NAMED = 1000
"""Bad images that are reported by name. For further ones only the index is reported."""


class BadImagesError(ValueError):
    """Too many images of a set cannot be decoded."""


@dataclass(frozen=True)
class Fault:
    """An image that could not be decoded, and the neighbour that was used in its place."""

    index: int
    name: str
    replaced_by: int


def usable_cores(num_threads: int = 0) -> int:
    """The number of threads to decode with.

    Args:
        num_threads: as requested by the user; 0 for the allowed cores divided by the ranks on this machine.

    Raises:
        ValueError: if the process may use fewer cores than that.
    """
    allowed = len(os.sched_getaffinity(0))
    if num_threads > allowed or num_threads < 0:
        raise ValueError(
            f"{num_threads} threads are requested; this process may use 1 … {allowed}, or 0 for all of them"
        )
    return num_threads or max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made; the recipe says what views look like."""

    batch_size: int
    """Images per batch on this rank."""
    device: torch.device
    """The training device. A GPU must have its number, as in cuda:0."""
    num_threads: int
    """Threads that decode."""
    seed: int = 0
    """Of all random decisions."""
    share: RankShare = field(default_factory=RankShare)
    """The part of each global batch that this process loads."""
    shuffle: bool = True
    """Whether each epoch has a new order."""
    drop_last: bool = True
    """Whether the last, smaller batch of an epoch is left out."""
    subset: NDArray[np.int64] | None = None
    """(n,) sorted positions in the set of the images of an epoch; None for all."""
    dtype: torch.dtype = torch.float32
    """Of views and mixtures."""
    compiled: bool = True
    """Whether torch.compile fuses the photometric stage and the mixing on a GPU."""


@dataclass(frozen=True)
class BatchRequest:
    """A batch to be made."""

    epoch: int
    index_N: NDArray[np.int64]
    """(N,) positions in the set."""
    augmented: bool
    """Whether workers apply the photometric stage and return views. If not, they return crops."""
    encoded: Encoded | None = None
    """The images, where a stream has read them already."""
    stream_state: str = ""
    """The stream's checkpoint after this batch."""


class _Slice(NamedTuple):
    """The result of a worker for one slice. The pixels are written into the memory of the batch."""

    index_N: NDArray[np.int64]
    label_N: NDArray[np.int64]
    params_VNP: NDArray[np.float32]


@dataclass(frozen=True)
class MadeBatch:
    """The workers' part of a batch: pixels, positions, labels and photometric parameters."""

    request: BatchRequest
    pixels: Tensor
    """(V, N, S, S, 3) float32 augmented views, or (N, V, S, S, 3) uint8 crops. In a smaller last batch, the
    rows after the last image are undefined."""
    index_N: NDArray[np.int64]
    """(N,) positions of the images in the batch. They differ from the request where an image was replaced."""
    label_N: NDArray[np.int64]
    """(N,) −1 where the set has no labels."""
    params_VNP: NDArray[np.float32]
    """(V, N, P) parameters of the photometric stage."""


@dataclass(frozen=True)
class PendingBatch:
    """A batch that is submitted to the workers."""

    request: BatchRequest
    pixels: Tensor
    slices: list[Future[_Slice]]

    def result(self) -> MadeBatch:
        """Wait for all slices. Raises the error of the first slice that failed."""
        index_N, label_N, params_VNP = zip(*(part.result() for part in self.slices), strict=True)
        return MadeBatch(
            self.request,
            self.pixels,
            np.concatenate(index_N),
            np.concatenate(label_N),
            np.concatenate(params_VNP, axis=1),
        )


class Workers:
    """Makes the batches of one loader."""

    def __init__(
        self, picture_set: PictureSet, decoder: Decoder, recipe: Recipe, config: LoaderConfig
    ) -> None:
        """No threads are started yet; ``config.subset`` must be sorted."""
        self._set, self._decoder, self._recipe, self._config = picture_set, decoder, recipe, config
        self._device_decoder = decoder if isinstance(decoder, DeviceDecoder) else None
        self._scratch = threading.local()
        self.faults: dict[int, Fault] = {}
        """Bad images by index. They are not decoded again."""

    @contextmanager
    def running(self, *, streamed: bool) -> Iterator[Callable[[BatchRequest], PendingBatch]]:
        """Start the threads. They end with the ``with`` block.

        Args:
            streamed: whether requests contain their images already, so that no reading threads are needed.

        Yields:
            A function that submits a request.
        """
        num_workers = DEVICE_WORKERS if self._device_decoder else self._config.num_threads
        with ExitStack() as stack:
            workers = _thread_pool("view-loader", num_workers, stack)
            readers = None
            if self._set.reads_ahead and not streamed:
                num_readers = _READERS_PER_THREAD * self._config.num_threads
                readers = _thread_pool("view-reader", num_readers, stack)
            yield partial(self._submit, workers, readers)

    def _submit(
        self, workers: ThreadPoolExecutor, readers: ThreadPoolExecutor | None, request: BatchRequest
    ) -> PendingBatch:
        """Queue a task for each slice of a batch; the readers, if there are any, fetch it first."""
        config = self._config
        pixels = self._allocate(augmented=request.augmented)
        memory_free = record_event(pixels.device) if pixels.is_cuda else None
        size = max(_MIN_SLICE, -(-config.batch_size // (2 * config.num_threads)))
        if self._device_decoder:
            size = config.batch_size
        slices = []
        for start in range(0, len(request.index_N), size):
            rows = slice(start, start + size)
            index_N = request.index_N[rows]
            if request.encoded is not None:
                fetch: Callable[[], Encoded] = partial(request.encoded.part, rows)
            else:
                index_N = self._replace_known_bad(index_N)
                fetch = partial(self._set.fetch, index_N)
            if readers:
                fetch = readers.submit(fetch).result
            slices.append(workers.submit(self._make, request, index_N, fetch, pixels, start, memory_free))
        return PendingBatch(request, pixels, slices)

    def _allocate(self, *, augmented: bool) -> Tensor:
        """Uninitialised memory for the pixels of a batch; pinned if they will be uploaded to a GPU."""
        num, device = self._config.batch_size, self._config.device
        views, side = self._recipe.num_views, self._recipe.crop_px
        if augmented:
            return _empty((views, num, side, side, 3), np.float32)
        shape = (num, views, side, side, 3)
        if device.type == "cpu":
            return _empty(shape, np.uint8)
        if self._device_decoder:
            return torch.empty(shape, dtype=torch.uint8, device=device)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def _replace_known_bad(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        if not self.faults:
            return index_N
        known = ((index, self.faults.get(index)) for index in index_N.tolist())
        return np.array([fault.replaced_by if fault else index for index, fault in known], np.int64)

    def record_faults(self, made: MadeBatch, count: int) -> None:
        """Add the images of a batch that were replaced to ``faults``, and log them.

        Raises:
            BadImagesError: if ``faults`` holds too many of the ``count`` images of an epoch.
        """
        index_N = made.request.index_N
        for n in np.flatnonzero(index_N != made.index_N):
            index, used = int(index_N[n]), int(made.index_N[n])
            if index in self.faults:
                continue
            # Looking up a name is slow: it may read a text file up to the line of the image.
            name = self._set.name(index) if len(self.faults) < _MAX_NAMED else "not looked up"
            self.faults[index] = Fault(index, name, used)
            log.warning("image %d (%s) cannot be decoded; image %d is used in its place", index, name, used)
        limit = max(_MIN_BAD_LIMIT, int(_MAX_BAD_SHARE * count))
        if len(self.faults) > limit:
            raise BadImagesError(
                f"{len(self.faults)} images cannot be decoded, the limit is {limit} of {count}; one is "
                f"{next(iter(self.faults.values())).name}; {verify_hint()}"
            )

    def _make(
        self,
        request: BatchRequest,
        index_N: NDArray[np.int64],
        fetch: Callable[[], Encoded],
        pixels: Tensor,
        start: int,
        memory_free: torch.cuda.Event | None,
    ) -> _Slice:
        """The task of a worker: write the crops or the augmented views of one slice into ``pixels``."""
        num, epoch, seed = len(index_N), request.epoch, self._config.seed
        views_NVSS3 = self._scratch_views(num) if request.augmented else pixels[start : start + num]
        encoded = fetch()
        if memory_free is not None:
            # The decoder writes on its own CUDA stream. Work queued earlier may still use this memory.
            memory_free.synchronize()
        used_N = self._crop(epoch, index_N, encoded, views_NVSS3)
        params_VNP = draw_parameters(self._recipe, Draw(seed, epoch, used_N))
        if request.augmented:
            augment_on_cpu(views_NVSS3.numpy(), params_VNP, self._recipe, pixels.numpy(), start)
        return _Slice(used_N, self._set.labels(used_N), params_VNP)

    def _scratch_views(self, num: int) -> Tensor:
        """Memory of this thread for the crops of a slice."""
        recipe, views = self._recipe, getattr(self._scratch, "views", None)
        if views is None or len(views) < num:
            shape = (num, recipe.num_views, recipe.crop_px, recipe.crop_px, 3)
            views = self._scratch.views = torch.empty(shape, dtype=torch.uint8)
        part: Tensor = views[:num]
        return part

    def _crop(
        self, epoch: int, index_N: NDArray[np.int64], encoded: Encoded, views_NVSS3: Tensor
    ) -> NDArray[np.int64]:
        """Crop a slice; returns the images used. Bad images are replaced by the next that can be decoded."""
        used_N = index_N.copy()
        ok_N = self._decode(epoch, encoded, views_NVSS3)
        tries = 0
        while len(bad_B := np.flatnonzero(~ok_N)):
            if tries == _MAX_TRIES:
                name = self._set.name(int(index_N[bad_B[0]]))
                raise BadImagesError(
                    f"{_MAX_TRIES} images in a row from {name} on cannot be decoded; {verify_hint()}"
                )
            tries += 1
            used_N[bad_B] = self._next_images(used_N[bad_B])
            replacement_BVSS3 = torch.empty_like(views_NVSS3[: len(bad_B)])
            synchronize(views_NVSS3.device)  # earlier work may still use this memory
            ok_N[bad_B] = self._decode(epoch, self._set.fetch(used_N[bad_B]), replacement_BVSS3)
            views_NVSS3[torch.from_numpy(bad_B).to(views_NVSS3.device)] = replacement_BVSS3
            synchronize(views_NVSS3.device)
        return used_N

    def _next_images(self, index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """The images that follow these in the set, or in the subset."""
        subset = self._config.subset
        if subset is None:
            return (index_B + 1) % self._set.count
        return subset[np.searchsorted(subset, index_B, "right") % len(subset)]

    def _decode(self, epoch: int, encoded: Encoded, views_NVSS3: Tensor) -> NDArray[np.bool_]:
        """Draw the boxes and write the crops; returns which images could be decoded."""
        draw = Draw(self._config.seed, epoch, encoded.index_N)
        boxes_NV5 = draw_boxes(self._recipe, draw, encoded.size_N2)
        if self._device_decoder:
            return self._device_decoder.crop_on_device(encoded, boxes_NV5, views_NVSS3)
        return self._decoder.crop(encoded, boxes_NV5, views_NVSS3.numpy())


def _empty(shape: tuple[int, ...], dtype: type[np.float32 | np.uint8]) -> Tensor:
    """Uninitialised host memory, allocated by numba and aligned as torch aligns its own.

    torch allocates with posix_memalign, for which glibc searches a gap larger than the block. If the process
    keeps freed memory (:func:`pipelines.device.keep_freed_memory`), a batch would not fit into the gap that
    the batch before has left, and the process would grow. NumPy asks the system for huge pages, and on a
    system with fragmented memory the first batches wait for them.
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = _allocate(num_bytes + _ALIGNMENT)
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + num_bytes].view(dtype).reshape(shape))


@kernel
def _allocate(num_bytes: int) -> NDArray[np.uint8]:
    """Memory from malloc(3)."""
    return np.empty(num_bytes, np.uint8)


def _thread_pool(name: str, num_threads: int, stack: ExitStack) -> ThreadPoolExecutor:
    """Start threads that end with ``stack``: running tasks are completed, waiting ones are cancelled."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool
