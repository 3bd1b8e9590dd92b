"""What every loader hands over, whatever its backend.

Shape letters: N batch, S side in pixels.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Views mixed with each other: image i keeps the share ``lam[i]`` of ``query[i]``.

    Of a batch's ``key_mixtures``, ``key`` stands for ``query``.
    """

    images: Tensor
    """(N, 3, S, S) of the loader's dtype, channels_last, on the training device."""
    partner: Tensor
    """(N,) int64: images[i] is made of query[i] and query[partner[i]]. A permutation without fixed
    points, but for erased views, in which nobody else is mixed: there partner[i] is i."""
    lam: Tensor
    """(N,) float32 in [0, 1]: the share of query[i] in images[i]."""


@dataclass(frozen=True)
class Batch:
    """Two augmented views of each picture, and their mixtures."""

    query: Tensor
    """(N, 3, S, S) of the loader's dtype (float32 if none was given), normalised, channels_last."""
    key: Tensor
    """(N, 3, S, S), likewise. Of zero rows where the recipe asks for one view."""
    mixtures: tuple[Mixture, ...]
    """none: (); mixmask, unmix, erase: one; both: (unmix, mixmask)."""
    index: Tensor
    """(N,) int64, position in the compiled set."""
    label: Tensor
    """(N,) int64, −1 where the set has no labels."""
    key_mixtures: tuple[Mixture, ...] = ()
    """Mixtures of the key views, as many as of the query views; only for a symmetric loss."""


def tensors_of(batch: Batch) -> list[Tensor]:
    """Every tensor of a batch."""
    mixtures = (*batch.mixtures, *batch.key_mixtures)
    mixed = [part for mixture in mixtures for part in (mixture.images, mixture.partner, mixture.lam)]
    return [batch.query, batch.key, batch.index, batch.label, *mixed]
