"""The loader: order of the images, share of each rank, cursor, bad images and mixtures, for every decoder.

A batch is made in two steps. Worker threads (:mod:`pipelines.workers`) decode, crop and, on a CPU, augment a
few batches ahead. The thread that iterates over the loader uploads a finished batch to the training device,
augments it there if that is a GPU, and draws and blends its mixtures.

Shape letters: N batch, V views, S side in pixels, P parameters.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.batch import Batch, tensors_of
from pipelines.augment.draws import draw_boxes
from pipelines.augment.mixing import blend, draw_mixtures
from pipelines.augment.photometric import augment
from pipelines.decode import Decoder, DeviceDecoder
from pipelines.device import RunAheadLimit, keep_freed_memory, prefetch, upload
from pipelines.randomness import NUM_EPOCHS, Draw, EpochOrder
from pipelines.recipe import Recipe
from pipelines.sets import PictureSet
from pipelines.sets.stream import BUFFER, ShardStream
from pipelines.workers import BatchRequest, LoaderConfig, MadeBatch, PendingBatch, Workers

_AHEAD = 4
"""Batches that are requested from the workers at a time, including the one that is returned next."""
_ASYNC_DEVICES = {"cuda"}
"""Device types for which batches are prepared one ahead of their use."""
_STATE_VERSION = 3


@dataclass(frozen=True)
class Crops:
    """A batch of crops, before the photometric stage."""

    views: Tensor
    """(N, V, S, S, 3) uint8."""
    index: Tensor
    """(N,) int64, position in the set."""
    label: Tensor
    """(N,) int64, −1 where the set has no labels."""


class ViewLoader:
    """An iterable of :class:`Batch`. Use :func:`pipelines.build_loader` to make one.

    Every view is a function of (seed, epoch, index, view). It does not depend on threads, batch size, world
    size or on where a run was resumed. An image that cannot be decoded is replaced by the next image of the
    set or subset that can; it is listed in ``faults`` and logged by name. If more than 1 % of the images (and
    more than ten) are bad, the run stops with :class:`pipelines.workers.BadImagesError`.
    """

    def __init__(
        self,
        picture_set: PictureSet,
        decoder: Decoder,
        recipe: Recipe,
        config: LoaderConfig,
        *,
        stream: ShardStream | None = None,
        chosen: str = "",
    ) -> None:
        """Start at the first batch of epoch 0.

        Args:
            picture_set: the images.
            decoder: decodes and crops the images; a :class:`pipelines.decode.DeviceDecoder` leaves the crops
            on the device.
            recipe: what views and mixtures look like.
            config: how batches are made. It is not checked here; :func:`pipelines.build_loader` does that.
            stream: reads the images in its own order, which replaces the loader's.
            chosen: a line that says which backend was chosen, and why.
        """
        self.set, self.decoder, self.recipe, self.chosen = picture_set, decoder, recipe, chosen
        self.config, self._stream = config, stream
        self.count = picture_set.count if config.subset is None else len(config.subset)
        """Images of an epoch, on all ranks together."""
        self._epoch, self._batches_done, self._stream_state = 0, 0, ""
        self._iteration = 0
        """Counts started iterations and changes of the cursor, to detect an iteration that is out of date."""
        self._waited_s = 0.0
        self._on_host = config.device.type == "cpu" and not isinstance(decoder, DeviceDecoder)
        if self._on_host:
            keep_freed_memory()
        self._augment, self._blend = augment, blend
        if config.compiled and config.device.type == "cuda":
            # No fullgraph: after torch's limit of recompilations, torch runs the stage without compiling it.
            self._augment = torch.compile(augment, dynamic=False)
            # torch.compile cannot trace the random generator that fills erased cells with noise.
            if recipe.mixing.erase_fill != "noise":
                self._blend = torch.compile(blend, dynamic=False)
        self._run_ahead = RunAheadLimit(config.device, limit=_AHEAD)
        self._workers = Workers(picture_set, decoder, recipe, config)
        self.faults = self._workers.faults

    def __len__(self) -> int:
        """Batches of one epoch on this rank."""
        step = self.config.batch_size * self.config.share.world_size
        return self.count // step if self.config.drop_last else -(-self.count // step)

    # ------------------------------------------------------------------------------------------- cursor

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate next. The current epoch keeps its cursor, any other starts at batch 0.

        Raises:
            ValueError: if the epoch is out of range.
        """
        if not 0 <= epoch < NUM_EPOCHS:
            raise ValueError(f"epoch is {epoch}; it must lie in [0, {NUM_EPOCHS})")
        if epoch != self._epoch:
            self._epoch, self._batches_done, self._stream_state = epoch, 0, ""
            self._iteration += 1

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and what it depends on. It counts returned batches, not prefetched ones."""
        config, subset = self.config, ""
        if config.subset is not None:
            subset = f" {hashlib.sha256(config.subset.tobytes()).hexdigest()}"
        # With a stream, the contents of batches depend on the number of ranks and on the buffer.
        stream = f"{config.share.world_size} ranks, buffer {BUFFER}" if self._stream else "none"
        return {
            "version": _STATE_VERSION,
            "set": self.set.fingerprint + subset,
            "count": self.count,
            "backend": self.decoder.name,
            "seed": config.seed,
            "shuffle": config.shuffle,
            "global_batch": config.batch_size * config.share.world_size,
            "stream": stream,
            "epoch": self._epoch,
            "batches_done": self._batches_done,
            "stream_state": self._stream_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that was returned before ``state`` was taken.

        Raises:
            ValueError: if the state belongs to another set, backend, seed, order, reading or global batch
                size, or to another version of the loader, or if it points outside the epoch.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"the loader's state has version {state.get('version')}, this loader has {_STATE_VERSION}: "
                "orders and views differ between versions; start a new run"
            )
        for name, own in self.state_dict().items():
            if name not in ("epoch", "batches_done", "stream_state") and state.get(name) != own:
                raise ValueError(
                    f"the loader's state was taken with {name} {state.get(name)}, this run has {own}; "
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

    def _begin(self) -> Callable[[], None]:
        """Start an iteration. Returns a function that raises if another one was started since."""
        self._iteration += 1
        own, epoch = self._iteration, self._epoch

        def check_current() -> None:
            if self._iteration != own:
                raise RuntimeError(
                    f"epoch {epoch} was being iterated when another iteration was started or the cursor was "
                    f"set (it is in epoch {self._epoch} now); finish one before the next"
                )

        return check_current

    def _advance(self, made: MadeBatch) -> None:
        """Move the cursor past a batch that is returned."""
        self._batches_done += 1
        self._stream_state = made.request.stream_state

    def _rewind(self) -> None:
        """Move the cursor back to the start of the epoch."""
        self._batches_done, self._stream_state = 0, ""

    # ---------------------------------------------------------------------------------------- iteration

    def __iter__(self) -> Iterator[Batch]:
        """Iterate from the cursor to the end of the epoch, then move the cursor back to the start.

        Raises:
            RuntimeError: if another iteration was started, or another epoch chosen, since the last batch.
        """
        check_current = self._begin()
        finished = self._finished()
        if self.config.device.type in _ASYNC_DEVICES:
            finished = prefetch(finished, lambda pair: tensors_of(pair[0]), self.config.device)
        with closing(finished):
            for batch, made in finished:
                self._advance(made)
                yield batch
                check_current()
        self._rewind()

    def crops(self) -> Iterator[Crops]:
        """Iterate over the crops alone: like ``__iter__``, but without photometric stage and mixtures.

        Crops stay where the decoder writes them. If the training device is a GPU, crops on the host are in
        pinned memory.
        """
        check_current = self._begin()
        with closing(self._batches(augmented=False)) as batches:
            for made in batches:
                index, label = torch.from_numpy(made.index_N), torch.from_numpy(made.label_N)
                self._advance(made)
                yield Crops(made.pixels[: len(index)], index, label)
                if made.pixels.is_cuda:
                    self._run_ahead.mark()
                check_current()
        self._rewind()

    def boxes(self, epoch: int, index_N: NDArray[np.int64]) -> NDArray[np.int32]:
        """(N, V, 5) crop boxes of images; see :mod:`pipelines.augment.draws`."""
        size_N2 = self.set.fetch(index_N).size_N2
        return draw_boxes(self.recipe, Draw(self.config.seed, epoch, index_N), size_N2)

    def take_waited_s(self) -> float:
        """Seconds that the iterating thread has waited for workers since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def _finished(self) -> Generator[tuple[Batch, MadeBatch], None, None]:
        """Complete batches, each with the workers' part of it."""
        finish = self._finish_on_host if self._on_host else self._finish_on_device
        with closing(self._batches(augmented=self._on_host)) as batches:
            for made in batches:
                yield finish(made), made

    def _finish_on_host(self, made: MadeBatch) -> Batch:
        """Mix the views, which the workers have augmented already."""
        pixels_VNSS3 = made.pixels[:, : len(made.index_N)]
        views = [view_NSS3.permute(0, 3, 1, 2).to(self.config.dtype) for view_NSS3 in pixels_VNSS3]
        return self._mix(views, made)

    def _finish_on_device(self, made: MadeBatch) -> Batch:
        """Upload crops that are on the host; augment, normalise and mix on the training device."""
        device = self.config.device
        params_VNP = upload(torch.from_numpy(made.params_VNP), device)
        crops_NVSS3 = made.pixels[: len(made.index_N)].to(device, non_blocking=True)
        views = [
            self._augment(crops_NSS3, params_NP, self.recipe, self.config.dtype)
            for crops_NSS3, params_NP in zip(crops_NVSS3.unbind(1), params_VNP, strict=True)
        ]
        if device.type == "cuda":
            self._run_ahead.mark()
        return self._mix(views, made)

    def _mix(self, views: list[Tensor], made: MadeBatch) -> Batch:
        """Draw the mixtures on the host and blend them on the training device."""
        index, label = torch.from_numpy(made.index_N), torch.from_numpy(made.label_N)
        draws = draw_mixtures(self.recipe, Draw(self.config.seed, made.request.epoch, made.index_N))
        if self.config.device.type != "cpu":
            send = partial(upload, device=self.config.device)
            index, label, draws = send(index), send(label), tuple(draw.to(send) for draw in draws)
        key = views[1] if len(views) > 1 else views[0][:0]
        # In a symmetric loss, key views are mixed with the same masks and partners as query views.
        mixed = views if self.recipe.mixing.symmetric else views[:1]
        mixtures = [tuple(self._blend(view, draw) for draw in draws) for view in mixed]
        return Batch(views[0], key, mixtures[0], index, label, *mixtures[1:])

    def _batches(self, *, augmented: bool) -> Generator[MadeBatch, None, None]:
        """The workers' part of each batch from the cursor on; the caller moves the cursor."""
        pending: deque[PendingBatch] = deque()
        with (
            closing(self._requests(augmented=augmented)) as requests,
            self._workers.running(streamed=self._stream is not None) as submit,
        ):
            while True:
                pending.extend(map(submit, islice(requests, _AHEAD - len(pending))))
                if not pending:
                    break
                started_s = time.perf_counter()
                made = pending.popleft().result()
                self._waited_s += time.perf_counter() - started_s
                self._workers.record_faults(made, self.count)
                yield made

    def _requests(self, *, augmented: bool) -> Generator[BatchRequest, None, None]:
        """The batches of this rank from the cursor to the end of the epoch."""
        epoch, first = self._epoch, self._batches_done
        if self._stream is not None:
            streamed = self._stream.batches(epoch, self._stream_state)
            for encoded, state in islice(streamed, len(self) - first):
                yield BatchRequest(epoch, encoded.index_N, augmented, encoded, state)
            return
        size, share = self.config.batch_size, self.config.share
        for number in range(first, len(self)):
            start = (number * share.world_size + share.rank) * size
            yield BatchRequest(epoch, self._order(epoch, slice(start, start + size)), augmented)

    def _order(self, epoch: int, places: slice) -> NDArray[np.int64]:
        """(n,) positions in the set of the images that the epoch visits at ``places``."""
        if self.config.shuffle:
            order_N = EpochOrder(self.config.seed, epoch, self.count)[places]
        else:
            order_N = np.arange(*places.indices(self.count), dtype=np.int64)
        return order_N if self.config.subset is None else self.config.subset[order_N]
