"""The ``ffcv`` backend: decodes each image once on the CPU and cuts all its views from the result.

The backend is named after FFCV because it reads FFCV's file format, ``.beton``. It does not use the FFCV
package. FFCV's own loader keeps Python objects for every image, decodes an image once per view, draws its own
random numbers and cannot resume within an epoch. (It can read our files of the tiers jpeg and raw.) Here
libturbojpeg decodes and :mod:`pipelines.kernels.jpeg_crops` crops. libturbojpeg is set to its accurate
inverse DCT; FFCV's decoder uses the fast one, which is off by up to 8 grey levels.

Shape letters: N images, V views, S side in pixels.
"""

import numpy as np
from numpy.typing import NDArray

from pipelines.decode.jpeg import check_jpeg
from pipelines.decode.pillow import decode_image, is_jpeg
from pipelines.kernels.jpeg_crops import NO_DECODER, crop_images
from pipelines.kernels.resample import crop_image
from pipelines.kernels.turbojpeg import functions
from pipelines.sets import Encoded


class TurboDecoder:
    """Decodes with libturbojpeg, crops with our own kernels; see :class:`pipelines.decode.Decoder`."""

    name = "ffcv"

    def __init__(self) -> None:
        """Load libturbojpeg. Raises ImportError if it is missing."""
        functions()

    def crop(
        self, encoded: Encoded, boxes_NV5: NDArray[np.int32], out_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Decode each image once and write its crops; returns which images could be decoded."""
        status_N = np.empty(len(encoded.index_N), np.int64)
        crop_images(
            functions(),
            encoded.data_C,
            encoded.start_N,
            encoded.num_bytes_N,
            encoded.mode_N,
            encoded.size_N2,
            boxes_NV5,
            out_NVSS3,
            status_N,
        )
        if (status_N == NO_DECODER).any():
            raise MemoryError("libturbojpeg has no memory for a decoder")
        ok_N: NDArray[np.bool_] = status_N == 0
        for n in np.flatnonzero(~ok_N):
            ok_N[n] = _retry_with_pil(encoded.part(slice(n, n + 1)), boxes_NV5[n], out_NVSS3[n])
        return ok_N


def _retry_with_pil(image: Encoded, boxes_V5: NDArray[np.int32], out_VSS3: NDArray[np.uint8]) -> bool:
    """Crop one image that the kernels could not decode; False if pixels are missing or PIL cannot read it."""
    (data_C,) = image
    if is_jpeg(data_C) and check_jpeg(data_C).state == "damaged":
        return False
    pixels_HW3 = decode_image(image)
    if pixels_HW3 is None or pixels_HW3.shape[:2] != tuple(image.size_N2[0]):
        return False
    crop_image(pixels_HW3, boxes_V5, out_VSS3)
    return True
