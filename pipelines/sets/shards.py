"""A set of WebDataset shards: tar files, their DALI index files, and one index over all pictures.

    photographs.shards/
        set.json       the manifest: classes, settings, and of each shard its count, size and hash
        index.npy      (N,) records of INDEX_DTYPE; where picture i lies, its label and size
        000000.tar     pictures and labels in the order in which they lie on the disk
        000000.idx     the same for DALI's own reader: text, v1.2 of its wds2idx (v1.1,
                       without names, where names have white space, at which DALI would split them)

In a set compiled here picture i is the i-th of its source, while shards hold them shuffled: so the same
source has the same indices, and with them the same views, in a ``.beton`` file. In shards that were there
before, and are only indexed, picture i is the i-th on the disk.
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
"""The index of a set that is about to take the place of another in the same folder."""
PLAN_NAME = "convert.json"
"""What a conversion has set out to make; gone once the set is complete."""
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the picture's first byte in its tar
        ("num_bytes", "<u4"),
        ("shard", "<u4"),  # position in the manifest's shards
        ("label", "<i4"),  # −1 where there is none
        ("width", "<u2"),  # of the picture as it is to be seen, by its EXIF tag
        ("height", "<u2"),
    ]
)
DALI_INDEX_VERSION = "v1.2"
TAR_BLOCK = 512
"""Everything in a tar begins at a multiple of so many bytes."""


@dataclass(frozen=True)
class ShardSet:
    """An opened set of shards; N pictures."""

    path: Path
    """The folder."""
    manifest: Manifest
    index: NDArray[np.void]
    """(N,) records of INDEX_DTYPE, mapped."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The tar files in the order that the index counts them in."""
        return self.manifest.shards

    def tar_path(self, shard: int) -> Path:
        """The tar file of a shard."""
        return self.path / self.shards[shard].name

    def payload(self, index: int) -> NDArray[np.uint8]:
        """Read the stored bytes of one picture. Raises OSError, naming the tar, where it ends before."""
        record = self.index[index]
        tar, num_bytes = self.tar_path(int(record["shard"])), int(record["num_bytes"])
        with tar.open("rb") as file:
            file.seek(int(record["offset"]))
            content = file.read(num_bytes)
        if len(content) < num_bytes:
            raise OSError(f"{tar} ends within picture {index}; {verify_hint(self.path)}")
        return np.frombuffer(content, np.uint8)

    def member_name(self, index: int) -> str | None:
        """The picture's name in its tar, by DALI's index file; None where that does not tell.

        Reads the index file up to the picture: meant for reports, not for loops.
        """
        record = self.index[index]
        members = self._members(int(record["shard"]))
        return next((name for offset, name in members if offset == record["offset"]), None)

    def member_names(self) -> Iterator[str]:
        """The pictures' names in their tars, in order; one tar's names are held at a time.

        Raises ValueError, naming the tar, where DALI's index file is missing or lacks one.
        """
        held, names = -1, dict[int, str]()
        for shard, offset in zip(self.index["shard"], self.index["offset"], strict=True):
            if shard != held:
                held, names = int(shard), dict(self._members(int(shard)))
            if int(offset) not in names:
                tar = self.tar_path(held)
                raise ValueError(
                    f"{dali_index_path(tar)} does not name all pictures; {index_hint(self.path)}"
                )
            yield names[int(offset)]

    def _members(self, shard: int) -> Iterator[tuple[int, str]]:
        """Offset and name of each member of a tar, as far as DALI's index file tells."""
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
    """Is this the folder of a set of shards, indexed?"""
    return Path(path).is_dir() and manifest_path(path).is_file()


def set_aside(folder: Path) -> Path:
    """Where a set is for a moment while another takes its name, on file systems that cannot exchange two."""
    return folder.with_name(f".{folder.name}.maskmix-old")


def dali_index_path(tar: str | Path) -> Path:
    """Where DALI's index of a tar lies."""
    return Path(tar).with_suffix(".idx")


def index_hint(path: str | Path) -> str:
    """The command that makes the index of shards anew."""
    return f"index the shards with `python -m dataset_tools index {path}`"


def set_digest(shards: Sequence[Shard], index: NDArray[np.void]) -> str:
    """The hash of a set, as in its manifest: of the tars' hashes in order, then of the index's records."""
    hasher = hashlib.sha256("".join(shard.sha256 for shard in shards).encode("ascii"))
    for rows in blocks(len(index)):
        hasher.update(np.ascontiguousarray(index[rows]).view(np.uint8).data)
    return hasher.hexdigest()


def pictures_on_disk(shards: Sequence[Shard], index: NDArray[np.void]) -> list[NDArray[np.int64]]:
    """Of each shard the positions in the set of its pictures, as they follow each other in the tar."""
    order = np.lexsort((index["offset"], index["shard"]))
    return np.split(order, np.cumsum([shard.count for shard in shards])[:-1])


def open_shards(path: str | Path) -> ShardSet:
    """Open a set of shards and check everything but the contents of the tars.

    Takes one look at each tar's size and a pass over the index, whose pages are mapped.
    Raises FileNotFoundError where there is no such set or one of its files is missing, ValueError where the
    index does not fit the shards or a tar has not the size that the manifest tells.
    """
    path = Path(path)
    if not path.is_dir():
        if set_aside(path).is_dir():
            raise FileNotFoundError(
                f"{path} was being replaced when a process was killed; its set lies in {set_aside(path)}: "
                "rename that, or run the same conversion again"
            )
        raise FileNotFoundError(
            f"there is no folder of shards {path}; make one with `make shards DATA=<folder>`"
        )
    manifest = shards_manifest(path)
    for shard in manifest.shards:
        check_tar(path, shard)
    return ShardSet(path, manifest, map_index(path, manifest))


def shards_manifest(path: Path) -> Manifest:
    """Read a set's manifest; its shards have a count and lie in the set's own folder.

    Raises FileNotFoundError where there is none, ValueError where it is not of a set of shards.
    """
    manifest = Manifest.read(path)
    if manifest is None and (path / PLAN_NAME).exists():
        raise FileNotFoundError(
            f"{path} is half made, it has no {manifest_path(path).name} yet; run the conversion again, which "
            "keeps whole shards and ends it"
        )
    if manifest is None:
        raise FileNotFoundError(f"{path} has no {manifest_path(path).name}; {index_hint(path)}")
    if manifest.format != "shards" or not manifest.shards:
        raise ValueError(f"{manifest_path(path)} names no shards; {index_hint(path)}")
    return manifest


def check_tar(path: Path, shard: Shard) -> None:
    """Look whether a tar of the set is there, in its size.

    Raises FileNotFoundError where it is missing, ValueError where it has another size.
    """
    tar = path / shard.name
    try:
        size = tar.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{tar} is missing, which the manifest names; bring it back, convert again with --overwrite, or, "
            f"to go on without it, {index_hint(path)}"
        ) from None
    if size != shard.num_bytes:
        raise ValueError(
            f"{tar} has {size} bytes, the manifest says {shard.num_bytes}: it is cut short or changed; "
            f"{verify_hint(path)}"
        )


def map_index(path: Path, manifest: Manifest) -> NDArray[np.void]:
    """Map the index of the set, and check that it fits the manifest.

    Raises FileNotFoundError where it is missing, ValueError where it is damaged or of another set.
    """
    index = _read_index(path, index_in_force(path, manifest), manifest)
    counts = np.zeros(len(manifest.shards), np.int64)
    for rows in blocks(len(index)):
        _check_places(path, manifest, rows.start, index[rows])
        counts += np.bincount(index["shard"][rows], minlength=len(counts))
    told = [shard.count for shard in manifest.shards]
    if counts.tolist() != told:
        number = int(np.argmax(counts != told))
        raise ValueError(
            f"{path / INDEX_NAME} has {counts[number]} pictures in {manifest.shards[number].name}, the "
            f"manifest says {told[number]}; {index_hint(path)}"
        )
    return index


def index_in_force(path: Path, manifest: Manifest) -> Path:
    """The index that belongs to the manifest of a set: the pending one where it has the manifest's hash.

    There is a pending one where the process that wrote it was killed, perhaps before it wrote the manifest.
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
        raise ValueError(f"{file} is not a whole index ({error}); {index_hint(path)}") from error
    if index.dtype != INDEX_DTYPE or index.ndim != 1:
        raise ValueError(f"{file} holds {index.dtype} of shape {index.shape}, no index; {index_hint(path)}")
    counted = sum(shard.count for shard in manifest.shards)
    if not len(index) == manifest.count == counted:
        raise ValueError(
            f"{file} has {len(index)} pictures, the manifest says {manifest.count} in all and {counted} "
            f"in its shards; {index_hint(path)}"
        )
    return index


def _check_places(path: Path, manifest: Manifest, start: int, block: NDArray[np.void]) -> None:
    """Every picture must lie within its tar, at a place where a tar can hold one."""
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
            f"{path / INDEX_NAME}: the record of picture {start + int(bad[0])} is {block[bad[0]]} "
            f"{INDEX_DTYPE.names}, which does not fit the shards; {index_hint(path)}"
        )
