"""The ``folder`` backend: pictures straight from a folder through PIL and torchvision.

The reference that every other backend is held against, and the way to start without converting anything.
Class folders become labels; a flat folder has none. Nothing is kept per picture but its name.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms.functional import InterpolationMode, resized_crop

from pipelines.engines import DECODE_ERRORS
from pipelines.listing import FolderListing


def open_rgb(path: Path) -> Image.Image:
    """Decode a picture upright and in RGB."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


class FolderEngine:
    """Views from picture files by PIL's decoder and torchvision's ``resized_crop``."""

    name = "folder"

    def __init__(self, path: Path, num_views: int, crop_px: int, num_threads: int) -> None:
        """List the folder.

        Raises:
            ValueError: if there is no such folder or it holds no pictures.
        """
        del num_views  # the boxes tell
        self._listing = FolderListing(path)
        self.count, self.classes = len(self._listing), self._listing.classes
        self._crop_px = crop_px
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="folder")

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where the folder has no classes."""
        return self._listing.labels(index_N)

    def picture_name(self, index: int) -> str:
        """The file's path below the folder."""
        return self._listing.path(index)

    def picture(self, index: int) -> NDArray[np.uint8] | None:
        """(H, W, 3) the whole picture, upright; None where it cannot be decoded."""
        try:
            return np.asarray(open_rgb(self._listing.root / self._listing.path(index)))
        except DECODE_ERRORS:
            return None

    def sizes(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N, 2) heights and widths in pixels, read from the files' headers."""
        return np.array(list(self._pool.map(self._size, index_N.tolist())), np.int64)

    def _size(self, index: int) -> tuple[int, int]:
        try:
            with Image.open(self._listing.root / self._listing.path(index)) as image:
                turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                return (image.width, image.height) if turned else (image.height, image.width)
        except DECODE_ERRORS:
            return (1, 1)

    def crop(
        self, index_N: NDArray[np.int64], boxes_NV4: NDArray[np.int32], out_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Decode each picture once and write its crops; see :class:`pipelines.engines.Engine`."""
        return np.array(list(self._pool.map(self._crop, index_N.tolist(), boxes_NV4, out_NVSS3)), np.bool_)

    def _crop(self, index: int, boxes_V4: NDArray[np.int32], out_VSS3: NDArray[np.uint8]) -> bool:
        try:
            image = open_rgb(self._listing.root / self._listing.path(index))
        except DECODE_ERRORS:
            return False
        size = [self._crop_px, self._crop_px]
        for box, out_SS3 in zip(boxes_V4, out_VSS3, strict=True):
            top, left, height, width = (int(x) for x in box)
            out_SS3[...] = resized_crop(image, top, left, height, width, size, InterpolationMode.BILINEAR)
        return True
