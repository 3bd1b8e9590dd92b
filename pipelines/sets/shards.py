"""A set of WebDataset shards: tar files, their DALI index files, and one index of all images.

    images.shards/
        set.json       the manifest: classes, settings, and count, size and hash of each shard
        index.npy      (N,) records of INDEX_DTYPE: position, label and size of image i
        000000.tar     images and labels
        000000.idx     index of 000000.tar for DALI's reader, in the text format of its wds2idx:
                       v1.2, or v1.1 without names if a name has white space

In a set that was compiled by ``dataset_tools``, image i is the i-th image of the source, although the shards
contain the images in random order. So an image has the same index, and thus the same views, as in a
``.beton`` file of the same source. In existing shards that were only indexed, image i is the i-th image on
the disk.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.sets.manifest import Manifest, Shard, blocks, manifest_path, verify_hint

INDEX_NAME = "index.npy"
PENDING_INDEX_NAME = "index.npy.next"
"""The new index of a set, until it replaces the old one."""
PLAN_NAME = "convert.json"
"""The plan of a conversion; deleted once the set is complete."""
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the image's first byte in its tar
        ("num_bytes", "<u4"),
        ("shard", "<u4"),  # position in the manifest's shards
        ("label", "<i4"),  # −1 if there is none
        ("width", "<u2"),  # of the upright image, by its EXIF tag
        ("height", "<u2"),
    ]
)
DALI_INDEX_VERSION = "v1.2"
TAR_BLOCK = 512
"""Entries of a tar start at multiples of this many bytes."""


@dataclass(frozen=True)
class ShardSet:
    """An opened set of shards; N images. :class:`pipelines.sets.stores.ShardStore` reads from it."""

    path: Path
    """The folder."""
    manifest: Manifest
    index: NDArray[np.void]
    """(N,) records of INDEX_DTYPE, mapped."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The tar files. The index refers to them by their positions here."""
        return self.manifest.shards

    def tar_path(self, shard: int) -> Path:
        """The tar file of a shard."""
        return self.path / self.shards[shard].name

    def payload(self, index: int) -> NDArray[np.uint8]:
        """Read the stored bytes of one image. Raises OSError if the tar ends within it."""
        record = self.index[index]
        tar, num_bytes = self.tar_path(int(record["shard"])), int(record["num_bytes"])
        with tar.open("rb") as file:
            file.seek(int(record["offset"]))
            content = file.read(num_bytes)
        if len(content) < num_bytes:
            raise OSError(f"{tar} ends within image {index}; {verify_hint(self.path)}")
        return np.frombuffer(content, np.uint8)

    def member_name(self, index: int) -> str | None:
        """An image's name in its tar, from DALI's index file; None if that has no names.

        Reads the index file up to the image, which is too slow for loops.
        """
        record = self.index[index]
        members = self._members(int(record["shard"]))
        return next((name for offset, name in members if offset == record["offset"]), None)

    def member_names(self) -> Iterator[str]:
        """The images' names in their tars, in order. Only the names of one tar at a time are in memory.

        Raises:
            ValueError: if DALI's index file of a tar is missing or lacks a name.
        """
        current, names = -1, dict[int, str]()
        for shard, offset in zip(self.index["shard"], self.index["offset"], strict=True):
            if shard != current:
                current, names = int(shard), dict(self._members(int(shard)))
            if int(offset) not in names:
                tar = self.tar_path(current)
                raise ValueError(f"{dali_index_path(tar)} does not name all images; {index_hint(self.path)}")
            yield names[int(offset)]

    def _members(self, shard: int) -> Iterator[tuple[int, str]]:
        """Offset and name of each member of a tar that DALI's index file lists."""
        try:
            with dali_index_path(self.tar_path(shard)).open("rb") as file:
                if not next(file, b"").startswith(DALI_INDEX_VERSION.encode()):
                    return
                for line in file:
                    fields = line.split()  # suffix, offset, size, name; suffix, …
                    for offset, name in zip(fields[1::4], fields[3::4], strict=False):
                        yield int(offset), os.fsdecode(name)
        except (FileNotFoundError, ValueError):
            return


def is_shard_set(path: str | Path) -> bool:
    """Whether ``path`` is a folder of indexed shards."""
    return Path(path).is_dir() and manifest_path(path).is_file()


def set_aside_path(folder: Path) -> Path:
    """Temporary path of a set that is being replaced, if the file system cannot exchange two names."""
    return folder.with_name(f".{folder.name}.maskmix-old")


def dali_index_path(tar: str | Path) -> Path:
    """The path of DALI's index of a tar."""
    return Path(tar).with_suffix(".idx")


def index_hint(path: str | Path) -> str:
    """The command that indexes shards again; a clause of a message."""
    return f"index the shards with `python -m dataset_tools index {path}`"


def set_digest(shards: Sequence[Shard], index: NDArray[np.void]) -> str:
    """The hash of a set: of the hashes of its tars in order, then of the records of its index."""
    hasher = hashlib.sha256("".join(shard.sha256 for shard in shards).encode("ascii"))
    for rows in blocks(len(index)):
        hasher.update(np.ascontiguousarray(index[rows]).view(np.uint8).data)
    return hasher.hexdigest()


def positions_by_shard(shards: Sequence[Shard], index: NDArray[np.void]) -> list[NDArray[np.int64]]:
    """For each shard, the positions in the set of its images, in the order of the tar."""
    order = np.lexsort((index["offset"], index["shard"]))
    return np.split(order, np.cumsum([shard.count for shard in shards])[:-1])


def open_shards(path: str | Path) -> ShardSet:
    """Open a set of shards and check everything but the contents of the tars.

    The size of each tar is checked, and the mapped index is read once.

    Raises:
        FileNotFoundError: if there is no such set or one of its files is missing.
        ValueError: if the index does not fit the shards, or a tar has another size than the manifest says.
    """
    path = Path(path)
    if not path.is_dir():
        if set_aside_path(path).is_dir():
            raise FileNotFoundError(
                f"{path} was being replaced when a process was killed; its set lies in "
                f"{set_aside_path(path)}: rename that, or run the same conversion again"
            )
        raise FileNotFoundError(
            f"there is no folder of shards {path}; make one with `make shards DATA=<folder>`"
        )
    manifest = shards_manifest(path)
    for shard in manifest.shards:
        check_tar(path, shard)
    return ShardSet(path, manifest, map_index(path, manifest))


def shards_manifest(path: Path) -> Manifest:
    """Read a set's manifest.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not that of a set of shards.
    """
    manifest = Manifest.read(path)
    if manifest is None and (path / PLAN_NAME).exists():
        raise FileNotFoundError(
            f"{path} is incomplete, it has no {manifest_path(path).name} yet; run the conversion again; it "
            "keeps complete shards and makes the others"
        )
    if manifest is None:
        raise FileNotFoundError(f"{path} has no {manifest_path(path).name}; {index_hint(path)}")
    if manifest.format != "shards" or not manifest.shards:
        raise ValueError(f"{manifest_path(path)} names no shards; {index_hint(path)}")
    return manifest


def check_tar(path: Path, shard: Shard) -> None:
    """Check that a tar of the set exists and has the size in the manifest.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it has another size.
    """
    tar = path / shard.name
    try:
        size = tar.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{tar} is missing, which the manifest lists; restore it, convert again with --overwrite, or, to "
            f"continue without it, {index_hint(path)}"
        ) from None
    if size != shard.num_bytes:
        raise ValueError(
            f"{tar} has {size} bytes, the manifest says {shard.num_bytes}: it is cut short or changed; "
            f"{verify_hint(path)}"
        )


def map_index(path: Path, manifest: Manifest) -> NDArray[np.void]:
    """Map the index of the set, and check that it fits the manifest.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged or belongs to another set.
    """
    index = _read_index(path, valid_index_path(path, manifest), manifest)
    counts = np.zeros(len(manifest.shards), np.int64)
    for rows in blocks(len(index)):
        _check_places(path, manifest, rows.start, index[rows])
        counts += np.bincount(index["shard"][rows], minlength=len(counts))
    expected = [shard.count for shard in manifest.shards]
    if counts.tolist() != expected:
        number = int(np.argmax(counts != expected))
        raise ValueError(
            f"{path / INDEX_NAME} has {counts[number]} images in {manifest.shards[number].name}, the "
            f"manifest says {expected[number]}; {index_hint(path)}"
        )
    return index


def valid_index_path(path: Path, manifest: Manifest) -> Path:
    """The index that belongs to the manifest of a set: the pending one if it has the manifest's hash.

    A pending index remains if the process that wrote it was killed, before or after it wrote the manifest.
    """
    pending = path / PENDING_INDEX_NAME
    if pending.exists():
        with contextlib.suppress(ValueError):
            if set_digest(manifest.shards, _read_index(path, pending, manifest)) == manifest.sha256:
                return pending
    return path / INDEX_NAME


def _read_index(path: Path, file: Path, manifest: Manifest) -> NDArray[np.void]:
    try:
        index: NDArray[np.void] = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing; {index_hint(path)}") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is not a complete index ({error}); {index_hint(path)}") from error
    if index.dtype != INDEX_DTYPE or index.ndim != 1:
        raise ValueError(
            f"{file} holds {index.dtype} of shape {index.shape}, not an index; {index_hint(path)}"
        )
    counted = sum(shard.count for shard in manifest.shards)
    if not len(index) == manifest.count == counted:
        raise ValueError(
            f"{file} has {len(index)} images, the manifest says {manifest.count} in all and {counted} "
            f"in its shards; {index_hint(path)}"
        )
    return index


def _check_places(path: Path, manifest: Manifest, start: int, block: NDArray[np.void]) -> None:
    """Raise ValueError if a record is impossible: its position in the tar, its size or its label."""
    sizes = np.array([shard.num_bytes for shard in manifest.shards], np.uint64)
    known = block["shard"] < len(sizes)
    end = block["offset"] + block["num_bytes"]
    within = known & (end <= sizes[np.where(known, block["shard"], 0)]) & (end >= block["offset"])
    placed = (block["offset"] % TAR_BLOCK == 0) & (block["offset"] >= TAR_BLOCK) & (block["num_bytes"] > 0)
    sized = (block["width"] > 0) & (block["height"] > 0)
    labelled = block["label"] >= -1
    if manifest.classes:
        labelled &= block["label"] < len(manifest.classes)
    bad = np.flatnonzero(~(within & placed & sized & labelled))
    if len(bad):
        raise ValueError(
            f"{path / INDEX_NAME}: the record of image {start + int(bad[0])} is {block[bad[0]]} "
            f"{INDEX_DTYPE.names}, which does not fit the shards; {index_hint(path)}"
        )
