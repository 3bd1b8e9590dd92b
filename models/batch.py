"""What the model reads of a batch, and who is query and who is key in it.

Shape letters: N batch on this rank, S side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Method = Literal["moco", "mixmask", "unmix", "both", "erase"]

NUM_MIXTURES: dict[Method, int] = {"moco": 0, "mixmask": 1, "unmix": 1, "both": 2, "erase": 1}
"""Mixtures a batch must bring for each method. Each weighs as much as the clean term."""


class MixtureLike(Protocol):
    """What the model reads of a mixture."""

    @property
    def images(self) -> Tensor:
        """(N, 3, S, S) mixed or erased query views."""

    @property
    def partner(self) -> Tensor:
        """(N,) int64, whose pixels fill each view."""

    @property
    def lam(self) -> Tensor:
        """(N,) float32, share of the anchor's own pixels."""


class BatchLike(Protocol):
    """What the model reads of a batch."""

    @property
    def query(self) -> Tensor:
        """(N, 3, S, S)."""

    @property
    def key(self) -> Tensor:
        """(N, 3, S, S)."""

    @property
    def mixtures(self) -> Sequence[MixtureLike]:
        """Of the query views, as many as `NUM_MIXTURES` says."""

    @property
    def key_mixtures(self) -> Sequence[MixtureLike]:
        """Of the key views: as many again for a symmetric loss, else none."""


@dataclass(frozen=True)
class Direction:
    """One view in the role of the query, the other in that of the key."""

    query: Tensor
    key: Tensor
    mixtures: Sequence[MixtureLike]

    @property
    def branches(self) -> list[Tensor]:
        """(N, 3, S, S) images the query encoder is to see: the clean view and its mixtures."""
        return [self.query, *(mixture.images for mixture in self.mixtures)]


def directions_of(batch: BatchLike, method: Method, *, symmetric: bool) -> list[Direction]:
    """Query to key, and for a symmetric loss the other way as well.

    Raises ValueError for a batch that was made for another method.
    """
    wanted = NUM_MIXTURES[method]
    for views, mixtures, num in (
        ("query", batch.mixtures, wanted),
        ("key", batch.key_mixtures, wanted if symmetric else 0),
    ):
        if len(mixtures) != num:
            raise ValueError(
                f"method {method!r} takes {num} mixtures of the {views} views, the batch brings "
                f"{len(mixtures)}; build the loader with the same method, symmetric or not, as the model"
            )
    if len(batch.query) != len(batch.key):
        raise ValueError(
            f"the batch has {len(batch.query)} query and {len(batch.key)} key views; take a recipe of two"
        )
    directions = [Direction(batch.query, batch.key, batch.mixtures)]
    if symmetric:
        directions.append(Direction(batch.key, batch.query, batch.key_mixtures))
    return directions
