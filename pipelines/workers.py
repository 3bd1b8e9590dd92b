"""The threads that make batches: each takes the next slice and does to it all that can be done on the host.

It draws the boxes, has the engine decode and crop, replaces what cannot be decoded, and on a machine without
a GPU runs the photometric stage while the views are still in the cache. Workers go on to the next batch
without waiting for each other. An engine that leaves crops on the training device is given whole batches
instead of slices, by two workers in turn.

Shape letters: N pictures of a slice, B bad ones among them, V views, S side in pixels, P parameters.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment.draws import draw_boxes, draw_parameters
from pipelines.augment.photometric_cpu import augment_on_cpu
from pipelines.decode.decoder import MAX_TRIES, BadPicturesError, DeviceEngine, Engine
from pipelines.decode.payloads import Payloads
from pipelines.memory import Lender
from pipelines.randomness import Draw
from pipelines.recipe import Recipe
from pipelines.sets.manifest import verify_hint

_LEAST_SLICE = 8
"""Pictures; smaller slices cost more in hand-overs than they gain in balance."""
_READERS_PER_THREAD = 4
"""Threads that wait for the disk, for each one that decodes."""
WORKERS_OF_A_DEVICE = 2
"""Threads that wait for crops on a device: one batch is made while another is prepared."""


@dataclass(frozen=True)
class Asked:
    """A batch to be made: the pictures wanted, and where a stream brings them, themselves."""

    wanted_N: NDArray[np.int64]
    fetched: Payloads | None = None
    stream_state: str = ""
    """The stream's checkpoint behind this batch."""


@dataclass(frozen=True)
class Made:
    """What workers have found out of a batch, or of a slice of one, beside the pixels."""

    index_N: NDArray[np.int64]
    """(N,) the pictures used."""
    label_N: NDArray[np.int64]
    params_VNP: NDArray[np.float32]
    stream_state: str = ""
    """Of a whole batch: what was asked for with it."""


@dataclass(frozen=True)
class Started:
    """A batch under way: what was asked for, the memory that is being filled, the slices."""

    asked: Asked
    pixels: Tensor
    slices: list[Future[Made]]

    def result(self) -> Made:
        """Wait for all slices; the first error among them is raised here."""
        parts = [part.result() for part in self.slices]
        return Made(
            np.concatenate([part.index_N for part in parts]),
            np.concatenate([part.label_N for part in parts]),
            np.concatenate([part.params_VNP for part in parts], axis=1),
            self.asked.stream_state,
        )


class Workers:
    """Makes batches of one loader. The threads live as long as the ``with`` block of :meth:`hired`."""

    def __init__(
        self,
        engine: Engine,
        recipe: Recipe,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        num_threads: int,
        subset: NDArray[np.int64] | None,
        device_engine: DeviceEngine | None,
    ) -> None:
        """Nobody is hired yet; arguments as of :class:`pipelines.loader.ViewLoader`, ``subset`` rising."""
        self._engine, self._recipe, self._seed = engine, recipe, seed
        self._batch_size, self._num_threads = batch_size, num_threads
        self._subset, self._device_engine = subset, device_engine
        side, views, on_device = recipe.crop_px, recipe.num_views, device_engine is not None
        self._bytes = Lender(
            (batch_size, views, side, side, 3),
            torch.uint8,
            device=device if on_device else None,
            pinned=device.type == "cuda" and not on_device,
        )
        self._floats = Lender((views, batch_size, side, side, 3), torch.float32)
        self._scratch = threading.local()
        self.stand_ins: dict[int, int] = {}
        """Pictures known to be bad, and which take their places; they are not tried again."""

    def hired(self, stack: ExitStack, *, streamed: bool) -> Callable[[int, Asked, bool], Started]:
        """Start the threads, which end with the stack; returns the function that gives them a batch.

        It takes the epoch, what is asked for and whether views shall be augmented, else they are crops.
        ``streamed`` batches bring their pictures and need nobody who reads.
        """
        num_workers = WORKERS_OF_A_DEVICE if self._device_engine else self._num_threads
        workers = _pool("view-loader", num_workers, stack)
        readers = None
        if self._engine.reads_ahead and not streamed:
            readers = _pool("view-reader", _READERS_PER_THREAD * self._num_threads, stack)
        return partial(self._start, workers, readers)

    def _start(
        self,
        workers: ThreadPoolExecutor,
        readers: ThreadPoolExecutor | None,
        epoch: int,
        asked: Asked,
        augmented: bool,
    ) -> Started:
        """Give a batch's slices to the workers, and to the readers before them where there are any."""
        pixels = (self._floats if augmented else self._bytes).take()
        size = max(_LEAST_SLICE, -(-self._batch_size // (2 * self._num_threads)))
        if self._device_engine:
            size = self._batch_size
        slices = []
        for start in range(0, len(asked.wanted_N), size):
            some = slice(start, start + size)
            index_N = asked.wanted_N[some]
            if asked.fetched is not None:
                fetch: Callable[[], Any] = partial(asked.fetched.part, some)
            else:
                index_N = self._without_known_bad(index_N)
                fetch = partial(self._engine.fetch, index_N)
            if readers:
                fetch = readers.submit(fetch).result
            slices.append(workers.submit(self._make, epoch, index_N, fetch, pixels, start, augmented))
        return Started(asked, pixels, slices)

    def _without_known_bad(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        if not self.stand_ins:
            return index_N
        return np.array([self.stand_ins.get(index, index) for index in index_N.tolist()], np.int64)

    def _make(
        self,
        epoch: int,
        wanted_N: NDArray[np.int64],
        fetch: Callable[[], Any],
        pixels: Tensor,
        start: int,
        augmented: bool,
    ) -> Made:
        """A worker's task: crops of one slice, written to its place in the batch; or finished views."""
        num = len(wanted_N)
        views_NVSS3 = self._scratch_views(num) if augmented else pixels[start : start + num]
        index_N = self._crop(epoch, wanted_N, fetch(), views_NVSS3)
        params_VNP = draw_parameters(self._recipe, Draw(self._seed, epoch, index_N))
        if augmented:
            augment_on_cpu(views_NVSS3.numpy(), params_VNP, self._recipe, pixels.numpy(), start)
        return Made(index_N, self._engine.labels(index_N), params_VNP)

    def _scratch_views(self, num: int) -> Tensor:
        """This worker's own memory for the crops of a slice."""
        recipe, views = self._recipe, getattr(self._scratch, "views", None)
        if views is None or len(views) < num:
            shape = (num, recipe.num_views, recipe.crop_px, recipe.crop_px, 3)
            views = self._scratch.views = torch.empty(shape, dtype=torch.uint8)
        part: Tensor = views[:num]
        return part

    def _crop(
        self, epoch: int, wanted_N: NDArray[np.int64], fetched: Any, views_NVSS3: Tensor
    ) -> NDArray[np.int64]:
        """Crop a slice; an undecodable picture gives way to the next sound one. Returns the ones used."""
        index_N = wanted_N.copy()
        ok_N = self._cut(epoch, fetched, views_NVSS3)
        tries = 0
        while len(bad_B := np.flatnonzero(~ok_N)):
            if tries == MAX_TRIES:
                name = self._engine.picture_name(int(wanted_N[bad_B[0]]))
                raise BadPicturesError(
                    f"{MAX_TRIES} pictures in a row from {name} on cannot be decoded; {verify_hint()}"
                )
            tries += 1
            index_N[bad_B] = self._next(index_N[bad_B])
            stand_in_BVSS3 = torch.empty_like(views_NVSS3[: len(bad_B)])
            _settle(views_NVSS3)  # its memory may be somebody's whose work on it is still under way
            ok_N[bad_B] = self._cut(epoch, self._engine.fetch(index_N[bad_B]), stand_in_BVSS3)
            views_NVSS3[torch.from_numpy(bad_B).to(views_NVSS3.device)] = stand_in_BVSS3
            _settle(views_NVSS3)
        return index_N

    def _next(self, index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """The pictures after some, of those that an epoch goes through."""
        if self._subset is None:
            return (index_B + 1) % self._engine.count
        return self._subset[np.searchsorted(self._subset, index_B, "right") % len(self._subset)]

    def _cut(self, epoch: int, fetched: Any, views_NVSS3: Tensor) -> NDArray[np.bool_]:
        """Have the engine write the crops of some pictures; which of them could be decoded."""
        draw = Draw(self._seed, epoch, fetched.index_N)
        boxes_NV5 = draw_boxes(self._recipe, draw, fetched.size_N2)
        if self._device_engine:
            return self._device_engine.crop_on_device(fetched, boxes_NV5, views_NVSS3)
        return self._engine.crop(fetched, boxes_NV5, views_NVSS3.numpy())


def _settle(views: Tensor) -> None:
    """Wait for all that this thread has asked of a GPU."""
    if views.is_cuda:
        torch.cuda.current_stream(views.device).synchronize()


def _pool(name: str, num_threads: int, stack: ExitStack) -> ThreadPoolExecutor:
    """Threads that end with the stack, after what each is doing and before what still waits."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool
