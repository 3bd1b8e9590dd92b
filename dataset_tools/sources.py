"""Where images come from. A source has a number of images and reads one by its index, from any thread.

A new source needs the members of ``Source``. Sets of a hundred million images must fit into memory, so a
source keeps no Python object per image. ``tar_source`` reads tars; ``commands.open_source`` chooses a
source by its path.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dataset_tools.shard_plan import PLAN_KEY
from dataset_tools.shard_writer import decode_key
from dataset_tools.tars import scan_tar, split_name
from pipelines.sets.folder import FolderListing, ImageList, PassedOver
from pipelines.sets.manifest import verify_hint
from pipelines.sets.shards import open_shards, positions_by_shard


@dataclass(frozen=True, slots=True)
class Sample:
    """One image as its source holds it."""

    payload: bytes | npt.NDArray[np.uint8]
    """A complete encoded file, or (H, W, 3) uint8 RGB pixels."""
    label: int
    """Position in the source's classes; −1 without classes."""
    path: str
    """Path within the source, for reports."""


class Source(Protocol):
    """A numbered collection of images."""

    @property
    def name(self) -> str:
        """A name for the manifest, without the path on this machine."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order; empty for unlabelled images."""

    @property
    def passed_over(self) -> PassedOver:
        """Counts of files that are not images, and of what cannot be read."""

    def __len__(self) -> int: ...

    def path(self, index: int) -> str:
        """Return the path of image ``index`` within the source, for reports."""

    def fingerprint(self) -> str:
        """Return a hash that identifies the source, so that a stopped conversion can be continued."""

    def read(self, index: int) -> Sample:
        """Read image ``index``; called from several threads. Raises OSError if it cannot be read."""


class FolderSource(FolderListing):
    """Image files in class folders or in one flat folder; see FolderListing."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.root.resolve().name

    def read(self, index: int) -> Sample:
        """Read the file of image ``index``."""
        path = self.path(index)
        return Sample((self.root / path).read_bytes(), self.label(index), path)


class ListedSource(ImageList):
    """Base of sources that list their images themselves."""

    def __init__(
        self,
        root: Path,
        classes: Sequence[str],
        labels: npt.NDArray[np.int64],
        paths: Iterable[tuple[str, Sequence[str]]],
        passed_over: PassedOver | None = None,
    ) -> None:
        """Store the paths and labels.

        Args:
            root: the file or folder.
            classes: class names in label order.
            labels: (N,) class numbers.
            paths: (prefix, names) in order; an image's path is ``prefix + name``, N in all.
            passed_over: counts of what is not listed.
        """
        super().__init__(root, classes, passed_over)
        for prefix, names in paths:
            self._add(prefix, names)
        self._set_labels(labels)

    @property
    def name(self) -> str:
        """Name of the file or folder."""
        return self.root.resolve().name


class ShardSource(ListedSource):
    """The images of a set of shards, in the order of its index.

    In a set that was converted, the paths are those of the original source with the suffix .jpg. In other
    sets, a path is the name of the shard and the name of the member.
    """

    def __init__(
        self, path: str | Path, *, accept_truncated: bool = False, progress: Callable[[], None] | None = None
    ) -> None:
        """Open the set and read the names in its tars.

        Args:
            path: folder of the set.
            accept_truncated: count damage after the images of a tar instead of raising an error.
            progress: called once per shard.

        Raises:
            ValueError: if the tars do not match the index; also as ``open_shards`` does.
            FileNotFoundError: as ``open_shards`` does.
        """
        self._set = open_shards(path)
        rows_by_shard = positions_by_shard(self._set.shards, self._set.index)
        labels = self._set.index["label"].astype(np.int64)
        passed_over = PassedOver()
        on_damage = passed_over.count_damage if accept_truncated else None
        names = self._names(rows_by_shard, on_damage, progress)
        super().__init__(Path(path), self._set.manifest.classes, labels, names, passed_over)
        # The names are in the order of the tars, where image i has the place place_N[i].
        self._place_N = np.empty(len(labels), np.int64)
        self._place_N[np.concatenate(rows_by_shard)] = np.arange(len(labels))

    def path(self, index: int) -> str:
        """Return the name of image ``index``."""
        return super().path(int(self._place_N[index]))

    def fingerprint(self) -> str:
        """Return the hash of the set."""
        return self._set.manifest.sha256

    def read(self, index: int) -> Sample:
        """Read image ``index``. Raises OSError if its tar ends before the end of the image."""
        return Sample(self._set.payload(index).tobytes(), self.label(index), self.path(index))

    def _names(
        self,
        rows_by_shard: list[npt.NDArray[np.int64]],
        on_damage: Callable[[str], None] | None,
        progress: Callable[[], None] | None,
    ) -> Iterator[tuple[str, list[str]]]:
        """Yield (prefix, names) for the images of each shard."""
        converted = PLAN_KEY in self._set.manifest.settings
        for number, rows in enumerate(rows_by_shard):
            tar = self._set.tar_path(number)
            by_offset = {member.offset: member.name for member in scan_tar(tar, on_damage)}
            offsets = self._set.index["offset"][rows].tolist()
            if not by_offset.keys() >= set(offsets):
                raise ValueError(
                    f"the images of {tar} are not where the index says; {verify_hint(self._set.path)}"
                )
            names = [by_offset[offset] for offset in offsets]
            if converted:
                yield "", [decode_key(split_name(name)[0]) + ".jpg" for name in names]
            else:
                yield f"{tar.name}/", names
            if progress is not None:
                progress()
