"""The batch that loaders return and models train on.

Shape letters: N images of the batch on this rank, S side in pixels.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Method = Literal["moco", "mixmask", "unmix", "both", "erase"]

NUM_MIXTURES: dict[Method, int] = {"moco": 0, "mixmask": 1, "unmix": 1, "both": 2, "erase": 1}
"""Number of mixtures in a batch, by method. In the loss, a mixture weighs as much as the clean views."""


@dataclass(frozen=True)
class Mixture:
    """Query views mixed with each other: ``images[i]`` has the share ``lam[i]`` of ``query[i]``.

    In ``Batch.key_mixtures``, read "key" for "query".
    """

    images: Tensor
    """(N, 3, S, S) of the dtype of the views, channels_last, on the training device."""
    partner: Tensor
    """(N,) int64: images[i] is made of query[i], the anchor, and query[partner[i]]. A permutation without
    fixed points. For method "erase", which mixes with no other image, partner[i] is i."""
    lam: Tensor
    """(N,) float32 in [0, 1]: the share of query[i] in images[i]."""


@dataclass(frozen=True)
class Batch:
    """Two augmented views of each image, and their mixtures."""

    query: Tensor
    """(N, 3, S, S) of the loader's dtype (float32 by default), normalised, channels_last."""
    key: Tensor
    """(N, 3, S, S), likewise. (0, 3, S, S) if the recipe has one view per image."""
    mixtures: tuple[Mixture, ...]
    """Mixtures of the query views, `NUM_MIXTURES` of them; for method "both", (unmix, mixmask)."""
    index: Tensor
    """(N,) int64, position in the compiled set."""
    label: Tensor
    """(N,) int64, −1 where the set has no labels."""
    key_mixtures: tuple[Mixture, ...] = ()
    """Mixtures of the key views: for a symmetric loss as many as of the query views, else none."""


def tensors_of(batch: Batch) -> list[Tensor]:
    """Every tensor of a batch, always in the same order."""
    mixtures = (*batch.mixtures, *batch.key_mixtures)
    mixed = [part for mixture in mixtures for part in (mixture.images, mixture.partner, mixture.lam)]
    return [batch.query, batch.key, batch.index, batch.label, *mixed]


@dataclass(frozen=True)
class Direction:
    """The views of a batch with their roles: which is the query and which is the key."""

    query: Tensor
    """(N, 3, S, S)."""
    key: Tensor
    """(N, 3, S, S)."""
    mixtures: tuple[Mixture, ...]
    """Mixtures of the query."""

    @property
    def branches(self) -> list[Tensor]:
        """(N, 3, S, S) inputs of the query encoder: the clean view, then its mixtures."""
        return [self.query, *(mixture.images for mixture in self.mixtures)]


def directions_of(batch: Batch, method: Method, *, symmetric: bool) -> list[Direction]:
    """The direction query → key of a batch; for a symmetric loss also key → query.

    Raises:
        ValueError: if the batch was made for another method.
    """
    num_mixtures = NUM_MIXTURES[method]
    for views, mixtures, num in (
        ("query", batch.mixtures, num_mixtures),
        ("key", batch.key_mixtures, num_mixtures if symmetric else 0),
    ):
        if len(mixtures) != num:
            raise ValueError(
                f"method {method!r} needs {num} mixtures of the {views} views, the batch has "
                f"{len(mixtures)}; build the loader with the model's method and symmetry"
            )
    if len(batch.query) != len(batch.key):
        raise ValueError(
            f"the batch has {len(batch.query)} query and {len(batch.key)} key views; use a recipe with "
            "num_views=2"
        )
    directions = [Direction(batch.query, batch.key, batch.mixtures)]
    if symmetric:
        directions.append(Direction(batch.key, batch.query, batch.key_mixtures))
    return directions
