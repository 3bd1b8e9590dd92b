"""What a backend must do: turn indices and crop boxes into uint8 views. Everything else is common.

Shape letters: N batch, V views, S side in pixels.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MAX_TRIES = 16
"""How many neighbours are tried before a run of undecodable pictures is an error."""


class BadPicturesError(ValueError):
    """Too many pictures of a set cannot be decoded."""


class Engine(Protocol):
    """A backend: encoded pictures in, uint8 crops out. Draws nothing and decides nothing."""

    name: str
    count: int
    classes: tuple[str, ...]

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where the set has none."""

    def sizes(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N, 2) heights and widths in pixels; (1, 1) for a picture whose header cannot be read."""

    def crop(
        self, index_N: NDArray[np.int64], boxes_NV4: NDArray[np.int32], out_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Decode each picture once, write its crops into ``out_NVSS3``.

        Returns:
            (N,) which pictures could be decoded; the crops of the others are left undefined.
        """

    def picture(self, index: int) -> NDArray[np.uint8] | None:
        """(H, W, 3) the whole picture, for previews; None where it cannot be decoded."""

    def picture_name(self, index: int) -> str:
        """Where picture ``index`` came from, for messages."""


@dataclass(frozen=True)
class Fault:
    """A picture that could not be decoded, and the neighbour that stood in for it."""

    index: int
    name: str
    replaced_by: int
