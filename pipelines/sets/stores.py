"""Where the encoded pictures of a compiled set lie: one ``.beton`` file, or a folder of WebDataset shards.

A store finds and reads bytes; :class:`StoreEngine` is what all engines over a store have in common.

Shape letters: N pictures of a call, V views, H, W, S sides, C bytes.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.decode.decoder import Reading
from pipelines.decode.jpeg import check_jpeg
from pipelines.decode.payloads import Payloads
from pipelines.decode.pillow import is_jpeg, planes_to_rgb, read_rgb
from pipelines.kernels.resample import crop_picture
from pipelines.sets.beton import MODE_JPEG, MODE_RAW, matching_manifest, open_beton
from pipelines.sets.manifest import read_source_path, read_source_paths
from pipelines.sets.shards import open_shards

# Tars kept open; a process may usually have 1,024 files.
_MOST_OPEN = 256


class Store(Protocol):
    """A compiled set, opened. All methods may be called from several threads at once."""

    path: Path
    count: int
    classes: tuple[str, ...]
    fingerprint: str
    """What tells this set from another of the same size."""
    reads_ahead: bool
    """Whether ``fetch`` waits for a disk."""

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where there is none."""

    def fetch(self, index_N: NDArray[np.int64]) -> Payloads:
        """Read pictures, or find them in the mapped file. Raises OSError where that fails."""

    def payload(self, index: int) -> tuple[NDArray[np.uint8], int, tuple[int, int]]:
        """The stored bytes of one picture, how it is stored, and its height and width."""

    def modes(self) -> tuple[int, ...]:
        """How pictures are stored here, as in :mod:`pipelines.sets.beton`."""

    def picture_name(self, index: int) -> str:
        """Where picture ``index`` came from, for messages."""

    def names(self) -> Iterator[str]:
        """Where each picture came from, in order. Raises ValueError where that is not recorded."""


def open_store(path: Path, reading: Reading = "auto") -> Store:
    """Open a ``.beton`` file or a folder of shards.

    Raises:
        FileNotFoundError: if there is no such set, or a file of it is missing.
        ValueError: if it is damaged, or cannot be read in this way.
    """
    if path.is_dir():
        return ShardStore(path, reading)
    return BetonStore(path, reading)


class StoreEngine:
    """The half of an :class:`pipelines.decode.decoder.Engine` that does not depend on the decoder."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.count, self.classes = store.count, store.classes
        self.fingerprint, self.reads_ahead = store.fingerprint, store.reads_ahead

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where the set has none."""
        return self.store.labels(index_N)

    def picture_name(self, index: int) -> str:
        """Where picture ``index`` came from, for messages."""
        return self.store.picture_name(index)

    def names(self) -> Iterator[str]:
        """Where each picture came from, in order. Raises ValueError where that is not recorded."""
        return self.store.names()

    def fetch(self, index_N: NDArray[np.int64]) -> Payloads:
        """Find the pictures in the mapped file, or read them. Raises OSError where that fails."""
        return self.store.fetch(index_N)

    def picture(self, index: int) -> NDArray[np.uint8] | None:
        """(H, W, 3) the whole picture, an encoded one upright by PIL; None where it cannot be decoded."""
        return _pixels(*self.store.payload(index))

    def second_opinion(self, index: int, boxes_V5: NDArray[np.int32], out_VSS3: NDArray[np.uint8]) -> bool:
        """Crop a picture that a decoder complained of: sound if no pixel was lost, and PIL reads it too."""
        data_C, mode, size = self.store.payload(index)
        if is_jpeg(data_C) and check_jpeg(data_C).state == "damaged":
            return False
        picture_HW3 = _pixels(data_C, mode, size)
        if picture_HW3 is None or picture_HW3.shape[:2] != size:
            return False
        crop_picture(picture_HW3, boxes_V5, out_VSS3)
        return True


class BetonStore:
    """Pictures of a ``.beton`` file, mapped, or read ahead where it is larger than the memory."""

    def __init__(self, path: Path, reading: Reading = "auto") -> None:
        self._beton = open_beton(path)
        manifest = matching_manifest(self._beton)
        self.path, self.count = path, len(self._beton)
        self.classes = manifest.classes if manifest else ()
        self.fingerprint = manifest.sha256 if manifest else f"{self._beton.data.size} bytes"
        self._metadata = self._beton.metadata["f0"]
        if reading == "auto":
            reading = "read" if self._beton.data.size > 0.75 * _memory_bytes() else "map"
        self.reads_ahead = reading == "read"
        self._file = os.open(path, os.O_RDONLY) if self.reads_ahead else -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where the set has none."""
        labels_N: NDArray[np.int64] = self._beton.labels[index_N].reshape(len(index_N))
        return labels_N

    def modes(self) -> tuple[int, ...]:
        """How pictures are stored in this file."""
        return tuple(int(mode) for mode in np.unique(self._metadata["mode"]))

    def picture_name(self, index: int) -> str:
        """The source path of picture ``index``."""
        return read_source_path(self.path, index) or f"picture {index} of {self.path.name}"

    def names(self) -> Iterator[str]:
        """The pictures' source paths, in order. Raises ValueError if the file of them is not there."""
        return read_source_paths(self.path, self.count)

    def payload(self, index: int) -> tuple[NDArray[np.uint8], int, tuple[int, int]]:
        """The stored bytes of one picture, how it is stored, and its height and width."""
        record = self._metadata[index]
        return self._beton.payload(index), int(record["mode"]), (int(record["height"]), int(record["width"]))

    def fetch(self, index_N: NDArray[np.int64]) -> Payloads:
        """Find the pictures in the mapped file, or read them."""
        records = self._metadata[index_N]
        size_N2 = _size_N2(records)
        address_N = records["data_ptr"].astype(np.int64)
        num_bytes_N = self._beton.sizes[index_N].astype(np.int64)
        mode_N = np.ascontiguousarray(records["mode"])
        if not self.reads_ahead:
            return Payloads(index_N, size_N2, mode_N, self._beton.data, address_N, num_bytes_N)
        payloads = Payloads.room(index_N, size_N2, mode_N, num_bytes_N)
        file_N = np.full(len(index_N), self._file, np.int32)
        payloads.read(np.arange(len(index_N)), file_N, address_N, lambda _: (self.path, self.path))
        return payloads


class ShardStore:
    """Pictures of WebDataset shards, always read into the process's own memory ahead of their turn.

    Copying a picture out of the system's cache costs about a fiftieth of decoding it, and unlike mapped
    memory it fails with a sentence where a tar is cut short while the run is on.
    """

    reads_ahead = True

    def __init__(self, path: Path, reading: Reading = "auto") -> None:
        if reading == "map":
            raise ValueError(
                f"reading is 'map', which takes a .beton file; {path} is a folder of shards, which are read "
                "in any case: choose auto, read or stream"
            )
        self.shard_set = open_shards(path)
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()
        self.path, self.count = path, len(self.shard_set)
        self.classes, self.fingerprint = self.shard_set.manifest.classes, self.shard_set.manifest.sha256

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where the set has none."""
        return self.shard_set.index["label"][index_N].astype(np.int64).reshape(len(index_N))

    def modes(self) -> tuple[int, ...]:
        """Shards hold encoded pictures."""
        return (MODE_JPEG,)

    def picture_name(self, index: int) -> str:
        """The picture's name in its tar, and which tar that is."""
        tar = self.shard_set.tar_path(int(self.shard_set.index[index]["shard"])).name
        return f"{self.shard_set.member_name(index) or f'picture {index}'} in {tar}"

    def names(self) -> Iterator[str]:
        """The pictures' names in their tars, in order. Raises ValueError if DALI's index files lack one."""
        return self.shard_set.member_names()

    def payload(self, index: int) -> tuple[NDArray[np.uint8], int, tuple[int, int]]:
        """The stored bytes of one picture, how it is stored, and its height and width."""
        record = self.shard_set.index[index]
        return self.shard_set.payload(index), MODE_JPEG, (int(record["height"]), int(record["width"]))

    def fetch(self, index_N: NDArray[np.int64]) -> Payloads:
        """Read the pictures."""
        records = self.shard_set.index[index_N]
        address_N = records["offset"].astype(np.int64)
        payloads = _room(index_N, records, records["num_bytes"].astype(np.int64))
        file_N = np.full(len(index_N), -1, np.int32)
        for shard in set(records["shard"].tolist()):
            here_N = records["shard"] == shard
            file_N[here_N] = self._kept_open(shard)
            if file_N[here_N][0] < 0:
                with self._open(shard) as file:
                    file_M = np.full(here_N.sum(), file, np.int32)
                    payloads.read(np.flatnonzero(here_N), file_M, address_N[here_N], self._where)
        open_M = np.flatnonzero(file_N >= 0)
        payloads.read(open_M, file_N[open_M], address_N[open_M], self._where)
        return payloads

    def _where(self, index: int) -> tuple[Path, Path]:
        """The tar of a picture, and the set."""
        return self.shard_set.tar_path(int(self.shard_set.index[index]["shard"])), self.path

    def _kept_open(self, shard: int) -> int:
        """A descriptor of a tar that stays open; −1 for one more than may."""
        with self._lock:
            if shard not in self._files and len(self._files) < _MOST_OPEN:
                self._files[shard] = os.open(self._tar(shard), os.O_RDONLY)
            return self._files.get(shard, -1)

    @contextlib.contextmanager
    def _open(self, shard: int) -> Iterator[int]:
        file = os.open(self._tar(shard), os.O_RDONLY)
        try:
            yield file
        finally:
            os.close(file)

    def _tar(self, shard: int) -> Path:
        """The path of a tar that is there, or an error that says what to do."""
        tar = self.shard_set.tar_path(shard)
        if not tar.exists():
            raise FileNotFoundError(f"{tar} has gone while the set was read; bring it back and resume")
        return tar

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def loaded(self, index_N: NDArray[np.int64], encoded: list[NDArray[np.uint8]]) -> Payloads:
        """What ``fetch`` returns, of pictures that somebody else has read."""
        num_bytes_N = np.array([len(picture) for picture in encoded], np.int64)
        payloads = _room(index_N, self.shard_set.index[index_N], num_bytes_N)
        for room_C, picture_C in zip(payloads, encoded, strict=True):
            room_C[:] = picture_C
        return payloads


def _room(index_N: NDArray[np.int64], records: NDArray[np.void], num_bytes_N: NDArray[np.int64]) -> Payloads:
    """Memory for pictures of shards, whose index says how large they are."""
    return Payloads.room(index_N, _size_N2(records), np.full(len(index_N), MODE_JPEG, np.uint8), num_bytes_N)


def _size_N2(records: NDArray[np.void]) -> NDArray[np.int64]:
    """(N, 2) heights and widths by the records of an index."""
    return np.stack([records["height"], records["width"]], axis=1).astype(np.int64)


def _pixels(data_C: NDArray[np.uint8], mode: int, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """(H, W, 3) a stored picture, an encoded one upright by PIL; None where it cannot be decoded."""
    if mode == MODE_JPEG:
        image = read_rgb(data_C.tobytes())
        return None if image is None else np.asarray(image)
    if mode == MODE_RAW:
        return np.array(data_C).reshape(*size, 3)
    return planes_to_rgb(data_C, *size)


def _memory_bytes() -> int:
    """What this machine has, or this container may use where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
