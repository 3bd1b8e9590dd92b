"""Error messages and exits of a run of several processes.

Each failure is reported once on a machine, with the rank if it concerns one process only; then all processes
stop.

torchrun gives each process a file for its error, ``<folder of this start>/<local rank>/error.json``, and
prints these files at the end. Through this folder the processes of a machine also see each other's failures.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOST = "lost"
"""Kind of a failure that follows from another process's failure."""
USAGE = "usage"
"""Kind of a command line that cannot be parsed; the parser has already printed the reason."""
_WAIT_S = {LOST: 0.0, USAGE: 30.0}
"""Seconds that a failing process waits for others to fail in the same way, by kind. All processes of a
machine parse the same command line, so all of them fail in the same way."""
_DEFAULT_WAIT_S = 2.0


def is_first_on_machine() -> bool:
    """Whether this process prints what all processes of its machine would print."""
    return _environment_number("LOCAL_RANK", 0) == 0


def report(message: str, kind: str = "") -> str | None:
    """Report this process's failure to torchrun and to the other processes of the machine.

    From here on SIGTERM is ignored: torchrun sends it to all processes once one has failed, and it must not
    interrupt a message.

    Args:
        message: the error message.
        kind: failures of one kind are printed once on a machine; by default failures with the same message.

    Returns:
        What this process is to print: the message if all processes of the machine fail in the same way, else
        the rank and the message. None if another process prints it, and for a `LOST` process if
        another process failed for another reason.
    """
    if _is_single():
        return message
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    machine = _Machine.from_environment()
    with_rank = f"rank {machine.rank}: {message}"
    if machine.folder is None:
        return with_rank
    kind = kind or message
    try:
        is_first = machine.record(kind, message)
        all_alike = machine.wait_for_all(kind)
        if not is_first or (kind == LOST and set(machine.kinds()) != {LOST}):
            return None
    except OSError:  # a full disk must not suppress the message
        return with_rank
    return message if all_alike else with_rank


@contextlib.contextmanager
def exit_on_failure() -> Iterator[None]:
    """If one of several processes fails, end it by ``os._exit`` with its exit code.

    A normal exit could wait for dead processes in the process group, or abort in gloo's threads. The other
    processes notice the closed connections. In a run of one process this does nothing.
    """
    try:
        yield
        return
    except SystemExit as end:
        if _is_single() or not end.code:
            raise
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str) and (line := report(end.code)):
            sys.stderr.write(f"{line}\n")
    except BaseException:
        if _is_single():
            raise
        if text := report(traceback.format_exc()):
            sys.stderr.write(text)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass(frozen=True)
class _Machine:
    """This process among the processes of its machine."""

    rank: int
    local_rank: int
    num_local: int
    folder: Path | None
    """Holds a folder for each process, named by local rank; None if torchrun has not made one."""

    @classmethod
    def from_environment(cls) -> "_Machine":
        own_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", os.devnull))
        local_rank = _environment_number("LOCAL_RANK", 0)
        return cls(
            rank=_environment_number("RANK", 0),
            local_rank=local_rank,
            num_local=_environment_number("LOCAL_WORLD_SIZE", 1),
            folder=own_file.parents[1] if own_file.parent.name == str(local_rank) else None,
        )

    def record(self, kind: str, message: str) -> bool:
        """Write a failure to this process's file; returns whether it is the first of its kind."""
        assert self.folder is not None
        own = self.folder / str(self.local_rank) / "error.json"
        partial = own.with_suffix(".partial")
        # "message" is read by torchrun, "kind" by `kinds`.
        content = {"message": message, "extraInfo": {"timestamp": int(time.time())}}
        partial.write_text(json.dumps({"message": content, "kind": kind}), encoding="utf-8")
        partial.replace(own)
        try:
            (self.folder / f"reported-{zlib.crc32(kind.encode()):08x}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def kinds(self) -> list[str]:
        """The kinds of all failures recorded so far."""
        assert self.folder is not None
        files = self.folder.glob("*/error.json")
        return [json.loads(file.read_text(encoding="utf-8")).get("kind", "") for file in files]

    def wait_for_all(self, kind: str) -> bool:
        """Wait for the other processes to fail in the same way; returns whether all did."""
        end = time.monotonic() + _WAIT_S.get(kind, _DEFAULT_WAIT_S)
        while self.kinds().count(kind) < self.num_local:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        return self.num_local > 1


def _is_single() -> bool:
    return _environment_number("WORLD_SIZE", 1) == 1


def _environment_number(name: str, default: int) -> int:
    """An environment variable as a number; `training.distributed` reports other values as errors."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
