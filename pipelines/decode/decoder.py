"""What a backend must do: turn indices and crop boxes into uint8 views. Everything else is common.

Shape letters: N pictures of a call, V views, S side in pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Reading = Literal["auto", "map", "read", "stream"]
"""map: pages of a .beton file are touched where they are needed, and the system keeps what fits; read: every
picture is read into the process's own memory ahead of its turn, for sets larger than memory; stream: DALI's
reader goes through shards from end to end and shuffles within a buffer, for sets on disks that are slow to
seek, with an order of its own (see :mod:`pipelines.sets.stream`); auto: map a .beton file, but read it where
it is larger than three quarters of the memory, and read shards."""

MAX_TRIES = 16
"""How many neighbours are tried before a run of undecodable pictures is an error."""


class BadPicturesError(ValueError):
    """Too many pictures of a set cannot be decoded."""


class Fetched(Protocol):
    """Some pictures, encoded, within reach of the decoder."""

    index_N: NDArray[np.int64]
    """(N,) their positions in the set."""
    size_N2: NDArray[np.int64]
    """(N, 2) heights and widths in pixels; (1, 1) for a picture whose header cannot be read."""


class Engine(Protocol):
    """A backend: encoded pictures in, uint8 crops out. Draws nothing and decides nothing.

    All methods may be called from several threads at once; the loader's parallelism is calling them so.
    """

    name: str
    count: int
    classes: tuple[str, ...]
    fingerprint: str
    """What tells this set from another of the same size, for the loader's state."""
    reads_ahead: bool
    """Whether ``fetch`` waits for a disk, so that the loader should call it early and on other threads."""

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where the set has none."""

    def fetch(self, index_N: NDArray[np.int64]) -> Any:
        """Get hold of the encoded pictures; returns a :class:`Fetched` for ``crop``."""

    def crop(
        self, fetched: Any, boxes_NV5: NDArray[np.int32], out_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Decode each picture once, write its crops into ``out_NVSS3``; boxes as in `augment.draws`.

        Returns:
            (N,) which pictures could be decoded; the crops of the others are left undefined.
        """

    def picture(self, index: int) -> NDArray[np.uint8] | None:
        """(H, W, 3) the whole picture, for previews; None where it cannot be decoded."""

    def picture_name(self, index: int) -> str:
        """Where picture ``index`` came from, for messages."""

    def names(self) -> Iterator[str]:
        """Where each picture came from, in order. Raises ValueError where that is not recorded."""


class DeviceEngine(Engine, Protocol):
    """A backend that can also leave crops on the training device, without a copy through the host."""

    def crop_on_device(
        self, fetched: Any, boxes_NV5: NDArray[np.int32], out_NVSS3: Tensor
    ) -> NDArray[np.bool_]:
        """Like ``crop``, into a tensor on the device; returns when it is written."""


@dataclass(frozen=True)
class Fault:
    """A picture that could not be decoded, and the neighbour that stood in for it."""

    index: int
    name: str
    replaced_by: int
