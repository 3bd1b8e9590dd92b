"""Listing picture files: one folder a class, or one flat folder, in an order that is always the same.

Names are kept in one string and offsets in one array, so a hundred million pictures fit.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Compared in lower case."""
NO_LABEL = -1
_MOST_SUFFIXES = 20
"""Kinds of files passed over that are counted apart."""
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})


class PassedOver(Counter[str]):
    """Reason → how many files of a source are not listed as pictures, or what of it could not be read."""

    def count_file(self, name: str) -> None:
        """Count a file by the suffix of its name."""
        suffix = "hidden file" if name.startswith(".") else Path(name).suffix.lower() or "no suffix"
        known = f"ignored: {suffix}" in self or len(self) < _MOST_SUFFIXES
        self[f"ignored: {suffix}" if known else "ignored: other suffixes"] += 1

    def count_damage(self, sentence: str) -> None:
        """Keep the sentence on a place where a source could not be read on."""
        self[f"damaged: {sentence}"] += 1


class PictureList:
    """Names and labels of pictures, in order: no Python object is kept per picture."""

    def __init__(
        self, root: Path, classes: Sequence[str] = (), passed_over: PassedOver | None = None
    ) -> None:
        """Begin with none; ``classes`` are the names of the labels."""
        self.root = root
        self.passed_over = PassedOver() if passed_over is None else passed_over
        self._classes = tuple(classes)
        self._labels = np.zeros(0, np.int64)
        # The relative paths of all pictures in one string, and where each of them stops in it.
        self._blob = bytearray()
        self._stops = np.zeros(0, np.uint64)
        self._stops_by_folder: list[npt.NDArray[np.uint64]] = []

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the class folders; empty for a flat folder."""
        return self._classes

    def __len__(self) -> int:
        return len(self._stops)

    def path(self, index: int) -> str:
        """Return the path of picture ``index`` relative to the root."""
        start = int(self._stops[index - 1]) if index else 0
        return os.fsdecode(bytes(self._blob[start : int(self._stops[index])]))

    def fingerprint(self) -> str:
        """Return a hash of all paths and labels."""
        hasher = hashlib.sha256(self._blob)
        hasher.update(np.ascontiguousarray(self._labels).data)
        return hasher.hexdigest()

    def label(self, index: int) -> int:
        """Return the class number of picture ``index``, −1 without classes."""
        return int(self._labels[index])

    def labels(self, index_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(N,) class numbers of the pictures asked for, −1 without classes."""
        labels_N: npt.NDArray[np.int64] = self._labels[index_N]
        return labels_N

    def _add(self, prefix: str, names: Sequence[str]) -> int:
        """Append the paths ``prefix + name``; return how many."""
        if not names:
            return 0
        encoded = [os.fsencode(prefix + name) for name in names]
        stops = np.cumsum([len(path) for path in encoded]).astype(np.uint64) + np.uint64(len(self._blob))
        self._stops_by_folder.append(stops)
        self._blob += b"".join(encoded)
        return len(names)

    def _close(self, labels: npt.NDArray[np.int64]) -> None:
        """End the list: one label for each name that was added."""
        self._stops = np.concatenate([self._stops, *self._stops_by_folder])
        self._stops_by_folder.clear()
        assert len(labels) == len(self._stops)
        self._labels = labels


class FolderListing(PictureList):
    """Pictures in folders: one folder a class, or one flat folder of unlabelled pictures.

    Classes are the sub-folders that hold pictures at any depth, sorted by name; within a class files are
    sorted, those of a folder before those of its sub-folders. Names starting with a dot are passed over.
    Pictures both loose in ``root`` and in sub-folders are refused, as it cannot be told what the loose ones
    are; so are sub-folders that are splits (train, val, …). With ``labelled=False`` everything below
    ``root`` is taken as one unlabelled set.
    """

    def __init__(self, root: str | Path, *, labelled: bool = True) -> None:
        """List ``root``. Raises ValueError, naming it and the mend, where it holds no usable pictures."""
        super().__init__(Path(root))
        if not self.root.is_dir():
            what = "is a file, not a folder" if self.root.exists() else "does not exist"
            raise ValueError(f"the source folder {self.root} {what}; give the folder that holds the pictures")
        per_class = self._list_classes() if labelled else self._list_flat()
        labels = np.array([label for label, _ in per_class], np.int64)
        self._close(np.repeat(labels, [count for _, count in per_class]))
        if not len(self._stops):
            raise ValueError(
                f"no pictures in {self.root}: looked for {' '.join(PICTURE_SUFFIXES)} there and in its "
                "sub-folders; give the folder above the class folders, or a flat folder of pictures"
            )

    def _list_flat(self) -> list[tuple[int, int]]:
        return [(NO_LABEL, self._walk(self.root, "", ()))]

    def _list_classes(self) -> list[tuple[int, int]]:
        """Fill the list of files; return (label, count) of each class in order."""
        loose, folders = self._entries(self.root)
        loose_count = self._add("", loose)
        found = [(name, count) for name in folders if (count := self._walk(self.root / name, name + "/", ()))]
        if loose_count and found:
            raise ValueError(
                f"{self.root} holds {loose_count} pictures of its own (first: {loose[0]}) and {len(found)} "
                f"sub-folders with pictures (first: {found[0][0]}); move the loose ones into a class folder, "
                "or convert with --no-labels to take all of them as one unlabelled set"
            )
        if found and {name.lower() for name, _ in found} <= SPLIT_NAMES:
            names = ", ".join(name for name, _ in found)
            raise ValueError(
                f"the sub-folders of {self.root} are splits, not classes ({names}); give one of them, such "
                f"as {self.root / found[0][0]}, or convert with --no-labels to take all as one unlabelled set"
            )
        self._classes = tuple(name for name, _ in found)
        return (
            [(NO_LABEL, loose_count)] if loose_count else [(i, count) for i, (_, count) in enumerate(found)]
        )

    def _walk(self, folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> int:
        """Add all pictures below ``folder``; ``above`` are the folders on the way, against circular links."""
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return 0
        files, folders = self._entries(folder)
        count = self._add(prefix, files)
        return count + sum(self._walk(folder / f, f"{prefix}{f}/", (*above, identity)) for f in folders)

    def _entries(self, folder: Path) -> tuple[list[str], list[str]]:
        """Return the sorted names of the pictures and of the sub-folders of ``folder``; count other files."""
        files, folders = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                hidden = entry.name.startswith(".")
                if entry.is_dir():
                    if not hidden:
                        folders.append(entry.name)
                elif not hidden and entry.name.lower().endswith(PICTURE_SUFFIXES):
                    files.append(entry.name)
                else:
                    self.passed_over.count_file(entry.name)
        return sorted(files), sorted(folders)
