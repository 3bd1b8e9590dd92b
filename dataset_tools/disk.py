"""Writing large files: one writer at a time, and the disk kept busy while pictures are still being added."""

import fcntl
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

_BUFFER_BYTES = 8 << 20
_SYNC_EVERY_BYTES = 32 << 20
"""How much is left to the disk at a time, while pictures go on being added."""


def open_alone(path: Path) -> BinaryIO:
    """Open ``path`` empty for writing, or raise FileExistsError where another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise FileExistsError(
            f"another process is writing {path}; wait for it or choose another name"
        ) from error
    os.ftruncate(descriptor, 0)
    return os.fdopen(descriptor, "w+b", buffering=_BUFFER_BYTES)


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
