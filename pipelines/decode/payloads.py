"""Encoded pictures in memory, and reading them there.

Shape letters: N pictures of a call, M some of them, C bytes.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.kernels.jpeg_crops import pread_address, read_pieces
from pipelines.kernels.resample import SLACK
from pipelines.sets.manifest import verify_hint


@dataclass(frozen=True)
class Payloads:
    """Some pictures, encoded; see :class:`pipelines.decode.decoder.Fetched`."""

    index_N: NDArray[np.int64]
    """(N,) their positions in the set."""
    size_N2: NDArray[np.int64]
    """(N, 2) heights and widths by the set's index."""
    mode_N: NDArray[np.uint8]
    """(N,) how each is stored, as in :mod:`pipelines.sets.beton`."""
    data_C: NDArray[np.uint8]
    """Memory that holds all of them, with SLACK bytes behind them."""
    start_N: NDArray[np.int64]
    """(N,) where in it each begins."""
    num_bytes_N: NDArray[np.int64]
    """(N,) how long each is."""

    @classmethod
    def room(
        cls,
        index_N: NDArray[np.int64],
        size_N2: NDArray[np.int64],
        mode_N: NDArray[np.uint8],
        num_bytes_N: NDArray[np.int64],
    ) -> "Payloads":
        """Memory for so many bytes of each picture, one after the other and not yet written."""
        end_N = num_bytes_N.cumsum()
        data_C = np.empty(int(num_bytes_N.sum()) + SLACK, np.uint8)
        return cls(index_N, size_N2, mode_N, data_C, end_N - num_bytes_N, num_bytes_N)

    def part(self, which: slice) -> "Payloads":
        """Some of them."""
        return Payloads(
            self.index_N[which],
            self.size_N2[which],
            self.mode_N[which],
            self.data_C,
            self.start_N[which],
            self.num_bytes_N[which],
        )

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """The bytes of each picture, without a copy."""
        for start, num_bytes in zip(self.start_N.tolist(), self.num_bytes_N.tolist(), strict=True):
            yield self.data_C[start : start + num_bytes]

    def read(
        self,
        some_M: NDArray[np.int64],
        file_M: NDArray[np.int32],
        address_M: NDArray[np.int64],
        where: Callable[[int], tuple[Path, Path]],
    ) -> None:
        """Fill the memory of some pictures.

        Args:
            some_M: (M,) which of the N.
            file_M: (M,) descriptors of the files they lie in.
            address_M: (M,) where they begin there.
            where: tells the file and the set of a picture by its position in the set, for messages.

        Raises:
            OSError: if a file cannot be read, or ends too early.
        """
        done = 0
        while done < len(some_M):
            rest_M = some_M[done:]
            columns = address_M[done:], self.num_bytes_N[rest_M], self.start_N[rest_M]
            failed = read_pieces(pread_address(), file_M[done:], *columns, self.data_C)
            if failed < 0:
                return
            done += failed
            self._read_one(some_M[done], int(file_M[done]), int(address_M[done]), where)
            done += 1

    def _read_one(
        self, n: np.int64, file: int, address: int, where: Callable[[int], tuple[Path, Path]]
    ) -> None:
        """Read a picture by Python, which goes on after a signal and knows the system's reason."""
        path, set_path = where(int(self.index_N[n]))
        num_bytes = int(self.num_bytes_N[n])
        picture = f"picture {self.index_N[n]}, {num_bytes} bytes at {address}"
        mend = f"see to the disk, {verify_hint(set_path)}, and resume"
        try:
            content = os.pread(file, num_bytes, address)
        except OSError as error:
            raise OSError(error.errno, f"{path}: {picture}: {error.strerror}; {mend}") from error
        if len(content) < num_bytes:
            raise OSError(f"{path} was cut short while it was read: {picture}; {mend}")
        self.data_C[self.start_N[n] :][:num_bytes] = np.frombuffer(content, np.uint8)
