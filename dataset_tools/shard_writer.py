"""Writing the shards of a set: one tar after the other, each of them whole or absent."""

import contextlib
import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from dataset_tools.dali_index import dali_index, tar_samples
from dataset_tools.disk import BackgroundSync, open_alone
from dataset_tools.keys import Keys
from dataset_tools.normalise import BadPicture, Normal
from dataset_tools.shard_plan import PART_DTYPE, Part, Plan, tar_name
from dataset_tools.tar_members import Member
from pipelines.sets.folder import NO_LABEL
from pipelines.sets.manifest import Shard
from pipelines.sets.shards import TAR_BLOCK, dali_index_path
from training.files import sync_folder, write_atomically

MAX_PICTURE_BYTES = (1 << 32) - 1
"""The index has 32 bits for a picture's size."""


class TarWriter:
    """One tar, written from its first byte to its last and hashed on the way.

    The same files give the same bytes: no times, no owners. Names of more than 100 letters are written in
    tar's own long form where they fit, else in GNU's, which DALI finds its way through without an index too
    (in PAX's it does not).
    """

    def __init__(self, path: Path) -> None:
        """Open ``<name>.partial``. Raises FileExistsError where another process is writing it."""
        self.path = path
        self.members: list[Member] = []
        self._partial = path.with_name(path.name + ".partial")
        self._file = open_alone(self._partial)
        self._sync = BackgroundSync(self._file)
        self._hasher, self._end, self._sealed = hashlib.sha256(), 0, False

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
        self._sync.written(self._end)
        return offset

    def seal(self) -> Shard:
        """Write the end mark, bring all to the disk, give the tar its name. ``count`` of the result is 0."""
        self._write(bytes(2 * TAR_BLOCK))
        self._write(bytes(-self._end % tarfile.RECORDSIZE))
        self._sync.finish()
        self._partial.replace(self.path)
        self._sealed = True
        sync_folder(self.path.parent)
        return Shard(self.path.name, 0, self._end, self._hasher.hexdigest())

    def close(self) -> None:
        """Close the file; remove it where it was not sealed."""
        if not self._sealed:
            self._partial.unlink(missing_ok=True)
        self._sync.close()
        with contextlib.suppress(OSError):  # a full disk, reported already
            self._file.close()

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hasher.update(content)
        self._end += len(content)


class _OpenShard:
    """What has come together of the shard that is being written."""

    def __init__(self, path: Path) -> None:
        self.tar = TarWriter(path)
        self.records: list[tuple[int, ...]] = []
        self.replaced: Counter[str] = Counter()
        self.skipped: list[tuple[int, str]] = []
        self.num_taken = 0


class ShardsWriter:
    """Takes the pictures of some shards in their order, and writes these shards.

    A context manager: leaving it removes the shard that is not complete, and keeps those that are.
    """

    def __init__(self, folder: Path, plan: Plan, shards: list[int], keys: Keys) -> None:
        """Pictures will come for ``shards``, the places of each in order."""
        self._folder, self._plan, self._keys, self._digest = folder, plan, keys, plan.digest
        self._shards = iter(shards)
        self._number = -1
        self._open: _OpenShard | None = None

    def __enter__(self) -> "ShardsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            self._open.tar.close()

    def add(self, index: int, picture: Normal, label: int, path: str) -> None:
        """Write picture ``index`` of the source. Raises ValueError for one of 4 GiB or more."""
        payload = picture.payload
        content = memoryview(payload if isinstance(payload, bytes) else payload.data).cast("B")
        if content.nbytes > MAX_PICTURE_BYTES:
            raise ValueError(f"{path} has {content.nbytes} bytes; a picture may have {MAX_PICTURE_BYTES}")
        with self._taking() as shard:
            key = self._keys(index, path)
            offset = shard.tar.add(f"{key}.jpg", content)
            if label != NO_LABEL:
                shard.tar.add(f"{key}.cls", memoryview(b"%d" % label))
            size = (picture.width, picture.height)
            shard.records.append((index, offset, content.nbytes, self._number, label, *size))
            if picture.changed:
                shard.replaced[f"transcoded: {picture.changed}"] += 1

    def skip(self, index: int, path: str, fault: BadPicture) -> None:
        """Leave picture ``index`` out, and remember why."""
        with self._taking() as shard:
            shard.replaced[f"skipped: {fault.reason}"] += 1
            shard.skipped.append((index, f"{path}: {fault}"))

    @contextlib.contextmanager
    def _taking(self) -> Iterator[_OpenShard]:
        """The shard that the next picture belongs to; sealed once it has all."""
        if self._open is None:
            self._number = next(self._shards)
            self._open = _OpenShard(self._folder / tar_name(self._number))
        yield self._open
        self._open.num_taken += 1
        if self._open.num_taken == len(self._plan.places(self._number)):
            self._seal(self._open)
            self._open = None

    def _seal(self, shard: _OpenShard) -> None:
        """Tar, DALI's index, side file: in this order, as the last tells that the others are whole."""
        records = np.array(shard.records, PART_DTYPE)
        index = dali_index(tar_samples(shard.tar.members))
        sealed: Shard | None = None
        tar, idx = shard.tar.path, dali_index_path(shard.tar.path)
        if not len(records):
            for file in (tar, idx):  # of another conversion, which this one replaces
                file.unlink(missing_ok=True)
        else:
            told = shard.tar.seal()
            sealed = Shard(told.name, len(records), told.num_bytes, told.sha256)
            write_atomically(idx, lambda file: file.write(index))
        shard.tar.close()
        part = Part(
            records=records,
            tar=sealed,
            idx_sha256=hashlib.sha256(index).hexdigest(),
            replaced=dict(shard.replaced),
            skipped=tuple(shard.skipped),
        )
        part.write(self._folder, self._number, self._digest)
