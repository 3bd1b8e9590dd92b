"""Memory for batches that is used again once nobody holds the batch.

A batch of floats at 224 px has 77 MB. Fresh from the system, each of its pages would be cleared before it is
filled, which costs as much as decoding a tenth of the pictures.
"""

import weakref

import torch
from torch import Tensor


class Lender:
    """Hands out tensors of one shape; a tensor's memory comes back by itself when its last view is gone."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> None:
        """Nothing is taken yet. ``pinned`` memory can be copied to a GPU while the host goes on."""
        self._shape, self._dtype, self._pinned = shape, dtype, pinned
        self._free: list[Tensor] = []

    def take(self) -> Tensor:
        """Memory with undefined contents. May be called from any thread."""
        try:
            block = self._free.pop()
        except IndexError:
            block = torch.empty(self._shape, dtype=self._dtype, pin_memory=self._pinned)
        # All views of the lent tensor share its storage, and that holds this array; the block outlives both.
        lent = block.numpy()
        weakref.finalize(lent, self._free.append, block).atexit = False
        return torch.from_numpy(lent)
