"""What is in a tar: its members with their offsets, WebDataset's samples, and DALI's index of them.

The standard library reads the headers. It silently accepts a tar that ends early or is damaged in the middle;
here that is an error.
"""

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.sets.shards import DALI_INDEX_VERSION, TAR_BLOCK

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_MOST_PADDING_BYTES = tarfile.RECORDSIZE
"""Zeros that a complete tar may end with: programs pad to records of 10 kB. A longer tail of zeros
comes from a download that reserved its space and did not finish."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_VERSION_WITHOUT_NAMES = "v1.1"
"""Version of a DALI index without the names of the files."""

# The sentences on damage are stored in manifests, where verification looks them up: do not change them.


class Member(NamedTuple):
    """One file in a tar."""

    name: str
    """As in the tar; bytes that are not UTF-8 are decoded as by os.fsdecode."""
    offset: int
    """Of its first byte, from the start of the tar."""
    num_bytes: int
    link: bool = False
    """True for a hard or symbolic link or a sparse file: the content is not stored here as it is."""


def tar_members(
    file: IO[bytes], name: str, on_damage: Callable[[str], None] | None = None
) -> Iterator[Member]:
    """Yield the files in a tar, without folders and devices.

    Args:
        file: a seekable file that contains the tar from its start; not to be used until the generator ends.
        name: of the tar, for error messages.
        on_damage: called with a sentence when a damaged tar cannot be read any further; the members before
            that place are kept. By default damage raises ValueError.

    Raises:
        ValueError: if the tar is compressed; if the file is not a tar; if it is cut short or damaged, or
            anything but a few zeros follows its end mark.
    """
    _refuse_compressed(file, name)
    try:
        yield from _members(file, name)
    except ValueError as error:
        if on_damage is None:
            raise ValueError(
                f"{error}, or take the files before that place with --accept-truncated"
            ) from error
        on_damage(str(error).replace(name, Path(name).name, 1))


def _members(file: IO[bytes], name: str) -> Iterator[Member]:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
            if info.isreg() and not info.issparse() and info.offset_data + info.size > size:
                raise ValueError(f"{name} ends within {info.name}: it is cut short; fetch or make it again")
            if info.isfile() or info.islnk() or info.issym():
                yield Member(info.name, info.offset_data, info.size, not info.isfile() or info.issparse())
    except (tarfile.TarError, EOFError, OverflowError) as error:
        raise ValueError(f"{name} is no whole tar ({error}); fetch or make it again") from error
    _check_end(file, int(tar.offset), size, name)


def scan_tar(path: str | Path, on_damage: Callable[[str], None] | None = None) -> Iterator[Member]:
    """Yield the files in the tar at ``path``; damage and errors as in :func:`tar_members`."""
    with Path(path).open("rb") as file:
        yield from tar_members(file, str(path), on_damage)


class Window(io.RawIOBase):
    """A range of bytes of an open file as a file with its own position."""

    def __init__(self, descriptor: int, start: int, num_bytes: int) -> None:
        """The range is ``num_bytes`` from ``start`` on; the caller closes the descriptor."""
        self._descriptor, self._start, self._size, self._at = descriptor, start, num_bytes, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, which may be past the end."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Read up to the end of the range."""
        view = memoryview(buffer).cast("B")
        num_left = max(0, min(len(view), self._size - self._at))
        num_read = os.preadv(self._descriptor, [view[:num_left]], self._start + self._at)
        self._at += num_read
        return num_read


def _refuse_compressed(file: IO[bytes], name: str) -> None:
    head = file.read(6)
    file.seek(0)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{name} is compressed with {kind}: no image can be read without unpacking everything "
                "before it; unpack it to a plain .tar first"
            )


def _check_end(file: IO[bytes], end: int, size: int, name: str) -> None:
    """Check the end of a tar: a block of zeros, then at most a few more zeros.

    The library also stops at bytes that it cannot read, and takes any block of zeros for the end. An
    unfinished download contains such blocks.
    """
    file.seek(end)
    block = file.read(TAR_BLOCK)
    if len(block) < TAR_BLOCK:
        raise ValueError(f"{name} ends at byte {end + len(block)} without an end mark: it is cut short; "
                         "fetch or make it again")  # fmt: skip
    if any(block):
        raise ValueError(f"{name} has no header at byte {end}: it is damaged; fetch or make it again")
    padding = file.read(_MOST_PADDING_BYTES - TAR_BLOCK)
    if any(padding) or size > file.tell():  # codespell:ignore tell
        first = len(padding) - len(padding.lstrip(b"\0"))
        what = (
            f"byte {end + TAR_BLOCK + first} is not zero"
            if first < len(padding)
            else f"there are over {_MOST_PADDING_BYTES:,} zeros"
        )
        raise ValueError(
            f"{name} has its end mark at byte {end} of {size}, but behind it {what}: a part is missing, or "
            "several tars were joined; fetch or make it again"
        )


# ------------------------------------------------------------------------------------------------------------
# Samples, and DALI's index of them


class Component(NamedTuple):
    """One file of a sample."""

    suffix: str
    """The part of its name after the first dot."""
    offset: int
    num_bytes: int
    name: str


class TarSample(NamedTuple):
    """Consecutive files in a tar that have the same key."""

    key: str
    components: tuple[Component, ...]


def split_name(name: str) -> tuple[str, str]:
    """Return (key, suffix) of a member's name, as WebDataset splits it; ("", "") if it is not in a sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}{slash}{stem}", suffix) if stem and suffix else ("", "")


def tar_samples(members: Iterable[Member]) -> Iterator[TarSample]:
    """Group the members of a tar into samples, without hidden files and names that have no dot."""
    key, components = "", list[Component]()
    for member in members:
        found, suffix = split_name(member.name)
        if not found:
            continue
        if components and found != key:
            yield TarSample(key, tuple(components))
            components = []
        key = found
        components.append(Component(suffix, member.offset, member.num_bytes, member.name))
    if components:
        yield TarSample(key, tuple(components))


def with_images_at(offsets: NDArray[np.uint64], samples: Iterable[TarSample]) -> Iterator[TarSample]:
    """Yield the samples that have a file at one of ``offsets``: the samples with an image in the set."""
    known = set(offsets.tolist())
    return (sample for sample in samples if any(part.offset in known for part in sample.components))


def dali_index(samples: Iterable[TarSample]) -> bytes:
    """Return DALI's index of a tar: version 1.2 of its wds2idx, one line per sample.

    A line has ``suffix offset size name`` for each file. DALI splits the lines at white space: if a name
    contains some, the index is of version 1.1, without names, and files with white space in their suffix are
    left out. The offsets are those of the files' contents. wds2idx uses GNU tar, which for some names of more
    than 100 characters gives the offset of the header with the long name instead.
    """
    kept = [[part for part in sample.components if not _has_space(part.suffix)] for sample in samples]
    named = not any(_has_space(part.name) for parts in kept for part in parts)
    version = DALI_INDEX_VERSION if named else _VERSION_WITHOUT_NAMES
    lines = [" ".join(" ".join(map(str, part[: 4 if named else 3])) for part in parts) for parts in kept]
    text = "\n".join([f"{version} {len(lines)}", *lines, ""])
    return text.encode("utf-8", "surrogateescape")


def _has_space(text: str) -> bool:
    return text.split() != [text]
