"""The pictures of a set of shards, to make another set of them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset_tools.dali_index import split_name
from dataset_tools.keys import decode_key
from dataset_tools.shard_set import PLAN_KEY
from dataset_tools.sources import ListedSource, Sample
from dataset_tools.tar_members import scan_tar
from pipelines.sets.folder import PassedOver
from pipelines.sets.manifest import verify_hint
from pipelines.sets.shards import open_shards, pictures_on_disk


class ShardSource(ListedSource):
    """Picture i is picture i of the set's index.

    In a set that was converted, paths are those of its source, but end in .jpg; in others they are the
    member's name after that of its shard.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        accept_truncated: bool = False,
        progress: Callable[[], None] | None = None,
    ) -> None:
        """Open the set and read the names in its tars. ``progress`` is called once a shard.

        ``accept_truncated`` passes over damage behind the pictures of a tar, and counts it.

        Raises as ``open_shards`` does, and ValueError where the tars are not what the index says.
        """
        self._set = open_shards(path)
        rows_by_shard = pictures_on_disk(self._set.shards, self._set.index)
        labels = self._set.index["label"].astype(np.int64)
        passed_over = PassedOver()
        on_damage = passed_over.count_damage if accept_truncated else None
        names = self._names(rows_by_shard, on_damage, progress)
        super().__init__(Path(path), self._set.manifest.classes, labels, names, passed_over)
        # Names are kept as they lie on the disk; picture i is the place_N[i]-th there.
        self._place_N = np.empty(len(labels), np.int64)
        self._place_N[np.concatenate(rows_by_shard)] = np.arange(len(labels))

    def path(self, index: int) -> str:
        """Return the name of picture ``index``."""
        return super().path(int(self._place_N[index]))

    def fingerprint(self) -> str:
        """Return the hash of the whole set."""
        return self._set.manifest.sha256

    def read(self, index: int) -> Sample:
        """Read picture ``index``. Raises OSError where its tar ends before."""
        return Sample(self._set.payload(index).tobytes(), self.label(index), self.path(index))

    def _names(
        self,
        rows_by_shard: list[NDArray[np.int64]],
        on_damage: Callable[[str], None] | None,
        progress: Callable[[], None] | None,
    ) -> Iterator[tuple[str, list[str]]]:
        """Yield what goes before the names of each shard's pictures, and the names."""
        converted = PLAN_KEY in self._set.manifest.settings
        for number, rows in enumerate(rows_by_shard):
            tar = self._set.tar_path(number)
            by_offset = {member.offset: member.name for member in scan_tar(tar, on_damage)}
            offsets = self._set.index["offset"][rows].tolist()
            if not by_offset.keys() >= set(offsets):
                raise ValueError(
                    f"the pictures of {tar} do not lie where the index says; {verify_hint(self._set.path)}"
                )
            names = [by_offset[offset] for offset in offsets]
            if converted:
                yield "", [decode_key(split_name(name)[0]) + ".jpg" for name in names]
            else:
                yield f"{tar.name}/", names
            if progress is not None:
                progress()
