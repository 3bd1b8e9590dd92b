"""Writes the shards of a set, one tar after the other. A shard is complete or absent."""

import contextlib
import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt

from dataset_tools.disk import PartialFile
from dataset_tools.normalise import BadImage, StoredImage
from dataset_tools.shard_plan import PART_DTYPE, Part, Plan, tar_name
from dataset_tools.tars import Member, dali_index, tar_samples
from pipelines.sets.folder import IMAGE_SUFFIXES, NO_LABEL
from pipelines.sets.manifest import Shard
from pipelines.sets.shards import TAR_BLOCK, dali_index_path
from training.files import sync_folder, write_atomically

MAX_IMAGE_BYTES = (1 << 32) - 1
"""The index stores the size of an image in 32 bits."""


class TarWriter:
    """Writes and hashes one tar.

    The same files give the same bytes: there are no times and no owners. Names of more than 100 characters
    are written in the USTAR format if they fit, else in GNU's. DALI reads both without an index, but not the
    PAX format.
    """

    def __init__(self, path: Path) -> None:
        """Open ``<name>.partial``. Raises FileExistsError if another process is writing it."""
        self.path = path
        self.members: list[Member] = []
        self._out = PartialFile(path)
        self._hasher, self._end = hashlib.sha256(), 0

    def add(self, name: str, content: memoryview) -> int:
        """Append a file; return the offset of its first byte."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = content.nbytes, 0o644
        try:
            header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
        except ValueError:
            header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        offset = self._end + len(header)
        for piece in (header, content, bytes(-content.nbytes % TAR_BLOCK)):
            self._write(piece)
        self.members.append(Member(name, offset, content.nbytes))
        self._out.sync_behind(self._end)
        return offset

    def seal(self, count: int) -> Shard:
        """Write the end mark, sync, rename; ``count`` is the number of images in the tar."""
        self._write(bytes(2 * TAR_BLOCK))
        self._write(bytes(-self._end % tarfile.RECORDSIZE))
        self._out.sync()
        self._out.rename()
        sync_folder(self.path.parent)
        return Shard(self.path.name, count, self._end, self._hasher.hexdigest())

    def close(self) -> None:
        """Close the file; remove it if it was not sealed."""
        self._out.discard()

    def _write(self, content: bytes | memoryview) -> None:
        self._out.file.write(content)
        self._hasher.update(content)
        self._end += len(content)


class _OpenShard:
    """The shard that is being written."""

    def __init__(self, path: Path) -> None:
        self.tar = TarWriter(path)
        self.records: list[tuple[int, ...]] = []
        self.replaced: Counter[str] = Counter()
        self.skipped: list[tuple[int, str]] = []
        self.num_taken = 0


class ShardsWriter:
    """Writes some shards of a set from their images in order.

    Leaving the context removes an incomplete shard and keeps the complete ones.
    """

    def __init__(self, folder: Path, plan: Plan, shards: list[int], keys: "Keys") -> None:
        """Prepare to receive the images of ``shards``, one shard after the other."""
        self._folder, self._plan, self._keys, self._digest = folder, plan, keys, plan.digest
        self._shards = iter(shards)
        self._number = -1
        self._open: _OpenShard | None = None

    def __enter__(self) -> "ShardsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._open is not None:
            self._open.tar.close()

    def add(self, index: int, image: StoredImage, label: int, path: str) -> None:
        """Write image ``index`` of the source. Raises ValueError if it has 4 GiB or more."""
        payload = image.payload
        content = memoryview(payload if isinstance(payload, bytes) else payload.data).cast("B")
        if content.nbytes > MAX_IMAGE_BYTES:
            raise ValueError(f"{path} has {content.nbytes} bytes; the limit is {MAX_IMAGE_BYTES}")
        with self._next_place() as shard:
            key = self._keys(index, path)
            offset = shard.tar.add(f"{key}.jpg", content)
            if label != NO_LABEL:
                shard.tar.add(f"{key}.cls", memoryview(b"%d" % label))
            size = (image.width, image.height)
            shard.records.append((index, offset, content.nbytes, self._number, label, *size))
            if image.changed:
                shard.replaced[f"transcoded: {image.changed}"] += 1

    def skip(self, index: int, path: str, fault: BadImage) -> None:
        """Leave image ``index`` out and record why."""
        with self._next_place() as shard:
            shard.replaced[f"skipped: {fault.reason}"] += 1
            shard.skipped.append((index, f"{path}: {fault}"))

    @contextlib.contextmanager
    def _next_place(self) -> Iterator[_OpenShard]:
        """Yield the shard of the next image; seal it after its last one."""
        if self._open is None:
            self._number = next(self._shards)
            self._open = _OpenShard(self._folder / tar_name(self._number))
        yield self._open
        self._open.num_taken += 1
        if self._open.num_taken == len(self._plan.places(self._number)):
            self._seal(self._open)
            self._open = None

    def _seal(self, shard: _OpenShard) -> None:
        """Write the tar, DALI's index and the side file; the last one marks the shard as complete."""
        records = np.array(shard.records, PART_DTYPE)
        index = dali_index(tar_samples(shard.tar.members))
        sealed: Shard | None = None
        tar, idx = shard.tar.path, dali_index_path(shard.tar.path)
        if len(records):
            sealed = shard.tar.seal(len(records))
            write_atomically(idx, lambda file: file.write(index))
        else:
            for file in (tar, idx):  # of another conversion, which this one replaces
                file.unlink(missing_ok=True)
        shard.tar.close()
        part = Part(
            records=records,
            tar=sealed,
            idx_sha256=hashlib.sha256(index).hexdigest(),
            replaced=dict(shard.replaced),
            skipped=tuple(shard.skipped),
        )
        part.write(self._folder, self._number, self._digest)


# ------------------------------------------------------------------------------------------------------------
# Keys: the names of samples in shards
#
# WebDataset splits a name at the first dot after the last slash, DALI splits the lines of its index at white
# space, and tar programs print other characters in different ways. So a key is the path of the image in its
# source, percent-encoded as in URLs except for letters, digits and ``_ - ~ / .``. The dots in the image's
# own name are encoded too. All keys differ.


def encode_key(path: str) -> str:
    """Percent-encode a relative path; only dots in the names of folders stay."""
    folder, slash, name = path.rpartition("/")
    parts = [_encode_part(part) for part in folder.split("/")] if slash else []
    return "/".join([*parts, quote(os.fsencode(name), safe="").replace(".", "%2E")])


def decode_key(key: str) -> str:
    """Return the path from which :func:`encode_key` made ``key``."""
    return unquote(key, errors="surrogateescape")


def _encode_part(part: str) -> str:
    quoted = quote(os.fsencode(part), safe="")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted


def without_suffix(path: str) -> str:
    """Remove the suffix of an image file from a path, unless the name consists of nothing else."""
    folder, slash, name = path.rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    return f"{folder}{slash}{stem}" if stem and f"{dot}{suffix}".lower() in IMAGE_SUFFIXES else path


class Keys:
    """The key of every image: its path without the suffix, or with it if two paths differ only there.

    Stores one bit per image: whether the key keeps the suffix.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        """Read all paths, which must be unique."""
        hashes = np.fromiter(((_hash(without_suffix(path)), _hash(path)) for path in paths), _TWO_HASHES)
        # If two different paths have the same hash, a suffix is kept without need, which is harmless.
        stems, inverse, counts = np.unique(hashes["stem"], return_inverse=True, return_counts=True)
        shared = (counts > 1) | np.isin(stems, hashes["path"])
        self._suffix_bits: npt.NDArray[np.uint8] = np.packbits(shared[inverse])

    def __call__(self, index: int, path: str) -> str:
        """Return the key of image ``index``, which has the path ``path``."""
        keeps = self._suffix_bits[index >> 3] >> (7 - (index & 7)) & 1
        return encode_key(path if keeps else without_suffix(path))


_TWO_HASHES = np.dtype([("stem", "<u8"), ("path", "<u8")])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "little")
