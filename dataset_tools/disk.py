"""Writing large files: locks, a temporary name until a file is complete, and replacing a folder in one step.

Small files are written by ``training.files.write_atomically``.
"""

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from pipelines.sets.manifest import Manifest, manifest_path, pending_path
from training.files import write_json

_BUFFER_BYTES = 8 << 20
_SYNC_EVERY_BYTES = 32 << 20
"""Amount of new data after which a file is synced in the background, while more is written."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def lock(path: Path, *, shared: bool = False, target: Path | None = None) -> int:
    """Lock the file at ``path``, creating it if needed. Closing the returned descriptor unlocks it.

    Args:
        path: the file to lock.
        shared: allow other shared locks at the same time.
        target: what is written under this lock, for the error message; by default ``path``.

    Raises:
        FileExistsError: if another process holds the lock.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _is_named(descriptor, path):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise FileExistsError(
                f"another process is writing {target or path}; wait for it or choose another name"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise OSError(error.errno, f"{path} cannot be locked: {error.strerror}") from error
        os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still names this file; a former holder of the lock may have renamed or removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class Lock:
    """A lock file that gives the right to write ``target``. It is released when its process ends."""

    def __init__(self, path: Path, target: Path, *, shared: bool = False) -> None:
        """Lock the file ``path``; arguments and errors as in :func:`lock`."""
        self.path = path
        """Path of the lock file; must be updated when its folder is renamed."""
        self._descriptor = lock(path, shared=shared, target=target)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Unlock; the last holder of a shared lock removes the file. Further calls do nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_named(descriptor, self.path):
                    self.path.unlink()
        finally:
            os.close(descriptor)


def open_exclusive(path: Path) -> BinaryIO:
    """Open ``path`` empty for writing. Raises FileExistsError if another process is writing it."""
    descriptor = lock(path)
    os.ftruncate(descriptor, 0)
    return os.fdopen(descriptor, "w+b", buffering=_BUFFER_BYTES)


class PartialFile:
    """A large file with the temporary name ``<name>.partial`` until it is complete.

    Write to ``file``, then call :meth:`sync` and :meth:`rename`. :meth:`discard`, or leaving the context,
    closes the file and removes it if it was not renamed.
    """

    def __init__(self, path: Path) -> None:
        """Open the temporary file for ``path``. Raises FileExistsError if another process is writing it."""
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.file = open_exclusive(self.partial)
        self._synced_to, self._renamed = 0, False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="disk-sync")
        self._running: Future[None] | None = None

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()

    def skip_to(self, start: int) -> None:
        """Go to byte ``start``. The bytes before it are written last; background syncs do not count them."""
        self.file.seek(start)
        self._synced_to = start

    def sync_behind(self, end: int) -> None:
        """Start a sync in the background if there is enough new data; ``end`` is the number of bytes written.

        The disk then works while images are added, and the final :meth:`sync` is short. Raises the OSError of
        an earlier sync.
        """
        if end - self._synced_to >= _SYNC_EVERY_BYTES and (self._running is None or self._running.done()):
            self._wait()
            self._running, self._synced_to = self._pool.submit(os.fdatasync, self.file.fileno()), end

    def sync(self) -> None:
        """Write everything to the disk. Raises OSError if any part of the file could not be written."""
        self._wait()
        self.file.flush()
        os.fsync(self.file.fileno())

    def rename(self, path: Path | None = None) -> None:
        """Give the file its final name, or the name ``path``."""
        self.partial.replace(path or self.path)
        self._renamed = True

    def discard(self) -> None:
        """Close the file, and remove it if it was not renamed."""
        if not self._renamed:
            self.partial.unlink(missing_ok=True)
        self._pool.shutdown()
        with contextlib.suppress(OSError):  # closing flushes, which fails once more if the disk is full
            self.file.close()

    def _wait(self) -> None:
        """Wait for the last sync and raise its error, which the kernel reports only once."""
        if self._running is not None:
            self._running.result()


def write_manifest(manifest: Manifest, path: str | Path, *, pending: bool = False) -> Path:
    """Write the manifest of the set at ``path`` as JSON, atomically, and return its path.

    With ``pending``, the manifest has a temporary name until the set has replaced an old one.
    """
    target = pending_path(manifest_path(path)) if pending else manifest_path(path)
    write_json(target, dataclasses.asdict(manifest))
    return target


def exchange(new: Path, old: Path, aside: Path) -> None:
    """Exchange the names of two folders in one step.

    File systems that lack this operation need three renames. A process killed between them leaves ``old``
    under the name ``aside``.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = os.fsencode(new), os.fsencode(old)
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(old))
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
