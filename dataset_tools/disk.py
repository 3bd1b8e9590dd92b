"""Writing large files: one writer at a time, the disk kept busy, and new in place of old in one step."""

import contextlib
import ctypes
import errno
import fcntl
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

_BUFFER_BYTES = 8 << 20
_SYNC_EVERY_BYTES = 32 << 20
"""How much is left to the disk at a time, while pictures go on being added."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def lock(path: Path, *, shared: bool = False, target: Path | None = None) -> int:
    """Lock the file that ``path`` names, made where it is missing, and return its descriptor.

    Closing that unlocks it. ``shared``: with others who share it. ``target``: what is written under this
    lock, for the error. Raises FileExistsError where another process holds it.
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
    """Whether ``path`` still names this file: who held a lock before may have renamed or removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class Lock:
    """The right to write ``target``, held by a lock file; a dead process holds none."""

    def __init__(self, path: Path, target: Path, *, shared: bool = False) -> None:
        """Make the lock file ``path``. Raises as ``lock`` does."""
        self.path = path
        """Where the lock file is; to be set anew where its folder was renamed."""
        self._descriptor = lock(path, shared=shared, target=target)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others write; the last of those who share it removes the file. The first call counts."""
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


def open_alone(path: Path) -> BinaryIO:
    """Open ``path`` empty for writing, or raise FileExistsError where another process holds it."""
    descriptor = lock(path)
    os.ftruncate(descriptor, 0)
    return os.fdopen(descriptor, "w+b", buffering=_BUFFER_BYTES)


def exchange(new: Path, old: Path, aside: Path) -> None:
    """Give two folders each other's name, in one step.

    Where the file system cannot do that, in three: a process that is killed between them leaves ``old`` under
    the name ``aside``.
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


class BackgroundSync:
    """Sends a growing file to the disk piece by piece, on a thread of its own, so that its end is no wait."""

    def __init__(self, file: BinaryIO, start: int = 0) -> None:
        """``start`` bytes of the file need no sync."""
        self._file, self._synced_to = file, start
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="disk-sync")
        self._running: Future[None] | None = None

    def written(self, end: int) -> None:
        """Tell that the file now has ``end`` bytes; raises the OSError of an earlier sync."""
        if end - self._synced_to >= _SYNC_EVERY_BYTES and (self._running is None or self._running.done()):
            self._wait()
            self._running, self._synced_to = self._pool.submit(os.fdatasync, self._file.fileno()), end

    def finish(self) -> None:
        """Bring all of the file to the disk. Raises OSError where a part of it could not be written."""
        self._wait()
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown()

    def _wait(self) -> None:
        """Let the last sync end and raise its error, which the kernel tells only once."""
        if self._running is not None:
            self._running.result()
