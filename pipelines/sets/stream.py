"""DALI's own reader of shards: from end to end, shuffled within a buffer; for sets far larger than memory.

What it promises is less than what the loader's own order does. Each epoch takes the shards in a new order,
gives every rank an equal part of their pictures and shuffles within a buffer: pictures that lie far apart on
the disk do not meet in a batch, and which pictures a batch holds depends on batch size and world size. Kept
are: every picture at most once an epoch, views that are a function of (seed, epoch, index, view), and
resuming at the exact batch, by DALI's checkpoint of its reader in the loader's state.

Shape letters: N pictures of a batch, P pictures of the set.
"""

import base64
import os
import re
import resource
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.decode.dali_operators import import_dali
from pipelines.decode.payloads import Payloads
from pipelines.randomness import EpochOrder
from pipelines.sets.listing import PICTURE_SUFFIXES
from pipelines.sets.manifest import verify_hint
from pipelines.sets.shards import dali_index_path, index_hint
from pipelines.sets.stores import ShardStore, Store

BUFFER = 2048
"""Pictures in the buffer that is shuffled; of ImageNet's size they take 230 MB on each rank."""
_BATCHES_AHEAD = 2
_READER = "reader"
# What a process has open besides: sockets, logs, other sets.
_OTHER_FILES = 512
# A place in the set is one number, the shard's number before the offset; no tar reaches 16 TiB.
_OFFSET_BITS = 44


class ShardStream:
    """Batches of encoded pictures in the order in which DALI's reader finds them."""

    def __init__(
        self, store: Store, *, batch_size: int, seed: int, rank: int, world_size: int, shuffle: bool
    ) -> None:
        """Look at the index files; nothing is read yet.

        Raises:
            ValueError: if the set is no folder of shards.
            FileNotFoundError: if a shard lacks its index file.
            ImportError: if DALI is missing.
        """
        if not isinstance(store, ShardStore):
            raise ValueError(
                f"reading is 'stream', which takes a folder of shards, {store.path} is none; choose map, "
                "read or auto, or convert to shards"
            )
        import_dali()
        self._store, self._shards = store, store.shard_set
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        self._rank, self._world_size = rank, world_size
        for number in range(len(self._shards.shards)):
            index_file = dali_index_path(self._shards.tar_path(number))
            if not index_file.is_file():
                raise FileNotFoundError(
                    f"{index_file} is missing, which DALI's reader needs; {index_hint(store.path)}, or "
                    "choose reading read"
                )
        _allow_open_files(len(self._shards.shards))
        self._number = {shard.name: number for number, shard in enumerate(self._shards.shards)}
        # Sixteen bytes a picture, and the only memory that grows with the set.
        self._place_P = _places(self._shards.index["shard"], self._shards.index["offset"])
        self._order_P = np.argsort(self._place_P, kind="stable")
        known = self._shards.manifest.settings.get("extensions")
        self._extensions = list(known) if known else [suffix.lstrip(".") for suffix in PICTURE_SUFFIXES]

    def batches(self, epoch: int, checkpoint: str) -> Iterator[tuple[Payloads, str]]:
        """Batches from the checkpoint on ("" for the start of the epoch), each with the checkpoint behind it.

        Raises:
            ValueError: if an index file does not fit its tar.
            OSError: if a tar cannot be read.
        """
        graph = self._open(epoch, checkpoint)
        while True:
            try:
                encoded, sources = graph.run()
            except RuntimeError as error:
                raise OSError(
                    f"DALI cannot go on reading {self._store.path}; {verify_hint(self._store.path)}; "
                    f"{_reason(error)}"
                ) from error
            payloads = self._payloads(
                [np.asarray(picture) for picture in encoded],
                [os.fsdecode(np.asarray(source).tobytes()) for source in sources],
            )
            yield payloads, base64.b64encode(graph.checkpoint()).decode()

    def _open(self, epoch: int, checkpoint: str) -> Any:
        """Build the reader of an epoch."""
        dali = import_dali()
        order = np.arange(len(self._number))
        if self._shuffle:
            order = EpochOrder(self._seed, epoch, len(order))[:]
        tars = [self._shards.tar_path(int(number)) for number in order]
        epoch_seed = int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])

        @dali.pipeline_def(  # type: ignore[untyped-decorator, unused-ignore]
            batch_size=self._batch_size,
            num_threads=1,
            device_id=None,
            exec_dynamic=True,
            prefetch_queue_depth=_BATCHES_AHEAD,
            enable_checkpointing=True,
        )
        def graph() -> tuple[Any, Any]:
            encoded = dali.fn.readers.webdataset(
                name=_READER,
                paths=[str(tar) for tar in tars],
                index_paths=[str(dali_index_path(tar)) for tar in tars],
                ext=[";".join(self._extensions)],
                case_sensitive_extensions=False,
                missing_component_behavior="skip",
                # A tar that is cut short while it is mapped would end the process.
                dont_use_mmap=True,
                random_shuffle=self._shuffle,
                initial_fill=BUFFER,
                seed=epoch_seed,
                shard_id=self._rank,
                num_shards=self._world_size,
            )
            return encoded, dali.fn.get_property(encoded, key="source_info")

        at = f", or the state's checkpoint {checkpoint!r} is not of this set" if checkpoint else ""
        try:
            pipeline = graph(checkpoint=base64.b64decode(checkpoint, validate=True) if checkpoint else None)
            pipeline.build()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"DALI cannot open the shards of {self._store.path}{at}; {index_hint(self._store.path)}; "
                f"{_reason(error)}"
            ) from error
        counted = pipeline.reader_meta(_READER)["epoch_size"]
        if counted != self._store.count:
            raise ValueError(
                f"the .idx files of {self._store.path} name {counted} pictures, its manifest "
                f"{self._store.count}; {index_hint(self._store.path)}"
            )
        return pipeline

    def _payloads(self, encoded: list[NDArray[np.uint8]], sources: list[str]) -> Payloads:
        """Find out which pictures these are: DALI tells of each the tar, the offset and the name."""
        place_N = np.array([self._place(source) for source in sources], np.uint64)
        found_N = np.searchsorted(self._place_P, place_N, sorter=self._order_P)
        index_N = self._order_P[np.minimum(found_N, len(self._place_P) - 1)]
        num_bytes_N = np.array([len(picture) for picture in encoded], np.int64)
        wrong_N = (self._place_P[index_N] != place_N) | (
            self._shards.index["num_bytes"][index_N] != num_bytes_N
        )
        if wrong_N.any():
            raise ValueError(
                f"{sources[int(np.argmax(wrong_N))]} is no picture by the index of {self._store.path}: an "
                f".idx file does not fit its tar; {index_hint(self._store.path)}"
            )
        return self._store.loaded(index_N, encoded)

    def _place(self, source: str) -> int:
        """The place in the set of what DALI calls ``folder/tar:offset:name``."""
        told = source.removeprefix(f"{self._store.path}/")
        # A tar's name may hold colons, and so may a picture's.
        ends = (match for match in re.finditer(r":(\d+):", told) if told[: match.start()] in self._number)
        tar = next(ends)
        return self._number[told[: tar.start()]] << _OFFSET_BITS | int(tar.group(1))


def _allow_open_files(num_tars: int) -> None:
    """DALI's reader has all tars open: ask the system for as many, or say what to do.

    Raises ValueError where it does not allow them.
    """
    wanted = num_tars + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ValueError(
            f"DALI's reader keeps all {num_tars} shards open, this process may have {hard} files; raise that "
            f"(`ulimit -n {wanted}`, or LimitNOFILE of the service), choose reading read, or larger shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _reason(error: Exception) -> str:
    """The line of DALI's report that tells what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and "ritical error" not in line and "no longer valid" not in line]
    after = said.index("encountered:") + 1 if "encountered:" in said[:-1] else 0
    return said[after] if said else str(error)


def _places(shard_N: NDArray[Any], offset_N: NDArray[Any]) -> NDArray[np.uint64]:
    """One number for each place."""
    return shard_N.astype(np.uint64) << np.uint64(_OFFSET_BITS) | offset_N.astype(np.uint64)
