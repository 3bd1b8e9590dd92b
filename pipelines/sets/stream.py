"""DALI's own reader of shards: sequential, shuffled within a buffer; for sets far larger than the memory.

Its promises are weaker than those of the loader's own order. In each epoch it takes the shards in a new
order, gives every rank an equal part of their images and shuffles within a buffer. So images that lie far
apart on the disk do not meet in a batch, and the contents of a batch depend on batch size and world size.
What still holds: every image comes at most once per epoch, views are a function of (seed, epoch, index,
view), and a run resumes at the exact batch, because the loader's state holds the checkpoint of DALI's reader.

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
"""Images in the shuffle buffer; at ImageNet's file sizes this is 230 MB on each rank."""
_BATCHES_AHEAD = 2
_READER = "reader"
_OTHER_FILES = 512
"""Files that a process may need besides the shards: sockets, logs, other sets."""
_OFFSET_BITS = 44
"""A position in the shards is one number: shard number, then offset in the tar, which is below 16 TiB."""


class ShardStream:
    """Batches of encoded images in the order in which DALI's reader returns them."""

    def __init__(
        self, store: ShardStore, *, batch_size: int, seed: int, share: RankShare, shuffle: bool
    ) -> None:
        """Look for the index files; nothing is read yet.

        Args:
            store: the set.
            batch_size: images per batch on this rank.
            seed: of the order.
            share: the rank that reads, among how many.
            shuffle: whether shards and images are shuffled.

        Raises:
            FileNotFoundError: if a shard lacks its index file.
            ImportError: if DALI is missing.
            ValueError: if the process may not open all shards at once.
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
        # Sixteen bytes per image, the only memory that grows with the set.
        shard_P, offset_P = self._shards.index["shard"], self._shards.index["offset"]
        self._position_P = shard_P.astype(np.uint64) << np.uint64(_OFFSET_BITS) | offset_P.astype(np.uint64)
        self._order_P = np.argsort(self._position_P, kind="stable")
        known = self._shards.manifest.settings.get("extensions")
        self._extensions = list(known) if known else [suffix.lstrip(".") for suffix in IMAGE_SUFFIXES]

    def batches(self, epoch: int, checkpoint: str) -> Iterator[tuple[Encoded, str]]:
        """Batches from the checkpoint on ("" for the start of the epoch), each with the checkpoint after it.

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
        """Build the reader of an epoch."""
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
        """DALI's pipeline of an epoch, not built yet."""
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
                # If a mapped tar were cut short, the process would be killed.
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
        """Find the images in the set's index by tar, offset and length."""
        position_N = np.array([self._position(source) for source in sources], np.uint64)
        found_N = np.searchsorted(self._position_P, position_N, sorter=self._order_P)
        index_N = self._order_P[np.minimum(found_N, len(self._position_P) - 1)]
        num_bytes_N = np.array([len(content_C) for content_C in contents], np.int64)
        wrong_N = (self._position_P[index_N] != position_N) | (
            self._shards.index["num_bytes"][index_N] != num_bytes_N
        )
        if wrong_N.any():
            raise ValueError(
                f"{sources[int(np.argmax(wrong_N))]} is not an image by the index of {self._store.path}: an "
                f".idx file does not fit its tar; {index_hint(self._store.path)}"
            )
        return self._store.copy(index_N, contents)

    def _position(self, source: str) -> int:
        """The position in the shards of what DALI calls ``folder/tar:offset:name``."""
        name = source.removeprefix(f"{self._store.path}/")
        # The names of tars and of images may contain colons.
        ends = (match for match in re.finditer(r":(\d+):", name) if name[: match.start()] in self._number)
        tar = next(ends)
        return self._number[name[: tar.start()]] << _OFFSET_BITS | int(tar.group(1))


def _allow_open_files(num_tars: int) -> None:
    """Raise the limit of open files, because DALI's reader keeps all tars open.

    Raises:
        ValueError: if the system does not allow that.
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
    """The line of DALI's report that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and "ritical error" not in line and "no longer valid" not in line]
    first = lines.index("encountered:") + 1 if "encountered:" in lines[:-1] else 0
    return lines[first] if lines else str(error)
