"""DALI's reader of shards: reads sequentially and shuffles within a buffer, for sets far larger than memory.

It guarantees less than the loader's own order. In each epoch it shuffles the order of the shards, gives every
rank an equal part of the images and shuffles them within a buffer. So images far apart on the disk are not in
the same batch, and the contents of a batch depend on batch size and world size.

It does guarantee that every image is used at most once per epoch, that a view is a function of (seed, epoch,
index, view), and that a run resumes at the exact batch: the loader's state contains the checkpoint of DALI's
reader.

Shape letters: N images of a batch, P images of the set.
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
from pipelines.randomness import EpochOrder
from pipelines.sets import Encoded, RankShare
from pipelines.sets.folder import IMAGE_SUFFIXES
from pipelines.sets.manifest import verify_hint
from pipelines.sets.shards import dali_index_path, index_hint
from pipelines.sets.stores import ShardStore

BUFFER = 2048
"""Images in the shuffle buffer: 230 MB per rank at the file sizes of ImageNet."""
_BATCHES_AHEAD = 2
_READER = "reader"
_OTHER_FILES = 512
"""Open files that a process may need in addition to the shards: sockets, logs, other sets."""
_OFFSET_BITS = 44
"""A position is one number: the offset in the tar in the lower bits, below 16 TiB, the shard above them."""


class ShardStream:
    """Batches of encoded images, in the order of DALI's reader."""

    def __init__(
        self, store: ShardStore, *, batch_size: int, seed: int, share: RankShare, shuffle: bool
    ) -> None:
        """Check that the index files exist. No shard is read yet.

        Args:
            store: the set.
            batch_size: images per batch on this rank.
            seed: of the order.
            share: this rank and the number of ranks.
            shuffle: whether shards and images are shuffled.

        Raises:
            FileNotFoundError: if a shard lacks its index file.
            ImportError: if DALI is missing.
            ValueError: if the process may not have all shards open at once.
        """
        import_dali()
        self.share = share
        self._store, self._shards = store, store.shard_set
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        for number in range(len(self._shards.shards)):
            index_file = dali_index_path(self._shards.tar_path(number))
            if not index_file.is_file():
                raise FileNotFoundError(
                    f"{index_file} is missing, which DALI's reader needs; {index_hint(store.path)}, or "
                    "choose reading read"
                )
        _allow_open_files(len(self._shards.shards))
        self._number = {shard.name: number for number, shard in enumerate(self._shards.shards)}
        # Sixteen bytes per image. No other memory grows with the set.
        shard_P, offset_P = self._shards.index["shard"], self._shards.index["offset"]
        self._position_P = shard_P.astype(np.uint64) << np.uint64(_OFFSET_BITS) | offset_P.astype(np.uint64)
        self._order_P = np.argsort(self._position_P, kind="stable")
        known = self._shards.manifest.settings.get("extensions")
        self._extensions = list(known) if known else [suffix.lstrip(".") for suffix in IMAGE_SUFFIXES]

    def batches(self, epoch: int, checkpoint: str) -> Iterator[tuple[Encoded, str]]:
        """Yield batches from a checkpoint on ("" for the epoch's start), each with the checkpoint after it.

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
                    f"DALI cannot continue to read {self._store.path}; {verify_hint(self._store.path)}; "
                    f"{_reason(error)}"
                ) from error
            images = self._identify(
                [np.asarray(image) for image in encoded],
                [os.fsdecode(np.asarray(source).tobytes()) for source in sources],
            )
            yield images, base64.b64encode(graph.checkpoint()).decode()

    def _open(self, epoch: int, checkpoint: str) -> Any:
        """Build DALI's pipeline of an epoch and check its number of images."""
        from_checkpoint = (
            f", or the state's checkpoint {checkpoint!r} is not of this set" if checkpoint else ""
        )
        try:
            pipeline = self._reader(
                epoch, base64.b64decode(checkpoint, validate=True) if checkpoint else None
            )
            pipeline.build()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"DALI cannot open the shards of {self._store.path}{from_checkpoint}; "
                f"{index_hint(self._store.path)}; {_reason(error)}"
            ) from error
        found = pipeline.reader_meta(_READER)["epoch_size"]
        if found != self._store.count:
            raise ValueError(
                f"the .idx files of {self._store.path} list {found} images, its manifest "
                f"{self._store.count}; {index_hint(self._store.path)}"
            )
        return pipeline

    def _reader(self, epoch: int, checkpoint: bytes | None) -> Any:
        """Define DALI's pipeline of an epoch; the caller builds it."""
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
                # If a mapped tar is truncated during the run, the process is killed.
                dont_use_mmap=True,
                random_shuffle=self._shuffle,
                initial_fill=BUFFER,
                seed=epoch_seed,
                shard_id=self.share.rank,
                num_shards=self.share.world_size,
            )
            return encoded, dali.fn.get_property(encoded, key="source_info")

        return graph(checkpoint=checkpoint)

    def _identify(self, contents: list[NDArray[np.uint8]], sources: list[str]) -> Encoded:
        """Find the images in the set's index, by tar, offset and length."""
        position_N = np.array([self._position(source) for source in sources], np.uint64)
        found_N = np.searchsorted(self._position_P, position_N, sorter=self._order_P)
        index_N = self._order_P[np.minimum(found_N, len(self._position_P) - 1)]
        num_bytes_N = np.array([len(content_C) for content_C in contents], np.int64)
        wrong_N = (self._position_P[index_N] != position_N) | (
            self._shards.index["num_bytes"][index_N] != num_bytes_N
        )
        if wrong_N.any():
            raise ValueError(
                f"{sources[int(np.argmax(wrong_N))]} does not match the index of {self._store.path}: an "
                f".idx file does not fit its tar; {index_hint(self._store.path)}"
            )
        return self._store.copy(index_N, contents)

    def _position(self, source: str) -> int:
        """The position of an image that DALI reports as ``folder/tar:offset:name``."""
        name = source.removeprefix(f"{self._store.path}/")
        # Names of tars and of images may contain colons, so take the first match that ends the name of a tar.
        ends = (match for match in re.finditer(r":(\d+):", name) if name[: match.start()] in self._number)
        tar = next(ends)
        return self._number[name[: tar.start()]] << _OFFSET_BITS | int(tar.group(1))


def _allow_open_files(num_tars: int) -> None:
    """Raise the process's limit of open files, because DALI's reader keeps all tars open.

    Raises:
        ValueError: if the system does not allow that many.
    """
    needed = num_tars + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"DALI's reader keeps all {num_tars} shards open, this process may have {hard} files; raise that "
            f"(`ulimit -n {needed}`, or LimitNOFILE of the service), choose reading read, or larger shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _reason(error: Exception) -> str:
    """The line of DALI's message that names the error."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and "ritical error" not in line and "no longer valid" not in line]
    first = lines.index("encountered:") + 1 if "encountered:" in lines[:-1] else 0
    return lines[first] if lines else str(error)
