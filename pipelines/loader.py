"""The loader: order, sharding, cursor, crops and mixtures for every backend alike.

A batch is cut into slices; each worker thread takes the next one and does everything to it that can be done
on the host: it draws the boxes, has the engine decode and crop, and on a machine without a GPU runs the
photometric stage while the views are still in the cache. Workers go on to the next batch without waiting for
each other. What is left for the thread that iterates is to put slices together, upload and mix.

Shape letters: N batch, V views, S side in pixels, P parameters.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch
from pipelines.crops import draw_boxes
from pipelines.engines import MAX_TRIES, BadPicturesError, Engine, Fault
from pipelines.memory import Lender
from pipelines.mixing import mix
from pipelines.parameters import draw_parameters
from pipelines.photometric import augment
from pipelines.photometric_cpu import augment_on_cpu
from pipelines.randomness import NUM_EPOCHS, EpochOrder, key_of
from pipelines.recipe import Recipe

log = logging.getLogger(__name__)

_AHEAD = 4
"""Batches under way or ready, the one handed out next among them."""
_LEAST_SLICE = 8
"""Pictures; smaller slices cost more in hand-overs than they gain in balance."""
_READERS_PER_THREAD = 4
"""Threads that wait for the disk, for each one that decodes."""
_MOST_NAMED = 1000
"""Faults whose pictures are named; of more only the index is told."""
_STATE_VERSION = 2
_VERIFY_HINT = "verify the set with `python -m dataset_tools verify`"


@dataclass(frozen=True)
class Crops:
    """A batch before its photometric stage."""

    views: Tensor
    """(N, V, S, S, 3) uint8, on the host."""
    index: Tensor
    """(N,) int64, position in the set."""
    label: Tensor
    """(N,) int64, −1 where the set has no labels."""


@dataclass(frozen=True)
class _Slice:
    """What a worker has found out of its part of a batch, beside the pixels."""

    index_N: NDArray[np.int64]
    label_N: NDArray[np.int64]
    params_VNP: NDArray[np.float32]


@dataclass(frozen=True)
class _Started:
    """A batch under way: the pictures wanted, the memory that is being filled, the slices."""

    wanted_N: NDArray[np.int64]
    pixels: Tensor
    slices: "list[Future[_Slice]]"


class ViewLoader:
    """Iterable of :class:`Batch`; made by :func:`pipelines.build_loader`.

    Every view is a function of (seed, epoch, index, view): threads, batch size, world size and resuming
    change nothing about it. A picture that cannot be decoded is replaced by the next one of the set that can,
    listed in ``faults`` and logged by name; when more than ``max_bad_fraction`` of the set (and more than
    ten) are bad, the run stops with :class:`BadPicturesError`.
    """

    def __init__(
        self,
        engine: Engine,
        recipe: Recipe,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        num_threads: int,
        shuffle: bool,
        drop_last: bool,
        max_bad_fraction: float = 0.01,
    ) -> None:
        if not batch_size >= 1:
            raise ValueError(f"batch size is {batch_size}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must lie in [0, {world_size})")
        if drop_last and batch_size * world_size > engine.count:
            raise ValueError(
                f"a batch of {batch_size} on {world_size} rank(s) is larger than the set of {engine.count} "
                f"pictures; choose a batch size of at most {engine.count // world_size}"
            )
        if not drop_last and (world_size > 1 or recipe.mixing.method != "moco"):
            raise ValueError(
                "drop_last=False leaves a smaller last batch, which several ranks cannot share and mixing "
                "may find too small; use it with one rank and without mixing"
            )
        self.engine, self.recipe = engine, recipe
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.faults: dict[int, Fault] = {}
        self._rank, self._world_size = rank, world_size
        self._num_threads = num_threads
        self._shuffle, self._drop_last = shuffle, drop_last
        self._fault_limit = max(10, int(max_bad_fraction * engine.count))
        key_of(seed)  # refuses a seed out of range now, and not at the first batch
        self._epoch, self._batches_done = 0, 0
        # Which iteration moves the cursor: the last one begun, unless the cursor was set since.
        self._iteration = 0
        self._uploads: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        side, views = recipe.crop_px, recipe.num_views
        self._bytes = Lender((batch_size, views, side, side, 3), torch.uint8, pinned=device.type == "cuda")
        self._floats = Lender((views, batch_size, side, side, 3), torch.float32)
        self._scratch = threading.local()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the set, empty where it has none."""
        return self.engine.classes

    def __len__(self) -> int:
        """Batches of one epoch on this rank."""
        step = self.batch_size * self._world_size
        return self.engine.count // step if self._drop_last else -(-self.engine.count // step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate next; the cursor of a resumed epoch is kept, any other starts anew.

        Raises:
            ValueError: if there is no such epoch.
        """
        if not 0 <= epoch < NUM_EPOCHS:
            raise ValueError(f"epoch is {epoch}; it must lie in [0, {NUM_EPOCHS})")
        if epoch != self._epoch:
            self._epoch, self._batches_done = epoch, 0
            self._iteration += 1

    def state_dict(self) -> dict[str, Any]:
        """The cursor: what has been handed out, not what has been prefetched."""
        return {
            "version": _STATE_VERSION,
            "set": self.engine.fingerprint,
            "count": self.engine.count,
            "seed": self.seed,
            "shuffle": self._shuffle,
            "global_batch": self.batch_size * self._world_size,
            "epoch": self._epoch,
            "batches_done": self._batches_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: if it belongs to another set, seed, order or global batch size, was taken by another
                version of the loader, or points outside the epoch.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"the loader's state is of version {state.get('version')}, ours of {_STATE_VERSION}: "
                "orders and views have changed in between; start a new run"
            )
        for name, mine in self.state_dict().items():
            if name not in ("epoch", "batches_done") and state.get(name) != mine:
                raise ValueError(
                    f"the loader's state was taken with {name} {state.get(name)}, this run has {mine}; "
                    "resume with the same set, seed, order and global batch size"
                )
        epoch, done = int(state["epoch"]), int(state["batches_done"])
        if not (0 <= epoch < NUM_EPOCHS and 0 <= done <= len(self)):
            raise ValueError(f"the loader's state has done {done} of {len(self)} batches of epoch {epoch}")
        self._epoch, self._batches_done = epoch, done
        self._iteration += 1

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch, from the cursor on; at its end the cursor is back at the start.

        Raises:
            RuntimeError: if another iteration has been begun, or another epoch chosen, since the last batch.
        """
        epoch, on_host = self._epoch, self.device.type == "cpu"
        for pixels, made in self._batches(augmented=on_host):
            batch = self._on_host(epoch, pixels, made) if on_host else self._on_device(epoch, pixels, made)
            self._batches_done += 1
            del pixels  # what is held here while we wait cannot be lent again
            yield batch
            del batch

    def crops(self) -> Iterator[Crops]:
        """Like iterating, but only the crops: no photometric stage, no mixtures, nothing on a device.

        On machines with a GPU the memory is pinned; hold a batch until a copy of it is over.
        """
        for pixels, made in self._batches(augmented=False):
            index, label = torch.from_numpy(made.index_N), torch.from_numpy(made.label_N)
            crops = Crops(pixels[: len(index)], index, label)
            self._batches_done += 1
            del pixels
            yield crops
            del crops

    def boxes(self, epoch: int, index_N: NDArray[np.int64]) -> NDArray[np.int32]:
        """(N, V, 5) crop boxes of the pictures asked for; see :mod:`pipelines.crops`."""
        return draw_boxes(self.recipe, self.seed, epoch, index_N, self.engine.fetch(index_N).size_N2)

    def _on_host(self, epoch: int, pixels_VNSS3: Tensor, made: _Slice) -> Batch:
        """Finished views, and their mixtures."""
        index, label = torch.from_numpy(made.index_N), torch.from_numpy(made.label_N)
        views = [view.permute(0, 3, 1, 2) for view in pixels_VNSS3[:, : len(index)]]
        return self._mixed(epoch, views, index, label)

    def _on_device(self, epoch: int, pixels_NVSS3: Tensor, made: _Slice) -> Batch:
        """Upload crops, augment, normalise and mix on the training device."""
        index = torch.from_numpy(made.index_N).pin_memory()
        label = torch.from_numpy(made.label_N).pin_memory()
        params_VNP = torch.from_numpy(made.params_VNP).pin_memory().to(self.device, non_blocking=True)
        crops_V = pixels_NVSS3[: len(index)].to(self.device, non_blocking=True).unbind(1)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._hold(event, pixels_NVSS3)
        views = [augment(crops, p, self.recipe) for crops, p in zip(crops_V, params_VNP, strict=True)]
        return self._mixed(epoch, views, index, label)

    def _hold(self, event: "torch.cuda.Event", pixels: Tensor) -> None:
        """Keep host memory from being lent anew before the copy out of it is over; wait if many are not."""
        self._uploads.append((event, pixels))
        while self._uploads and (len(self._uploads) > _AHEAD or self._uploads[0][0].query()):
            self._uploads.popleft()[0].synchronize()

    def _mixed(self, epoch: int, views: list[Tensor], index: Tensor, label: Tensor) -> Batch:
        key = views[1] if len(views) > 1 else views[0][:0]
        mixtures = mix(self.recipe, self.seed, epoch, index, views[0])
        index, label = (column.to(self.device, non_blocking=True) for column in (index, label))
        return Batch(views[0], key, mixtures, index, label)

    def _batches(self, *, augmented: bool) -> Iterator[tuple[Tensor, _Slice]]:
        """Pixels of the rest of the epoch's batches and what belongs to them; the caller moves the cursor."""
        epoch, number = self._epoch, self._batches_done
        self._iteration += 1
        mine = self._iteration
        ahead: deque[_Started] = deque()
        with ExitStack() as stack:
            workers = _pool("view-loader", self._num_threads, stack)
            readers = None
            if self.engine.reads_ahead:
                readers = _pool("view-reader", _READERS_PER_THREAD * self._num_threads, stack)
            while True:
                while number < len(self) and len(ahead) < _AHEAD:
                    ahead.append(self._start(epoch, number, augmented, workers, readers))
                    number += 1
                if not ahead:
                    break
                started = ahead.popleft()
                parts = [part.result() for part in started.slices]
                made = _Slice(
                    np.concatenate([part.index_N for part in parts]),
                    np.concatenate([part.label_N for part in parts]),
                    np.concatenate([part.params_VNP for part in parts], axis=1),
                )
                self._note_faults(started.wanted_N, made.index_N)
                yield started.pixels, made
                del started, parts, made
                if self._iteration != mine:
                    raise RuntimeError(
                        f"epoch {epoch} was being iterated when another iteration was begun or the cursor "
                        f"was set (it is in epoch {self._epoch} now); finish one before the next"
                    )
        self._batches_done = 0

    def _start(
        self,
        epoch: int,
        number: int,
        augmented: bool,
        workers: ThreadPoolExecutor,
        readers: ThreadPoolExecutor | None,
    ) -> _Started:
        """Give a batch's slices to the workers, and to the readers before them where there are any."""
        first = (number * self._world_size + self._rank) * self.batch_size
        wanted_N = self._order(epoch, slice(first, first + self.batch_size))
        pixels = (self._floats if augmented else self._bytes).take()
        size = max(_LEAST_SLICE, -(-self.batch_size // (2 * self._num_threads)))
        slices = []
        for start in range(0, len(wanted_N), size):
            index_N = wanted_N[start : start + size]
            fetched = readers.submit(self.engine.fetch, index_N) if readers else None
            slices.append(workers.submit(self._make, epoch, index_N, fetched, pixels, start, augmented))
        return _Started(wanted_N, pixels, slices)

    def _order(self, epoch: int, places: slice) -> NDArray[np.int64]:
        count = self.engine.count
        if self._shuffle:
            return EpochOrder(self.seed, epoch, count)[places]
        return np.arange(*places.indices(count), dtype=np.int64)

    def _make(
        self,
        epoch: int,
        wanted_N: NDArray[np.int64],
        fetched: "Future[Any] | None",
        pixels: Tensor,
        start: int,
        augmented: bool,
    ) -> _Slice:
        """A worker's task: crops of one slice, written to its place in the batch; or finished views."""
        if augmented:
            views_NVSS3 = self._scratch_views(len(wanted_N))
        else:
            views_NVSS3 = pixels[start : start + len(wanted_N)].numpy()
        found = fetched.result() if fetched else self.engine.fetch(wanted_N)
        index_N = self._crop(epoch, wanted_N, found, views_NVSS3)
        params_VNP = draw_parameters(self.recipe, self.seed, epoch, index_N)
        if augmented:
            augment_on_cpu(views_NVSS3, params_VNP, self.recipe, pixels.numpy(), start)
        return _Slice(index_N, self.engine.labels(index_N), params_VNP)

    def _scratch_views(self, num: int) -> NDArray[np.uint8]:
        """This worker's own memory for the crops of a slice."""
        recipe, views = self.recipe, getattr(self._scratch, "views", None)
        if views is None or len(views) < num:
            shape = (num, recipe.num_views, recipe.crop_px, recipe.crop_px, 3)
            views = self._scratch.views = np.empty(shape, np.uint8)
        part: NDArray[np.uint8] = views[:num]
        return part

    def _crop(
        self, epoch: int, wanted_N: NDArray[np.int64], fetched: Any, views_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.int64]:
        """Crop a slice; an undecodable picture gives way to the next sound one. Returns the ones used."""
        recipe, seed = self.recipe, self.seed
        index_N = wanted_N.copy()
        ok_N = self.engine.crop(
            fetched, draw_boxes(recipe, seed, epoch, index_N, fetched.size_N2), views_NVSS3
        )
        tries = 0
        while len(bad_B := np.flatnonzero(~ok_N)):
            if tries == MAX_TRIES:
                name = self.engine.picture_name(int(wanted_N[bad_B[0]]))
                raise BadPicturesError(
                    f"{MAX_TRIES} pictures in a row from {name} on cannot be decoded; {_VERIFY_HINT}"
                )
            tries += 1
            index_N[bad_B] = (index_N[bad_B] + 1) % self.engine.count
            next_ones = self.engine.fetch(index_N[bad_B])
            boxes_BV5 = draw_boxes(recipe, seed, epoch, index_N[bad_B], next_ones.size_N2)
            stand_in_BVSS3 = np.empty_like(views_NVSS3[bad_B])
            ok_N[bad_B] = self.engine.crop(next_ones, boxes_BV5, stand_in_BVSS3)
            views_NVSS3[bad_B] = stand_in_BVSS3
        return index_N

    def _note_faults(self, wanted_N: NDArray[np.int64], used_N: NDArray[np.int64]) -> None:
        for n in np.flatnonzero(wanted_N != used_N):
            index, used = int(wanted_N[n]), int(used_N[n])
            if index in self.faults:
                continue
            # Finding a name costs a walk through the list of names.
            named = len(self.faults) < _MOST_NAMED
            name = self.engine.picture_name(index) if named else "not looked up"
            fault = self.faults[index] = Fault(index, name, used)
            log.warning(
                "picture %d (%s) cannot be decoded; picture %d takes its place", *vars(fault).values()
            )
        if len(self.faults) > self._fault_limit:
            raise BadPicturesError(
                f"{len(self.faults)} pictures cannot be decoded, the limit is {self._fault_limit} of "
                f"{self.engine.count}; one is {next(iter(self.faults.values())).name}; {_VERIFY_HINT}"
            )


def _pool(name: str, num_threads: int, stack: ExitStack) -> ThreadPoolExecutor:
    """Threads that end with the stack, after what each is doing and before what still waits."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool
