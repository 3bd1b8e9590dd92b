"""The ``ffcv`` backend: each picture decoded once on the CPU, every view cut out of that by our own kernels.

It is named after FFCV, whose format ``.beton`` files have (FFCV's own loader reads those of the jpeg and raw
tiers); FFCV itself is not needed. FFCV's loader keeps Python objects for every picture, decodes once for each
view, draws its own randomness and cannot resume in the middle of an epoch; so pictures are decoded and
cropped by :mod:`pipelines.kernels.jpeg_crops`, from ``.beton`` files and shards. libturbojpeg is asked for
its accurate transform (FFCV's own decoder takes the fast one, off by up to 8 grey levels).

Shape letters: N pictures, V views, S side in pixels.
"""

import numpy as np
from numpy.typing import NDArray

from pipelines.decode.payloads import Payloads
from pipelines.kernels.jpeg_crops import NO_DECODER, crop_pictures
from pipelines.kernels.turbojpeg import functions
from pipelines.sets.stores import Store, StoreEngine


class FFCVEngine(StoreEngine):
    """Views from a compiled set by libturbojpeg and the kernels of :mod:`pipelines.kernels.jpeg_crops`."""

    name = "ffcv"

    def __init__(self, store: Store) -> None:
        """Find the decoder.

        Raises:
            ImportError: if libturbojpeg is missing.
        """
        super().__init__(store)
        functions()

    def crop(
        self, fetched: Payloads, boxes_NV5: NDArray[np.int32], out_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Decode each picture once and write its crops; see :class:`pipelines.decode.decoder.Engine`."""
        status_N = np.empty(len(fetched.index_N), np.int64)
        crop_pictures(
            functions(),
            fetched.data_C,
            fetched.start_N,
            fetched.num_bytes_N,
            fetched.mode_N,
            fetched.size_N2,
            boxes_NV5,
            out_NVSS3,
            status_N,
        )
        if (status_N == NO_DECODER).any():
            raise MemoryError("TurboJPEG gave no decoder")
        ok_N: NDArray[np.bool_] = status_N == 0
        for n in np.flatnonzero(~ok_N):
            ok_N[n] = self.second_opinion(int(fetched.index_N[n]), boxes_NV5[n], out_NVSS3[n])
        return ok_N
