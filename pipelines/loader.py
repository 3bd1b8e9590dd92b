"""The loader: order, sharding, cursor, faults and mixtures for every backend alike.

Batches are made by :mod:`pipelines.workers`, a few ahead of the one that is handed out; what is left for the
thread that iterates is to put slices together, upload and mix.

Shape letters: N batch, V views, S side in pixels, P parameters.
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment.draws import draw_boxes
from pipelines.augment.mixing import blend, draw_mixtures
from pipelines.augment.photometric import augment
from pipelines.batch import Batch, tensors_of
from pipelines.decode.decoder import BadPicturesError, DeviceEngine, Engine, Fault
from pipelines.device import Uploads, one_ahead
from pipelines.randomness import NUM_EPOCHS, Draw, EpochOrder, key_of
from pipelines.recipe import Recipe
from pipelines.sets.manifest import verify_hint
from pipelines.sets.stream import BUFFER, ShardStream
from pipelines.workers import Asked, Made, Started, Workers

log = logging.getLogger(__name__)

_AHEAD = 4
"""Batches under way or ready, the one handed out next among them."""
_RUN_BESIDE_THE_HOST = {"cuda"}
"""Devices whose batches are made ready one ahead."""
_MOST_NAMED = 1000
"""Faults whose pictures are named; of more only the index is told."""
_STATE_VERSION = 3


@dataclass(frozen=True)
class Crops:
    """A batch before its photometric stage."""

    views: Tensor
    """(N, V, S, S, 3) uint8, on the host."""
    index: Tensor
    """(N,) int64, position in the set."""
    label: Tensor
    """(N,) int64, −1 where the set has no labels."""


class ViewLoader:
    """Iterable of :class:`Batch`; made by :func:`pipelines.build_loader`.

    Every view is a function of (seed, epoch, index, view): threads, batch size, world size and resuming
    change nothing about it. A picture that cannot be decoded is replaced by the next one that can, of the set
    or the ``subset``, listed in ``faults`` and logged by name; when more than ``max_bad_fraction`` of them
    (and more than ten) are bad, the run stops with :class:`BadPicturesError`. With a ``stream`` it decides
    which pictures come when; with a ``device_engine`` (the engine itself, or None) crops are made on the
    device. Views are of the ``dtype`` given. On a GPU torch.compile fuses the photometric stage and the
    mixing, unless ``compiled`` is False. ``chosen`` says in words which backend this is, and why.
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
        subset: NDArray[np.int64] | None = None,
        max_bad_fraction: float = 0.01,
        stream: ShardStream | None = None,
        device_engine: DeviceEngine | None = None,
        dtype: torch.dtype = torch.float32,
        compiled: bool = True,
        chosen: str = "",
    ) -> None:
        if not batch_size >= 1:
            raise ValueError(f"batch size is {batch_size}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must lie in [0, {world_size})")
        if subset is not None and not (len(subset) and subset.min() >= 0 and subset.max() < engine.count):
            raise ValueError(
                f"a subset of {len(subset)} pictures is empty or leaves the set's {engine.count}"
            )
        subset = None if subset is None else np.unique(subset)
        self.count = engine.count if subset is None else len(subset)
        """Pictures of an epoch, on all ranks together."""
        if drop_last and batch_size * world_size > self.count:
            raise ValueError(
                f"a batch of {batch_size} on {world_size} rank(s) is larger than the set of {self.count} "
                f"pictures; choose a batch size of at most {self.count // world_size}"
            )
        if not drop_last and (world_size > 1 or recipe.mixing.method != "moco"):
            raise ValueError(
                "drop_last=False leaves a smaller last batch, which several ranks cannot share and mixing "
                "may find too small; use it with one rank and without mixing"
            )
        if not drop_last and stream is not None:
            raise ValueError("drop_last=False leaves a smaller last batch, which a stream does not have")
        self.engine, self.recipe = engine, recipe
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.faults: dict[int, Fault] = {}
        self.chosen = chosen
        self._rank, self._world_size = rank, world_size
        self._shuffle, self._drop_last, self._subset = shuffle, drop_last, subset
        self._stream, self._device_engine = stream, device_engine
        self._fault_limit = max(10, int(max_bad_fraction * self.count))
        key_of(seed)  # refuses a seed out of range now, and not at the first batch
        self._epoch, self._batches_done, self._stream_state = 0, 0, ""
        # Which iteration moves the cursor: the last one begun, unless the cursor was set since.
        self._iteration = 0
        self._waited_s = 0.0
        self._dtype, self._augment, self._blend = dtype, augment, blend
        if compiled and device.type == "cuda":
            # Not fullgraph: past torch's limit of variants in one process, a loader more is merely not fused.
            self._augment = torch.compile(augment, dynamic=False)
            # torch.compile cannot take the generator of the noise that may fill erased cells.
            if recipe.mixing.erase_fill != "noise":
                self._blend = torch.compile(blend, dynamic=False)
        self._uploads = Uploads(device, most=_AHEAD)
        self._workers = Workers(
            engine,
            recipe,
            batch_size=batch_size,
            seed=seed,
            device=device,
            num_threads=num_threads,
            subset=subset,
            device_engine=device_engine,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the set, empty where it has none."""
        return self.engine.classes

    def __len__(self) -> int:
        """Batches of one epoch on this rank."""
        step = self.batch_size * self._world_size
        return self.count // step if self._drop_last else -(-self.count // step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate next; the cursor of a resumed epoch is kept, any other starts anew.

        Raises:
            ValueError: if there is no such epoch.
        """
        if not 0 <= epoch < NUM_EPOCHS:
            raise ValueError(f"epoch is {epoch}; it must lie in [0, {NUM_EPOCHS})")
        if epoch != self._epoch:
            self._epoch, self._batches_done, self._stream_state = epoch, 0, ""
            self._iteration += 1

    def state_dict(self) -> dict[str, Any]:
        """The cursor: what has been handed out, not what has been prefetched."""
        subset = "" if self._subset is None else f" {hashlib.sha256(self._subset.tobytes()).hexdigest()}"
        return {
            "version": _STATE_VERSION,
            "set": self.engine.fingerprint + subset,
            "count": self.count,
            # Decoders differ in the last grey level.
            "backend": self.engine.name,
            "seed": self.seed,
            "shuffle": self._shuffle,
            "global_batch": self.batch_size * self._world_size,
            # A stream's batches depend on how many ranks share it, the loader's own order does not.
            "stream": f"{self._world_size} ranks, buffer {BUFFER}" if self._stream else "none",
            "epoch": self._epoch,
            "batches_done": self._batches_done,
            "stream_state": self._stream_state,
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
            if name not in ("epoch", "batches_done", "stream_state") and state.get(name) != mine:
                raise ValueError(
                    f"the loader's state was taken with {name} {state.get(name)}, this run has {mine}; "
                    "resume with the same set, backend, seed, order, reading and global batch size"
                )
        epoch, done = int(state["epoch"]), int(state["batches_done"])
        if not (0 <= epoch < NUM_EPOCHS and 0 <= done <= len(self)):
            raise ValueError(f"the loader's state has done {done} of {len(self)} batches of epoch {epoch}")
        stream_state = str(state.get("stream_state", ""))
        if self._stream is not None and done and not stream_state:
            raise ValueError(
                f"the loader's state has done {done} batches of a stream but lacks its checkpoint; start anew"
            )
        self._epoch, self._batches_done, self._stream_state = epoch, done, stream_state
        self._iteration += 1

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch, from the cursor on; at its end the cursor is back at the start.

        Raises:
            RuntimeError: if another iteration has been begun, or another epoch chosen, since the last batch.
        """
        refuse_another = self._begin()
        finished = self._finished()
        ahead = one_ahead(finished, lambda pair: tensors_of(pair[0]), self.device)
        for batch, made in ahead if self.device.type in _RUN_BESIDE_THE_HOST else finished:
            self._count(made)
            yield batch
            del batch
            refuse_another()
        self._rewind()

    def _finished(self) -> Generator[tuple[Batch, Made], None, None]:
        """Batches as they are handed out, and what belongs to them."""
        epoch, on_host = self._epoch, self.device.type == "cpu" and self._device_engine is None
        for pixels, made in self._batches(augmented=on_host):
            finish = self._on_host if on_host else self._on_device
            batch = finish(epoch, pixels, made)
            del pixels  # what is held here while we wait cannot be lent again
            yield batch, made
            del batch, made

    def crops(self) -> Iterator[Crops]:
        """Like iterating, but only the crops: no photometric stage, no mixtures, nothing on a device.

        On machines with a GPU the memory is pinned; hold a batch until a copy of it is over. An engine that
        leaves crops on the device leaves these there too.
        """
        refuse_another = self._begin()
        for pixels, made in self._batches(augmented=False):
            index, label = torch.from_numpy(made.index_N), torch.from_numpy(made.label_N)
            crops = Crops(pixels[: len(index)], index, label)
            self._count(made)
            used = pixels if pixels.is_cuda else None
            del pixels
            yield crops
            del crops
            if used is not None:
                self._uploads.hold(used)
            del used
            refuse_another()
        self._rewind()

    def take_waited_s(self) -> float:
        """Seconds for which batches were waited for since this was asked last: the workers were too slow."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def _begin(self) -> Callable[[], None]:
        """Begin an iteration, which alone may move the cursor; call what is returned to refuse any other."""
        self._iteration += 1
        mine, epoch = self._iteration, self._epoch

        def refuse_another() -> None:
            if self._iteration != mine:
                raise RuntimeError(
                    f"epoch {epoch} was being iterated when another iteration was begun or the cursor was "
                    f"set (it is in epoch {self._epoch} now); finish one before the next"
                )

        return refuse_another

    def _rewind(self) -> None:
        """An epoch is over: the cursor is back at its start."""
        self._batches_done, self._stream_state = 0, ""

    def _count(self, made: Made) -> None:
        """Move the cursor behind a batch that is handed out."""
        self._batches_done += 1
        self._stream_state = made.stream_state

    def boxes(self, epoch: int, index_N: NDArray[np.int64]) -> NDArray[np.int32]:
        """(N, V, 5) crop boxes of the pictures asked for; see :mod:`pipelines.augment.draws`."""
        return draw_boxes(self.recipe, Draw(self.seed, epoch, index_N), self.engine.fetch(index_N).size_N2)

    def _on_host(self, epoch: int, pixels_VNSS3: Tensor, made: Made) -> Batch:
        """Finished views, and their mixtures."""
        index, label = torch.from_numpy(made.index_N), torch.from_numpy(made.label_N)
        views = [view.permute(0, 3, 1, 2).to(self._dtype) for view in pixels_VNSS3[:, : len(index)]]
        return self._mixed(epoch, views, index, label)

    def _on_device(self, epoch: int, pixels_NVSS3: Tensor, made: Made) -> Batch:
        """Upload crops where they are on the host; augment, normalise and mix on the training device."""
        index, label = torch.from_numpy(made.index_N), torch.from_numpy(made.label_N)
        params_VNP = self._upload(torch.from_numpy(made.params_VNP))
        crops_V = pixels_NVSS3[: len(index)].to(self.device, non_blocking=True).unbind(1)
        views = [
            self._augment(crops, params_NP, self.recipe, self._dtype)
            for crops, params_NP in zip(crops_V, params_VNP, strict=True)
        ]
        if self.device.type == "cuda":
            self._uploads.hold(pixels_NVSS3)
        return self._mixed(epoch, views, index, label)

    def _mixed(self, epoch: int, views: list[Tensor], index: Tensor, label: Tensor) -> Batch:
        key = views[1] if len(views) > 1 else views[0][:0]
        on_host = draw_mixtures(self.recipe, Draw(self.seed, epoch, index.numpy()))
        drawn = [one.to(self._upload) for one in on_host]
        # Both directions of a symmetric loss take the same masks and partners.
        mixed = views if self.recipe.mixing.symmetric else views[:1]
        mixtures = [tuple(self._blend(view, one) for one in drawn) for view in mixed]
        return Batch(views[0], key, mixtures[0], self._upload(index), self._upload(label), *mixtures[1:])

    def _upload(self, tensor: Tensor) -> Tensor:
        """Copy a small tensor to the training device while the host goes on; a CPU has it already."""
        return self._uploads.pinned(tensor).to(self.device, non_blocking=True)

    def _batches(self, *, augmented: bool) -> Iterator[tuple[Tensor, Made]]:
        """Pixels of the rest of the epoch's batches and what belongs to them; the caller moves the cursor."""
        epoch = self._epoch
        ahead: deque[Started] = deque()
        with ExitStack() as stack:
            asked = stack.enter_context(closing(self._asked(epoch, self._batches_done)))
            start = self._workers.hired(stack, streamed=self._stream is not None)
            while True:
                for batch in islice(asked, _AHEAD - len(ahead)):
                    ahead.append(start(epoch, batch, augmented))
                if not ahead:
                    break
                started = ahead.popleft()
                asked_at = time.perf_counter()
                made = started.result()
                self._waited_s += time.perf_counter() - asked_at
                self._note_faults(started.asked.wanted_N, made.index_N)
                yield started.pixels, made
                del started, made

    def _asked(self, epoch: int, first: int) -> Generator[Asked, None, None]:
        """What the batches of this rank hold, from batch ``first`` of the epoch on."""
        if self._stream is not None:
            streamed = self._stream.batches(epoch, self._stream_state)
            for payloads, state in islice(streamed, len(self) - first):
                yield Asked(payloads.index_N, payloads, state)
            return
        for number in range(first, len(self)):
            start = (number * self._world_size + self._rank) * self.batch_size
            yield Asked(self._order(epoch, slice(start, start + self.batch_size)))

    def _order(self, epoch: int, places: slice) -> NDArray[np.int64]:
        if self._shuffle:
            order_N = EpochOrder(self.seed, epoch, self.count)[places]
        else:
            order_N = np.arange(*places.indices(self.count), dtype=np.int64)
        return order_N if self._subset is None else self._subset[order_N]

    def _note_faults(self, wanted_N: NDArray[np.int64], used_N: NDArray[np.int64]) -> None:
        for n in np.flatnonzero(wanted_N != used_N):
            index, used = int(wanted_N[n]), int(used_N[n])
            if index in self.faults:
                continue
            # Finding a name costs a walk through the list of names.
            named = len(self.faults) < _MOST_NAMED
            name = self.engine.picture_name(index) if named else "not looked up"
            fault = self.faults[index] = Fault(index, name, used)
            self._workers.stand_ins[index] = used
            log.warning(
                "picture %d (%s) cannot be decoded; picture %d takes its place", *vars(fault).values()
            )
        if len(self.faults) > self._fault_limit:
            raise BadPicturesError(
                f"{len(self.faults)} pictures cannot be decoded, the limit is {self._fault_limit} of "
                f"{self.count}; one is {next(iter(self.faults.values())).name}; {verify_hint()}"
            )
