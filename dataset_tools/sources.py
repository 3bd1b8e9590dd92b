"""Where pictures come from. A source knows how many there are and reads one by number, from any thread.

A new source needs the members of ``Source``; sets of a hundred million pictures must fit, so no Python
object per picture is kept. Sources in tars stand in ``tar_source`` and ``shard_source``; ``open_source``
chooses one by its path.
"""

import gzip
import hashlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipelines.sets.folder import FolderListing, PassedOver, PictureList

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture as its source holds it."""

    payload: bytes | npt.NDArray[np.uint8]
    """A whole encoded file, or (H, W, 3) uint8 RGB pixels."""
    label: int
    """Position in the source's classes, −1 without."""
    path: str
    """Where it lies within the source, for reports."""


class Source(Protocol):
    """A numbered collection of pictures."""

    @property
    def name(self) -> str:
        """A name for the manifest, free of machine paths."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order; empty for unlabelled pictures."""

    @property
    def passed_over(self) -> PassedOver:
        """What the source holds besides its pictures, or holds and cannot be read, counted."""

    def __len__(self) -> int: ...

    def path(self, index: int) -> str:
        """Return where picture ``index`` lies within the source, for reports."""

    def fingerprint(self) -> str:
        """Return what tells this source from another, by which a conversion knows that it may go on."""

    def read(self, index: int) -> Sample:
        """Read picture ``index``; called from several threads. Raises OSError where it cannot be read."""


class FolderSource(FolderListing):
    """Picture files, one folder a class or one flat folder, listed by FolderListing."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.resolve().name

    def read(self, index: int) -> Sample:
        """Read the file of picture ``index``."""
        path = self.path(index)
        return Sample((self.root / path).read_bytes(), self.label(index), path)


class ListedSource(PictureList):
    """Pictures whose paths are kept as a folder's are, but were found by other means."""

    def __init__(
        self,
        root: Path,
        classes: Sequence[str],
        labels: npt.NDArray[np.int64],
        paths: Iterable[tuple[str, Sequence[str]]],
        passed_over: PassedOver | None = None,
    ) -> None:
        """Keep (prefix, names) in the order given; ``labels`` has one number for every name."""
        super().__init__(root, classes, passed_over)
        for prefix, names in paths:
            self._add(prefix, names)
        self._close(labels)

    @property
    def name(self) -> str:
        """The name of the file or folder."""
        return self.root.resolve().name


class IdxSource:
    """Grey pictures of a pair of idx files (the MNIST format), plain or gzipped, as RGB pixels."""

    def __init__(
        self, images: str | Path, labels: str | Path, *, classes: Sequence[str] = FASHION_MNIST_CLASSES
    ) -> None:
        """Read both files. Raises ValueError, naming the file, where one is not idx or they do not match."""
        self._images = read_idx(images, num_dims=3)
        self._labels = read_idx(labels, num_dims=1)
        self._file, self._classes, self.passed_over = Path(images), tuple(classes), PassedOver()
        if len(self._images) != len(self._labels):
            raise ValueError(
                f"{images} holds {len(self._images)} pictures, {labels} {len(self._labels)} labels; "
                "give the two files of the same split"
            )
        if len(self._labels) and int(self._labels.max()) >= len(self._classes):
            raise ValueError(
                f"{labels} has the label {self._labels.max()}, but {len(self._classes)} classes are known; "
                "give the names of all classes"
            )

    @property
    def name(self) -> str:
        """The name of the file of pictures."""
        return self._file.name

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names given."""
        return self._classes

    def __len__(self) -> int:
        return len(self._images)

    def fingerprint(self) -> str:
        """Return a hash of all pictures and labels."""
        return hashlib.sha256(self._images.tobytes() + self._labels.tobytes()).hexdigest()

    def path(self, index: int) -> str:
        """Return ``file#index``."""
        return f"{self._file.name}#{index}"

    def read(self, index: int) -> Sample:
        """Return picture ``index`` as (H, W, 3) uint8, the grey value in all three channels."""
        grey = self._images[index]
        return Sample(np.repeat(grey[:, :, None], 3, axis=2), int(self._labels[index]), self.path(index))


def read_idx(path: str | Path, *, num_dims: int) -> npt.NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, gzipped where its name ends in .gz.

    Raises ValueError, naming the file, where the magic number, the number of dimensions or the size is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the idx file {path} does not exist")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); fetch it again") from error
    header = 4 + 4 * num_dims
    magic = bytes((0, 0, 8, num_dims))
    if len(content) < header or content[:4] != magic:
        raise ValueError(
            f"{path} starts with {content[:4].hex()}, an idx file of {num_dims} dimensions with {magic.hex()}"
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", num_dims, offset=4))
    wanted = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != wanted:
        raise ValueError(
            f"{path} has {len(content)} bytes, its header {shape} asks for {wanted}; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
