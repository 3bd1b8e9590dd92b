"""Open a set: a ``.beton`` file, a folder of WebDataset shards, or a folder of images.

:class:`BetonStore`, :class:`ShardStore` and :class:`pipelines.sets.folder.FolderSet` implement
:class:`pipelines.sets.PictureSet`: the loader and the decoders use only that protocol. The layouts of the
files are defined in :mod:`pipelines.sets.beton` and :mod:`pipelines.sets.shards`.

Shape letters: N images of a call, M some of them.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from pipelines.sets import Encoded, PictureSet, Reading
from pipelines.sets.beton import MODE_JPEG, matching_manifest, open_beton
from pipelines.sets.folder import FolderSet
from pipelines.sets.manifest import read_source_path, read_source_paths
from pipelines.sets.shards import index_hint, is_shard_set, open_shards

_MAX_OPEN_FILES = 256
"""Tars that stay open. The usual limit of a process is 1,024 open files."""
_MAX_MAPPED_SHARE = 0.75
"""Largest share of the memory that a ``.beton`` file may have to be mapped by default."""


def open_set(path: str | Path, reading: Reading = "auto") -> PictureSet:
    """Open a set of images.

    Args:
        path: a ``.beton`` file, a folder of indexed shards, or a folder of images.
        reading: how a compiled set is read.

    Raises:
        FileNotFoundError: if there is no such compiled set, or a file of it is missing.
        ValueError: if the set is damaged, the folder has no images, or the set does not support ``reading``.
    """
    path = Path(path)
    if reading not in get_args(Reading):
        raise ValueError(f"reading is {reading!r}; known are {', '.join(get_args(Reading))}")
    if is_compiled(path):
        return ShardStore(path, reading) if path.is_dir() else BetonStore(path, reading)
    if reading != "auto":
        raise ValueError(
            f"reading is {reading!r}, which needs a compiled set; {path} is a folder of images, which are "
            "always read ahead (auto)"
        )
    try:
        return FolderSet(path)
    except ValueError as error:
        if path.is_dir() and next(path.glob("*.tar"), None) is not None:
            raise ValueError(f"{path} holds tar files without an index; {index_hint(path)}") from error
        raise


def is_compiled(path: Path) -> bool:
    """Whether the path belongs to a compiled set: a ``.beton`` file or a folder of indexed shards."""
    return path.suffix == ".beton" or is_shard_set(path)


class BetonStore:
    """Images of a ``.beton`` file: mapped, or read ahead if the file is larger than the memory."""

    def __init__(self, path: Path, reading: Reading = "auto") -> None:
        """Open the file. Arguments and errors are those of :func:`open_set`."""
        if reading == "stream":
            raise ValueError(
                f"reading is 'stream', which takes a folder of shards; {path} is a file: choose map, read or "
                "auto, or convert to shards"
            )
        self._beton = open_beton(path)
        manifest = matching_manifest(self._beton)
        self.path, self.count = path, len(self._beton)
        self.classes = manifest.classes if manifest else ()
        self.fingerprint = manifest.sha256 if manifest else f"{self._beton.data.size} bytes"
        self._images, self._labels = self._beton.metadata["f0"], self._beton.metadata["f1"]
        if reading == "auto":
            fits = self._beton.data.size <= _MAX_MAPPED_SHARE * _memory_bytes()
            reading = "map" if fits else "read"
        self.reads_ahead = reading == "read"
        self._file = os.open(path, os.O_RDONLY) if self.reads_ahead else -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)

    def modes(self) -> tuple[int, ...]:
        """How the images are stored in this file."""
        return tuple(int(mode) for mode in np.unique(self._images["mode"]))

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where the set has none."""
        labels_N: NDArray[np.int64] = self._labels[index_N].reshape(len(index_N))
        return labels_N

    def name(self, index: int) -> str:
        """The image's source path."""
        return read_source_path(self.path, index) or f"image {index} of {self.path.name}"

    def names(self) -> Iterator[str]:
        """The images' source paths, in order. Raises ValueError if the file that lists them is missing."""
        return read_source_paths(self.path, self.count)

    def fetch(self, index_N: NDArray[np.int64]) -> Encoded:
        """Find the images in the mapped file, or read them. Raises OSError if reading fails."""
        records = self._images[index_N]
        size_N2 = np.stack([records["height"], records["width"]], axis=1).astype(np.int64)
        address_N = records["data_ptr"].astype(np.int64)
        num_bytes_N = self._beton.sizes[index_N].astype(np.int64)
        mode_N = np.ascontiguousarray(records["mode"])
        if not self.reads_ahead:
            return Encoded(index_N, size_N2, mode_N, self._beton.data, address_N, num_bytes_N)
        encoded = Encoded.empty(index_N, size_N2, mode_N, num_bytes_N)
        row_N, file_N = np.arange(len(index_N)), np.full(len(index_N), self._file, np.int32)
        encoded.read(row_N, file_N, address_N, lambda _: self.path, self.path)
        return encoded


class ShardStore:
    """Images of WebDataset shards. They are always read into the process's memory, ahead of their use.

    Copying an image from the system's cache takes about a fiftieth of the time of decoding it. If a tar is
    truncated during the run, reading raises an error; access to mapped memory would kill the process.
    """

    reads_ahead = True

    def __init__(self, path: Path, reading: Reading = "auto") -> None:
        """Open the folder. Arguments and errors are those of :func:`open_set`."""
        if reading == "map":
            raise ValueError(
                f"reading is 'map', which takes a .beton file; {path} is a folder of shards, which are "
                "always read into memory: choose auto, read or stream"
            )
        self.shard_set = open_shards(path)
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()
        self.path, self.count = path, len(self.shard_set)
        self.classes, self.fingerprint = self.shard_set.manifest.classes, self.shard_set.manifest.sha256

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def modes(self) -> tuple[int, ...]:
        """Shards contain only encoded images."""
        return (MODE_JPEG,)

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where the set has none."""
        return self.shard_set.index["label"][index_N].astype(np.int64).reshape(len(index_N))

    def name(self, index: int) -> str:
        """The image's name in its tar, and the tar."""
        return f"{self.shard_set.member_name(index) or f'image {index}'} in {self._tar_of(index).name}"

    def names(self) -> Iterator[str]:
        """The images' names in their tars, in order. Raises ValueError if DALI's index files lack one."""
        return self.shard_set.member_names()

    def fetch(self, index_N: NDArray[np.int64]) -> Encoded:
        """Read the images. Raises OSError if reading fails."""
        records = self.shard_set.index[index_N]
        address_N = records["offset"].astype(np.int64)
        encoded = self._empty(index_N, records["num_bytes"].astype(np.int64))
        file_N = np.full(len(index_N), -1, np.int32)
        for shard in set(records["shard"].tolist()):
            in_shard_N = records["shard"] == shard
            file_N[in_shard_N] = kept = self._keep_open(shard)
            if kept < 0:
                with self._open_once(shard) as file:
                    row_M = np.flatnonzero(in_shard_N)
                    file_M = np.full(len(row_M), file, np.int32)
                    encoded.read(row_M, file_M, address_N[row_M], self._tar_of, self.path)
        row_M = np.flatnonzero(file_N >= 0)
        encoded.read(row_M, file_N[row_M], address_N[row_M], self._tar_of, self.path)
        return encoded

    def copy(self, index_N: NDArray[np.int64], contents: list[NDArray[np.uint8]]) -> Encoded:
        """Like ``fetch``, for images that are in memory already; their bytes are copied."""
        num_bytes_N = np.array([len(content_C) for content_C in contents], np.int64)
        return self._empty(index_N, num_bytes_N).fill(contents)

    def _empty(self, index_N: NDArray[np.int64], num_bytes_N: NDArray[np.int64]) -> Encoded:
        """Uninitialised memory for images of these lengths; heights and widths are those of the index."""
        records = self.shard_set.index[index_N]
        size_N2 = np.stack([records["height"], records["width"]], axis=1).astype(np.int64)
        return Encoded.empty(index_N, size_N2, np.full(len(index_N), MODE_JPEG, np.uint8), num_bytes_N)

    def _tar_of(self, index: int) -> Path:
        """The tar that an image lies in."""
        return self.shard_set.tar_path(int(self.shard_set.index[index]["shard"]))

    def _keep_open(self, shard: int) -> int:
        """Descriptor of a tar that stays open; −1 if the largest number of tars is open already."""
        with self._lock:
            if shard not in self._files and len(self._files) < _MAX_OPEN_FILES:
                self._files[shard] = self._open(shard)
            return self._files.get(shard, -1)

    @contextlib.contextmanager
    def _open_once(self, shard: int) -> Iterator[int]:
        """Descriptor of a tar that is closed after use."""
        file = self._open(shard)
        try:
            yield file
        finally:
            os.close(file)

    def _open(self, shard: int) -> int:
        tar = self.shard_set.tar_path(shard)
        if not tar.exists():
            raise FileNotFoundError(f"{tar} was removed while the set was read; restore it and resume")
        return os.open(tar, os.O_RDONLY)


def _memory_bytes() -> int:
    """Memory of this machine, or the limit of this container if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # there is no control group, or its limit is "max"
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
