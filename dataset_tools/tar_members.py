"""The files in a tar, one header after the other, with the places where they lie.

The standard library reads the headers. What it passes over in silence – a tar that stops, or is damaged, in
the middle – is an error here.
"""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from pipelines.sets.shards import TAR_BLOCK

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_MOST_PADDING_BYTES = tarfile.RECORDSIZE
"""Zeros that a whole tar may end with: programs pad to records of 10 kB. A longer tail is what a download
leaves that reserved its place and was not completed."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """One file in a tar."""

    name: str
    """As the tar has it, bytes that are no UTF-8 as os.fsdecode gives them."""
    offset: int
    """Of its first byte, from where the tar starts."""
    num_bytes: int
    link: bool = False
    """A hard or symbolic link, or a sparse file: its bytes do not lie here as they are."""


def tar_members(
    file: IO[bytes], name: str, on_damage: Callable[[str], None] | None = None
) -> Iterator[Member]:
    """Yield the files in the tar that ``file`` starts with; folders and devices are passed over.

    ``file`` must be able to seek and belongs to this generator until that ends. ``name`` is for errors.
    ``on_damage`` is called with a sentence where a damaged tar cannot be read on, and the files before that
    place are kept; by default that is an error.
    Raises ValueError for a compressed tar, for what is no tar and for one that is cut short or damaged, or
    has anything but a few zeros behind its end mark.
    """
    _refuse_compressed(file, name)
    try:
        yield from _members(file, name)
    except ValueError as error:
        if on_damage is None:
            raise ValueError(f"{error}, or take what lies before with --accept-truncated") from error
        on_damage(str(error).replace(name, Path(name).name, 1))


def _members(file: IO[bytes], name: str) -> Iterator[Member]:
    """The files in a tar; raises ValueError where it cannot be read on."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep every header
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
    """Some bytes of an open file as a file of its own, with a position of its own."""

    def __init__(self, descriptor: int, start: int, num_bytes: int) -> None:
        """``num_bytes`` from ``start`` on; the descriptor stays the caller's."""
        self._descriptor, self._start, self._size, self._at = descriptor, start, num_bytes, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, which may lie past the end."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Read up to the window's end."""
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - self._at))
        num_read = os.preadv(self._descriptor, [view[:wanted]], self._start + self._at)
        self._at += num_read
        return num_read


def _refuse_compressed(file: IO[bytes], name: str) -> None:
    head = file.read(6)
    file.seek(0)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{name} is compressed with {kind}, so that no picture can be reached without unpacking all "
                "before it; unpack it to a plain .tar first"
            )


def _check_end(file: IO[bytes], end: int, size: int, name: str) -> None:
    """A whole tar ends with a block of zeros; the library also stops, silently, where it cannot read on.

    It takes any block of zeros for the end, such as a download leaves that was not completed: so no more than
    zeros may follow, and not many.
    """
    file.seek(end)
    block = file.read(TAR_BLOCK)
    if len(block) < TAR_BLOCK:
        raise ValueError(f"{name} ends at byte {end + len(block)} without an end mark: it is cut short; "
                         "fetch or make it again")  # fmt: skip
    if any(block):
        raise ValueError(f"{name} has no header at byte {end}: it is damaged; fetch or make it again")
    padding = file.read(_MOST_PADDING_BYTES - TAR_BLOCK)
    if any(padding) or size > file.tell():
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
