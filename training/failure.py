"""How the processes of one run fail: every sentence told once, by whom it befell, and all are gone at once.

torchrun gives each process a file for its error, ``<folder of this start>/<local rank>/error.json``, and
prints what it finds there at the very end. By these files the processes of a machine also know of each other.
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
"""The kind of failure that only follows from another's."""
USAGE = "usage"
"""A command line that cannot be parsed; its parser has told already what is wrong."""
PATIENCE_S = {LOST: 0.0, USAGE: 30.0}
"""How long a process that fails waits for others to fail alike: the lost not at all, and all the others of a
machine are sure to read the same command line."""
_USUAL_PATIENCE_S = 2.0


def _number(name: str, otherwise: int) -> int:
    """Of an environment variable; one that is no number is refused by `training.distributed`, not here."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise


def _is_alone() -> bool:
    return _number("WORLD_SIZE", 1) == 1


@dataclass(frozen=True)
class _Machine:
    """This process among those of its machine."""

    rank: int
    local_rank: int
    num_local: int
    folder: Path | None
    """Where each process has a folder named as its local rank; None where torchrun has not made one."""

    @classmethod
    def from_environment(cls) -> "_Machine":
        own_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", os.devnull))
        local_rank = _number("LOCAL_RANK", 0)
        return cls(
            rank=_number("RANK", 0),
            local_rank=local_rank,
            num_local=_number("LOCAL_WORLD_SIZE", 1),
            folder=own_file.parents[1] if own_file.parent.name == str(local_rank) else None,
        )

    def note(self, kind: str, sentence: str) -> bool:
        """Leave a failure for torchrun and for the others; whether this process is the first of its kind."""
        assert self.folder is not None
        own = self.folder / str(self.local_rank) / "error.json"
        partial = own.with_suffix(".partial")
        # The form that torchrun reads, beside what is ours.
        message = {"message": sentence, "extraInfo": {"timestamp": int(time.time())}}
        partial.write_text(json.dumps({"message": message, "kind": kind}), encoding="utf-8")
        partial.replace(own)
        try:
            (self.folder / f"told-{zlib.crc32(kind.encode()):08x}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def kinds(self) -> list[str]:
        """Of the failures noted so far."""
        assert self.folder is not None
        files = self.folder.glob("*/error.json")
        return [json.loads(file.read_text(encoding="utf-8")).get("kind", "") for file in files]

    def all_fail_alike(self, kind: str) -> bool:
        """Wait for the others for a while; whether they have all failed this way."""
        end = time.monotonic() + PATIENCE_S.get(kind, _USUAL_PATIENCE_S)
        while self.kinds().count(kind) < self.num_local:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        return self.num_local > 1


def speaks_for_machine() -> bool:
    """Whether this process says what all processes of its machine would say at once."""
    return _number("LOCAL_RANK", 0) == 0


def to_tell(sentence: str, kind: str = "") -> str | None:
    """What a process that fails is to print: the sentence, one with its rank in front, or nothing.

    kind: failures of a kind are told once on a machine; by default those with the same sentence. The rank is
    left out where all processes of the machine fail alike. The LOST keep silent where another one's own
    failure is told. From here on SIGTERM is ignored, so that torchrun, which ends everybody once one has
    failed, does not cut a sentence short.
    """
    if _is_alone():
        return sentence
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    machine = _Machine.from_environment()
    befell = f"rank {machine.rank}: {sentence}"
    if machine.folder is None:
        return befell
    kind = kind or sentence
    try:
        first = machine.note(kind, sentence)
        alike = machine.all_fail_alike(kind)
        if not first or (kind == LOST and set(machine.kinds()) != {LOST}):
            return None
    except OSError:  # a full disk must not keep anyone from speaking
        return befell
    return sentence if alike else befell


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Where several processes make a run, end a failing one with its exit code and nothing else.

    To leave the process group may mean to wait for the dead, and the interpreter's own end may abort over
    gloo's threads; the others learn of a failure by the connections that the system closes.
    """
    try:
        yield
        return
    except SystemExit as end:
        if _is_alone() or not end.code:
            raise
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str) and (told := to_tell(end.code)):
            sys.stderr.write(f"{told}\n")
    except BaseException:
        if _is_alone():
            raise
        if told := to_tell(traceback.format_exc()):
            sys.stderr.write(told)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
