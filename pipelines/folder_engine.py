"""The ``folder`` backend: pictures straight from a folder through PIL and torchvision.

The reference that every other backend is held against, and the way to start without converting anything.
Class folders become labels; a flat folder has none. Nothing is kept per picture but its name. What PIL reads
is taken for whole: a JPEG damaged inside its coded data gives pixels without a word; converting finds it out.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torchvision.transforms.functional import InterpolationMode, resized_crop

from pipelines.listing import FolderListing
from pipelines.pictures import read_rgb, read_size


class FolderEngine:
    """Views from picture files by PIL's decoder and torchvision's ``resized_crop``."""

    name = "folder"

    def __init__(self, path: Path, num_threads: int) -> None:
        """List the folder.

        Raises:
            ValueError: if there is no such folder or it holds no pictures.
        """
        self._listing = FolderListing(path)
        self.count, self.classes = len(self._listing), self._listing.classes
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="folder")

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where the folder has no classes."""
        return self._listing.labels(index_N)

    def picture_name(self, index: int) -> str:
        """The file's path below the folder."""
        return self._listing.path(index)

    def picture(self, index: int) -> NDArray[np.uint8] | None:
        """(H, W, 3) the whole picture, upright; None where it cannot be decoded."""
        image = read_rgb(self._file(index))
        return None if image is None else np.asarray(image)

    def _file(self, index: int) -> Path:
        return self._listing.root / self._listing.path(index)

    def sizes(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N, 2) heights and widths in pixels, read from the files' headers."""
        return np.array(list(self._pool.map(self._size, index_N.tolist())), np.int64)

    def _size(self, index: int) -> tuple[int, int]:
        return read_size(self._file(index)) or (1, 1)

    def crop(
        self, index_N: NDArray[np.int64], boxes_NV4: NDArray[np.int32], out_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Decode each picture once and write its crops; see :class:`pipelines.engines.Engine`."""
        return np.array(list(self._pool.map(self._crop, index_N.tolist(), boxes_NV4, out_NVSS3)), np.bool_)

    def _crop(self, index: int, boxes_V4: NDArray[np.int32], out_VSS3: NDArray[np.uint8]) -> bool:
        image = read_rgb(self._file(index))
        if image is None:
            return False
        size = list(out_VSS3.shape[1:3])
        for box, out_SS3 in zip(boxes_V4, out_VSS3, strict=True):
            top, left, height, width = (int(x) for x in box)
            out_SS3[...] = resized_crop(image, top, left, height, width, size, InterpolationMode.BILINEAR)
        return True
