"""The protocol of a decoder, which turns encoded images and crop boxes into uint8 views.

A decoder draws no random numbers. Order, boxes, replacement of bad images and mixing are the same for all
decoders. The loader decodes in parallel by calling the methods of one decoder from several threads at once.

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
    """Name of the backend. It is part of the loader's state, because the views of two decoders may differ by
    a grey level."""

    def crop(
        self, encoded: Encoded, boxes_NV5: NDArray[np.int32], out_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Decode each image once and write its crops.

        Args:
            encoded: the images.
            boxes_NV5: crop boxes of :func:`pipelines.augment.draws.draw_boxes`.
            out_NVSS3: receives the crops; undefined for images that cannot be decoded.

        Returns:
            (N,) True for the images that could be decoded.
        """


@runtime_checkable
class DeviceDecoder(Decoder, Protocol):
    """A decoder that can also write the crops to the memory of a GPU, without a copy through the host."""

    def crop_on_device(
        self, encoded: Encoded, boxes_NV5: NDArray[np.int32], out_NVSS3: Tensor
    ) -> NDArray[np.bool_]:
        """Like ``crop``, but writes to a tensor on the device; returns after the crops are written."""
