"""The loader: order, sharding, cursor, crops and mixtures for every backend alike.

A thread asks the engine for uint8 crops a few batches ahead; photometric stage and mixing run on the training
device when the batch is handed over. Shape letters: N batch, V views, S side in pixels.
"""

import atexit
import functools
import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch
from pipelines.crops import draw_boxes
from pipelines.engines import MAX_TRIES, BadPicturesError, Engine, Fault
from pipelines.mixing import mix
from pipelines.photometric import augment, draw_parameters
from pipelines.photometric_cpu import augment_on_cpu
from pipelines.randomness import epoch_order
from pipelines.recipe import Recipe

log = logging.getLogger(__name__)

_PREFETCHED = 3
_STATE_VERSION = 1
_VERIFY_HINT = "verify the set with `python -m dataset_tools verify`"


@dataclass
class _Crops:
    """One batch on the host, between the engine and the device."""

    views_NVSS3: Tensor
    index_N: Tensor
    label_N: Tensor
    params_VNP: Tensor


@dataclass
class _Buffer:
    """Host memory for the crops of one batch, and the upload that must be over before it is written again."""

    views: Tensor
    uploaded: "torch.cuda.Event | None" = None

    def ready(self) -> Tensor:
        if self.uploaded is not None:
            self.uploaded.synchronize()
        return self.views


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
        self._epoch, self._batches_done = 0, 0

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the set, empty where it has none."""
        return self.engine.classes

    def __len__(self) -> int:
        """Batches of one epoch on this rank."""
        step = self.batch_size * self._world_size
        return self.engine.count // step if self._drop_last else -(-self.engine.count // step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate next; the cursor of a resumed epoch is kept, any other starts anew."""
        if epoch != self._epoch:
            self._epoch, self._batches_done = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """The cursor: what has been handed out, not what has been prefetched."""
        return {
            "version": _STATE_VERSION,
            "seed": self.seed,
            "count": self.engine.count,
            "global_batch": self.batch_size * self._world_size,
            "epoch": self._epoch,
            "batches_done": self._batches_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: if it belongs to another set, seed or global batch size.
        """
        for name, mine in self.state_dict().items():
            if name not in ("epoch", "batches_done") and state.get(name) != mine:
                raise ValueError(
                    f"the loader's state was taken with {name} {state.get(name)}, this run has {mine}; "
                    "resume with the same set, seed and global batch size"
                )
        self._epoch, self._batches_done = int(state["epoch"]), int(state["batches_done"])

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch, from the cursor on; at its end the cursor is back at the start."""
        epoch, first = self._epoch, self._batches_done
        ahead: queue.Queue[_Crops | BaseException | None] = queue.Queue(_PREFETCHED)
        free: queue.Queue[_Buffer | None] = queue.Queue()
        for _ in range(_PREFETCHED + 1):
            free.put(_Buffer(self._empty_views()))
        stop = threading.Event()
        worker = threading.Thread(
            target=self._work, args=(epoch, first, ahead, free, stop), name="view-loader", daemon=True
        )
        # A thread inside compiled code at the interpreter's end would abort the process.
        finish = functools.partial(_finish_thread, worker, stop, free)
        atexit.register(finish)
        worker.start()
        try:
            while (crops := ahead.get()) is not None:
                if isinstance(crops, BaseException):
                    raise crops
                batch, uploaded = self._finish(crops, epoch)
                free.put(_Buffer(crops.views_NVSS3, uploaded))
                self._batches_done += 1
                yield batch
            self._batches_done = 0
        finally:
            finish()
            atexit.unregister(finish)

    def _empty_views(self) -> Tensor:
        recipe = self.recipe
        shape = (self.batch_size, recipe.num_views, recipe.crop_px, recipe.crop_px, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _work(
        self,
        epoch: int,
        first: int,
        ahead: "queue.Queue[_Crops | BaseException | None]",
        free: "queue.Queue[_Buffer | None]",
        stop: threading.Event,
    ) -> None:
        """The prefetching thread: crops of the epoch's batches, in order, until told to stop."""
        last: _Crops | BaseException | None = None
        try:
            order = self._order(epoch)
            for number in range(first, len(self)):
                start = (number * self._world_size + self._rank) * self.batch_size
                index_N = order[start : start + self.batch_size]
                buffer = free.get()
                if buffer is None or not _put(ahead, self._crop(epoch, index_N, buffer.ready()), stop):
                    return
        except BaseException as error:  # handed to the thread that iterates, which raises it
            last = error
        _put(ahead, last, stop)

    def _order(self, epoch: int) -> Tensor:
        count = self.engine.count
        return epoch_order(self.seed, epoch, count) if self._shuffle else torch.arange(count)

    def _crop(self, epoch: int, wanted_N: Tensor, buffer: Tensor) -> _Crops:
        """Crops of one batch; undecodable pictures are replaced by the next sound one of the set."""
        index_N = wanted_N.numpy().copy()
        views = buffer[: len(index_N)]
        views_NVSS3 = views.numpy()
        ok_N = self.engine.crop(index_N, self.boxes(epoch, index_N), views_NVSS3)
        tries = 0
        while len(bad_B := np.flatnonzero(~ok_N)):
            if tries == MAX_TRIES:
                name = self.engine.picture_name(int(wanted_N[bad_B[0]]))
                raise BadPicturesError(
                    f"{MAX_TRIES} pictures in a row from {name} on cannot be decoded; {_VERIFY_HINT}"
                )
            tries += 1
            index_N[bad_B] = (index_N[bad_B] + 1) % self.engine.count
            stand_in_BVSS3 = np.empty_like(views_NVSS3[bad_B])
            ok_N[bad_B] = self.engine.crop(index_N[bad_B], self.boxes(epoch, index_N[bad_B]), stand_in_BVSS3)
            views_NVSS3[bad_B] = stand_in_BVSS3
        self._note_faults(wanted_N.numpy(), index_N)
        used_N = self._pinned(torch.from_numpy(index_N))
        params_VNP = torch.stack(
            [draw_parameters(self.recipe, self.seed, epoch, used_N, v) for v in range(self.recipe.num_views)]
        )
        label_N = torch.from_numpy(self.engine.labels(index_N))
        return _Crops(views, used_N, self._pinned(label_N), self._pinned(params_VNP))

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def boxes(self, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """(N, V, 4) crop boxes (top, left, height, width) of the pictures asked for, in pixels."""
        sizes = torch.from_numpy(self.engine.sizes(rows))
        drawn = draw_boxes(self.recipe, self.seed, epoch, torch.from_numpy(rows), sizes[:, 0], sizes[:, 1])
        boxes_NV4: NDArray[np.int32] = drawn.numpy()
        return boxes_NV4

    def _note_faults(self, wanted_N: Any, used_N: Any) -> None:
        for n in np.flatnonzero(wanted_N != used_N):
            index, used = int(wanted_N[n]), int(used_N[n])
            if index in self.faults:
                continue
            fault = self.faults[index] = Fault(index, self.engine.picture_name(index), used)
            log.warning(
                "picture %d (%s) cannot be decoded; picture %d takes its place", *vars(fault).values()
            )
        if len(self.faults) > self._fault_limit:
            raise BadPicturesError(
                f"{len(self.faults)} pictures cannot be decoded, the limit is {self._fault_limit} of "
                f"{self.engine.count}; one is {self.engine.picture_name(max(self.faults))}; {_VERIFY_HINT}"
            )

    def _finish(self, crops: _Crops, epoch: int) -> "tuple[Batch, torch.cuda.Event | None]":
        """Upload, augment, normalise and mix on the training device; tell when the upload is over."""
        views = crops.views_NVSS3.to(self.device, non_blocking=True)
        params_VNP = crops.params_VNP.to(self.device, non_blocking=True)
        uploaded = None
        if self.device.type == "cuda":
            uploaded = torch.cuda.Event()
            uploaded.record(torch.cuda.current_stream(self.device))
        if self.device.type == "cpu":
            finished = augment_on_cpu(views, params_VNP, self.recipe, self._num_threads)
        else:
            finished = [
                augment(view, params, self.recipe)
                for view, params in zip(views.unbind(1), params_VNP, strict=True)
            ]
        query = finished[0]
        key = finished[1] if len(finished) > 1 else query[:0]
        mixtures = mix(self.recipe, self.seed, epoch, crops.index_N, query)
        index, label = (t.to(self.device, non_blocking=True) for t in (crops.index_N, crops.label_N))
        return Batch(query, key, mixtures, index, label), uploaded


def _finish_thread(
    worker: threading.Thread, stop: threading.Event, free: "queue.Queue[_Buffer | None]"
) -> None:
    stop.set()
    free.put(None)
    worker.join()


def _put(ahead: "queue.Queue[Any]", item: Any, stop: threading.Event) -> bool:
    """Put, but give up when the reader has gone."""
    while not stop.is_set():
        try:
            ahead.put(item, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False
