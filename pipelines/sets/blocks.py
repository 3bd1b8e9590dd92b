"""Long indices a part at a time, so that checks need memory for the part and not for the index."""

from collections.abc import Iterator

_BLOCK = 1 << 18
"""Entries of a part."""


def blocks(count: int) -> Iterator[slice]:
    """Yield slices that cover ``range(count)``."""
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))
