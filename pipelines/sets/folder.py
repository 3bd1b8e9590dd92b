"""Image files in folders: one folder per class, or one flat folder, always in the same order.

All file names are in one byte string, and the ends of the names in one array. So the names of a hundred
million images fit into memory.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.decode.pillow import read_size
from pipelines.sets import Encoded
from pipelines.sets.beton import MODE_JPEG

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Suffixes of image files, in lower case; upper case is accepted too."""
NO_LABEL = -1
_MAX_REASONS = 20
"""Number of reasons that are counted separately; further suffixes are counted together."""
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})


class PassedOver(Counter[str]):
    """Reason → number of files of a source that were skipped, or of places that cannot be read."""

    def count_file(self, name: str) -> None:
        """Count a file by the suffix of its name."""
        suffix = "hidden file" if name.startswith(".") else Path(name).suffix.lower() or "no suffix"
        known = f"ignored: {suffix}" in self or len(self) < _MAX_REASONS
        self[f"ignored: {suffix}" if known else "ignored: other suffixes"] += 1

    def count_damage(self, sentence: str) -> None:
        """Count a place after which a source cannot be read; ``sentence`` describes it."""
        self[f"damaged: {sentence}"] += 1


class ImageList:
    """Paths and labels of images, in order, without a Python object per image."""

    def __init__(
        self, root: Path, classes: Sequence[str] = (), passed_over: PassedOver | None = None
    ) -> None:
        """Start empty; ``classes`` are the names of the labels."""
        self.root = root
        self.passed_over = PassedOver() if passed_over is None else passed_over
        self._classes = tuple(classes)
        self._labels = np.zeros(0, np.int64)
        # The relative paths of all images in one byte string, and the position where each one ends.
        self._blob = bytearray()
        self._stops = np.zeros(0, np.uint64)
        self._stops_by_folder: list[NDArray[np.uint64]] = []

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the class folders; empty for a flat folder."""
        return self._classes

    def __len__(self) -> int:
        return len(self._stops)

    def path(self, index: int) -> str:
        """The path of image ``index`` relative to the root."""
        start = int(self._stops[index - 1]) if index else 0
        return os.fsdecode(bytes(self._blob[start : int(self._stops[index])]))

    def fingerprint(self) -> str:
        """A hash of all paths and labels."""
        hasher = hashlib.sha256(self._blob)
        hasher.update(np.ascontiguousarray(self._labels).data)
        return hasher.hexdigest()

    def label(self, index: int) -> int:
        """The class number of image ``index``, −1 without classes."""
        return int(self._labels[index])

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) class numbers, −1 without classes."""
        labels_N: NDArray[np.int64] = self._labels[index_N]
        return labels_N

    def _add(self, prefix: str, names: Sequence[str]) -> int:
        """Append the paths ``prefix + name``; return their number."""
        if not names:
            return 0
        encoded = [os.fsencode(prefix + name) for name in names]
        stops = np.cumsum([len(path) for path in encoded]).astype(np.uint64) + np.uint64(len(self._blob))
        self._stops_by_folder.append(stops)
        self._blob += b"".join(encoded)
        return len(names)

    def _set_labels(self, labels: NDArray[np.int64]) -> None:
        """Complete the list with one label for each path."""
        self._stops = np.concatenate([self._stops, *self._stops_by_folder])
        self._stops_by_folder.clear()
        assert len(labels) == len(self._stops)
        self._labels = labels


class FolderListing(ImageList):
    """Image files in folders: one folder per class, or one flat folder of unlabelled images.

    Classes are the sub-folders that contain images at any depth, sorted by name. Within a class, files are
    sorted by name, and the files of a folder come before those of its sub-folders. Names that start with a
    dot are ignored. Images both in the root and in its sub-folders are an error, because the images in the
    root have no label. Sub-folders that are all splits (train, val, …) are an error too. With
    ``labelled=False``, all images below ``root`` are one unlabelled set.
    """

    def __init__(self, root: str | Path, *, labelled: bool = True) -> None:
        """List the images in ``root``. Raises ValueError if there are none."""
        super().__init__(Path(root))
        if not self.root.is_dir():
            problem = "is a file, not a folder" if self.root.exists() else "does not exist"
            raise ValueError(
                f"the source folder {self.root} {problem}; give the folder that holds the images"
            )
        per_class = self._list_classes() if labelled else self._list_flat()
        labels = np.array([label for label, _ in per_class], np.int64)
        self._set_labels(np.repeat(labels, [count for _, count in per_class]))
        if not len(self._stops):
            raise ValueError(
                f"no images in {self.root}: looked for {' '.join(IMAGE_SUFFIXES)} there and in its "
                "sub-folders; give the parent of the class folders, or a flat folder of images"
            )

    def _list_flat(self) -> list[tuple[int, int]]:
        return [(NO_LABEL, self._walk(self.root, "", ()))]

    def _list_classes(self) -> list[tuple[int, int]]:
        """List the images of all classes; returns (label, count) of each class in order."""
        loose, folders = self._entries(self.root)
        loose_count = self._add("", loose)
        found = [(name, count) for name in folders if (count := self._walk(self.root / name, name + "/", ()))]
        if loose_count and found:
            raise ValueError(
                f"{self.root} holds {loose_count} images itself (first: {loose[0]}) and {len(found)} "
                f"sub-folders with images (first: {found[0][0]}); move the loose images into a class folder, "
                "or convert with --no-labels to make one unlabelled set of all"
            )
        if found and {name.lower() for name, _ in found} <= SPLIT_NAMES:
            names = ", ".join(name for name, _ in found)
            raise ValueError(
                f"the sub-folders of {self.root} are splits, not classes ({names}); give one of them, such "
                f"as {self.root / found[0][0]}, or convert with --no-labels to make one unlabelled set of all"
            )
        self._classes = tuple(name for name, _ in found)
        return (
            [(NO_LABEL, loose_count)] if loose_count else [(i, count) for i, (_, count) in enumerate(found)]
        )

    def _walk(self, folder: Path, prefix: str, parents: tuple[tuple[int, int], ...]) -> int:
        """Add all images below ``folder``; ``parents`` identify its parents, to stop at circular links."""
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in parents:
            return 0
        files, folders = self._entries(folder)
        count = self._add(prefix, files)
        return count + sum(self._walk(folder / f, f"{prefix}{f}/", (*parents, identity)) for f in folders)

    def _entries(self, folder: Path) -> tuple[list[str], list[str]]:
        """The sorted names of the images and of the sub-folders of ``folder``; other files are counted."""
        files, folders = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                hidden = entry.name.startswith(".")
                if entry.is_dir():
                    if not hidden:
                        folders.append(entry.name)
                elif not hidden and entry.name.lower().endswith(IMAGE_SUFFIXES):
                    files.append(entry.name)
                else:
                    self.passed_over.count_file(entry.name)
        return sorted(files), sorted(folders)


class FolderSet:
    """A folder of image files as a :class:`pipelines.sets.PictureSet`."""

    reads_ahead = True

    def __init__(self, path: Path) -> None:
        """List the folder. Raises ValueError if it does not exist or holds no images."""
        self._listing = FolderListing(path)
        self.path, self.count, self.classes = path, len(self._listing), self._listing.classes
        self.fingerprint = self._listing.fingerprint()

    def modes(self) -> tuple[int, ...]:
        """Image files are always encoded images."""
        return (MODE_JPEG,)

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where the folder has no classes."""
        return self._listing.labels(index_N)

    def name(self, index: int) -> str:
        """The file's path below the folder."""
        return self._listing.path(index)

    def names(self) -> Iterator[str]:
        """The files' paths below the folder, in order."""
        return map(self._listing.path, range(self.count))

    def fetch(self, index_N: NDArray[np.int64]) -> Encoded:
        """Read the files. A file that is missing or not readable counts as empty, which cannot be decoded."""
        contents = [self._read(index) for index in index_N.tolist()]
        size_N2 = np.array([read_size(content) or (1, 1) for content in contents], np.int64).reshape(-1, 2)
        num_bytes_N = np.array([len(content) for content in contents], np.int64)
        mode_N = np.full(len(index_N), MODE_JPEG, np.uint8)
        encoded = Encoded.empty(index_N, size_N2, mode_N, num_bytes_N)
        return encoded.fill([np.frombuffer(content, np.uint8) for content in contents])

    def _read(self, index: int) -> bytes:
        try:
            return (self.path / self._listing.path(index)).read_bytes()
        except (FileNotFoundError, PermissionError):
            return b""
