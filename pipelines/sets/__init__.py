"""The protocol of an image set, and the encoded images that a set returns for a decoder.

Shape letters: N images of a call, M some of them, C bytes.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.kernels.compiled import address_of, call_int64, kernel
from pipelines.kernels.resample import SLACK
from pipelines.sets.manifest import verify_hint

Reading = Literal["auto", "map", "read", "stream"]
"""How a compiled set is read.

map: a ``.beton`` file is mapped, and the system caches as many pages as fit into memory. read: images are
read into the process's memory ahead of their use, for sets larger than memory. stream: DALI's reader reads
shards sequentially and shuffles within a buffer, for disks with slow random access; the order is DALI's (see
:mod:`pipelines.sets.stream`). auto: map a ``.beton`` file if it is not larger than three quarters of the
memory; read all other sets."""


@dataclass(frozen=True)
class RankShare:
    """The part of each global batch that this process loads."""

    rank: int = 0
    """Number of this process, from 0."""
    world_size: int = 1
    """Number of processes."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}; it must lie in [0, {self.world_size})")


@dataclass(frozen=True)
class Encoded:
    """Some encoded images of a set, in memory."""

    index_N: NDArray[np.int64]
    """(N,) positions in the set."""
    size_N2: NDArray[np.int64]
    """(N, 2) heights and widths in pixels by the set's index; (1, 1) if they are unknown."""
    mode_N: NDArray[np.uint8]
    """(N,) how each is stored, see :mod:`pipelines.sets.beton`. MODE_JPEG includes other image formats."""
    data_C: NDArray[np.uint8]
    """Memory with all images. At least SLACK more bytes are readable after each."""
    start_N: NDArray[np.int64]
    """(N,) position of the first byte of each in ``data_C``."""
    num_bytes_N: NDArray[np.int64]
    """(N,) length of each."""

    @classmethod
    def empty(
        cls,
        index_N: NDArray[np.int64],
        size_N2: NDArray[np.int64],
        mode_N: NDArray[np.uint8],
        num_bytes_N: NDArray[np.int64],
    ) -> "Encoded":
        """Uninitialised memory for images of these lengths, one after the other."""
        stop_N = num_bytes_N.cumsum()
        data_C = np.empty(int(num_bytes_N.sum()) + SLACK, np.uint8)
        return cls(index_N, size_N2, mode_N, data_C, stop_N - num_bytes_N, num_bytes_N)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """The bytes of each image, without a copy."""
        for start, num_bytes in zip(self.start_N.tolist(), self.num_bytes_N.tolist(), strict=True):
            yield self.data_C[start : start + num_bytes]

    def part(self, rows: slice) -> "Encoded":
        """Some of the images, without a copy."""
        return Encoded(
            self.index_N[rows],
            self.size_N2[rows],
            self.mode_N[rows],
            self.data_C,
            self.start_N[rows],
            self.num_bytes_N[rows],
        )

    def fill(self, contents: list[NDArray[np.uint8]]) -> "Encoded":
        """Copy the bytes of the images into ``data_C``; returns self."""
        for target_C, content_C in zip(self, contents, strict=True):
            target_C[:] = content_C
        return self

    def read(
        self,
        rows_M: NDArray[np.int64],
        file_M: NDArray[np.int32],
        address_M: NDArray[np.int64],
        path_of: Callable[[int], Path],
        set_path: Path,
    ) -> None:
        """Read some of the images from open files.

        Args:
            rows_M: (M,) which of the N images.
            file_M: (M,) file descriptors.
            address_M: (M,) positions of the first bytes in the files.
            path_of: returns the path of the file of an image, by its position in the set; for messages.
            set_path: path of the set, for messages.

        Raises:
            OSError: if a file cannot be read or is truncated.
        """
        done = 0
        while done < len(rows_M):
            rest_M = rows_M[done:]
            ranges = address_M[done:], self.num_bytes_N[rest_M], self.start_N[rest_M]
            failed = _read_pieces(_pread_address(), file_M[done:], *ranges, self.data_C)
            if failed < 0:
                return
            done += failed
            row = rows_M[done]
            self._retry_read(row, int(file_M[done]), int(address_M[done]), path_of, set_path)
            done += 1

    def _retry_read(
        self, row: np.int64, file: int, address: int, path_of: Callable[[int], Path], set_path: Path
    ) -> None:
        """Read one image by ``os.pread``, which retries interrupted calls and raises the system's error."""
        index, num_bytes = int(self.index_N[row]), int(self.num_bytes_N[row])
        path, image = path_of(index), f"image {index}, {num_bytes} bytes at {address}"
        advice = f"check the disk, {verify_hint(set_path)}, and resume"
        try:
            content = os.pread(file, num_bytes, address)
        except OSError as error:
            raise OSError(error.errno, f"{path}: {image}: {error.strerror}; {advice}") from error
        if len(content) < num_bytes:
            raise OSError(f"{path} was cut short while it was read: {image}; {advice}")
        self.data_C[self.start_N[row] :][:num_bytes] = np.frombuffer(content, np.uint8)


@kernel
def _read_pieces(
    pread: int,
    file_N: NDArray[np.int32],
    address_N: NDArray[np.int64],
    num_bytes_N: NDArray[np.int64],
    start_N: NDArray[np.int64],
    data_C: NDArray[np.uint8],
) -> int:
    """Read pieces of open files; returns −1, or the number of the first piece that failed.

    Args:
        pread: address of the C function, from :func:`_pread_address`.
        file_N: file descriptors.
        address_N: offsets of the pieces in their files.
        num_bytes_N: their lengths.
        start_N: where each piece goes in ``data_C``.
        data_C: memory that receives the pieces.
    """
    for n in range(len(address_N)):
        done, num_bytes = 0, int(num_bytes_N[n])
        while done < num_bytes:
            target = np.int64(data_C.ctypes.data) + start_N[n] + done
            got = call_int64(pread, (file_N[n], target, num_bytes - done, int(address_N[n]) + done))
            if got <= 0:
                return n
            done += got
    return -1


@cache
def _pread_address() -> int:
    """The address of the C library's ``pread``."""
    return address_of(ctypes.CDLL(None, use_errno=True).pread)


class PictureSet(Protocol):
    """An opened set of images. All methods may be called from several threads at once.

    The decoders use only this protocol, whatever the storage format. "Picture set" avoids a clash with
    Python's ``set``.
    """

    path: Path
    count: int
    """Number of images."""
    classes: tuple[str, ...]
    """Class names in the order of their labels; empty where the set has none."""
    fingerprint: str
    """Identifies the contents of the set. It is part of the loader's state."""
    reads_ahead: bool
    """Whether ``fetch`` waits for a disk. If so, the loader calls it ahead of time on additional threads."""

    def modes(self) -> tuple[int, ...]:
        """The modes in which images are stored, see :mod:`pipelines.sets.beton`. Reads the whole index."""

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where there is none."""

    def fetch(self, index_N: NDArray[np.int64]) -> Encoded:
        """Read images, or find them in a mapped file. Raises OSError if reading fails."""

    def name(self, index: int) -> str:
        """Source of an image, for messages. May take time linear in ``index``."""

    def names(self) -> Iterator[str]:
        """Source of each image, in order. Raises ValueError if the sources are not recorded."""
