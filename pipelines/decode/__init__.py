"""What a decoder does: encoded images and crop boxes in, uint8 views out. All else is common to all.

A decoder draws nothing and decides nothing. Its methods may be called from several threads at once: the
loader's parallelism is to call them so.

Shape letters: N images of a call, V views, S side in pixels.
"""

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.sets import Encoded


class Decoder(Protocol):
    """Decodes and crops on the CPU."""

    name: str
    """The backend's name. Part of the loader's state, because decoders differ in the last grey level."""

    def crop(
        self, encoded: Encoded, boxes_NV5: NDArray[np.int32], out_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Decode each image once and write its crops.

        Args:
            encoded: the images.
            boxes_NV5: crop boxes of :func:`pipelines.augment.draws.draw_boxes`.
            out_NVSS3: becomes the views; undefined for images that cannot be decoded.

        Returns:
            (N,) which images could be decoded.
        """


@runtime_checkable
class DeviceDecoder(Decoder, Protocol):
    """Can also leave the crops on a device, without a copy through the host."""

    def crop_on_device(
        self, encoded: Encoded, boxes_NV5: NDArray[np.int32], out_NVSS3: Tensor
    ) -> NDArray[np.bool_]:
        """Like ``crop``, into a tensor on the device; returns when the views are written."""
