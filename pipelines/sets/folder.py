"""The ``folder`` backend: pictures straight from a folder through PIL and torchvision.

The reference that every other backend is held against, and the way to start without converting anything.
Class folders become labels; a flat folder has none. Nothing is kept per picture but its name. What PIL reads
is taken for whole: a JPEG damaged inside its coded data gives pixels without a word; converting finds it out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torchvision.transforms.functional import InterpolationMode, hflip, resized_crop

from pipelines.decode.pillow import read_rgb, read_size
from pipelines.sets.listing import FolderListing


@dataclass(frozen=True)
class _Files:
    """The contents of some files; see :class:`pipelines.decode.decoder.Fetched`."""

    index_N: NDArray[np.int64]
    size_N2: NDArray[np.int64]
    contents: list[bytes]


class FolderEngine:
    """Views from picture files by PIL's decoder and torchvision's ``resized_crop``."""

    name = "folder"
    reads_ahead = True

    def __init__(self, path: Path) -> None:
        """List the folder.

        Raises:
            ValueError: if there is no such folder or it holds no pictures.
        """
        self._listing = FolderListing(path)
        self.count, self.classes = len(self._listing), self._listing.classes
        self.fingerprint = self._listing.fingerprint()

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where the folder has no classes."""
        return self._listing.labels(index_N)

    def picture_name(self, index: int) -> str:
        """The file's path below the folder."""
        return self._listing.path(index)

    def names(self) -> Iterator[str]:
        """The files' paths below the folder, in order."""
        return map(self._listing.path, range(self.count))

    def picture(self, index: int) -> NDArray[np.uint8] | None:
        """(H, W, 3) the whole picture, upright; None where it cannot be decoded."""
        image = read_rgb(self._contents(index))
        return None if image is None else np.asarray(image)

    def _contents(self, index: int) -> bytes:
        """The file's bytes; none where it is gone or forbidden, which is a picture that cannot be decoded."""
        try:
            return (self._listing.root / self._listing.path(index)).read_bytes()
        except (FileNotFoundError, PermissionError):
            return b""

    def fetch(self, index_N: NDArray[np.int64]) -> _Files:
        """Read the files."""
        contents = [self._contents(index) for index in index_N.tolist()]
        sizes = [read_size(content) or (1, 1) for content in contents]
        return _Files(index_N, np.array(sizes, np.int64).reshape(-1, 2), contents)

    def crop(
        self, fetched: _Files, boxes_NV5: NDArray[np.int32], out_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Decode each picture once and write its crops; see :class:`pipelines.decode.decoder.Engine`."""
        sound = map(self._crop, fetched.contents, boxes_NV5, out_NVSS3)
        return np.fromiter(sound, np.bool_, len(fetched.contents))

    def _crop(self, content: bytes, boxes_V5: NDArray[np.int32], out_VSS3: NDArray[np.uint8]) -> bool:
        image = read_rgb(content)
        if image is None:
            return False
        size = list(out_VSS3.shape[1:3])
        for box, out_SS3 in zip(boxes_V5, out_VSS3, strict=True):
            top, left, height, width, mirrored = (int(x) for x in box)
            view = resized_crop(image, top, left, height, width, size, InterpolationMode.BILINEAR)
            out_SS3[...] = hflip(view) if mirrored else view
        return True
