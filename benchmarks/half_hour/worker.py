"""A process that measures rows, one at a time; the parent can end it when a row takes too long.

The process runs in a process group of its own and ends with its parent. Whatever it prints goes to a log.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.half_hour.plan import Row, Setup, rows_of

_LOG_TAIL = 300
_START_LIMIT_S = 300.0


class Worker:
    """The parent's side. The process starts with the first row, and anew with the next row after `close`."""

    def __init__(self, source: str, setup: Setup, log: Path) -> None:
        self._source, self._setup, self._log = source, setup, log
        self._process: SpawnProcess | None = None
        self._rows: Connection

    def measure(self, name: str, limit_s: float) -> dict[str, Any]:
        """Return a row's figures, or ``reason``: it took longer than ``limit_s``, or failed."""
        if self._process is None and (reason := self._start().get("reason")):
            return {"reason": f"its process did not start: {reason}"}
        with contextlib.suppress(BrokenPipeError):  # the missing answer shows that the process has ended
            self._rows.send(name)
        answer = self._answer(limit_s)
        if self._setup.device == "cuda" and answer.get("reason", "").startswith("failed"):
            self.close()  # a GPU that reported an error may not recover within the process
        return answer

    def close(self) -> None:
        """End the process and its children."""
        process, self._process = self._process, None
        if process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()
            self._rows.close()

    def _start(self) -> dict[str, Any]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        spawn = multiprocessing.get_context("spawn")
        self._rows, rows = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(self._source, self._setup, self._log, rows))
        self._process.start()
        rows.close()
        return self._answer(_START_LIMIT_S)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        if not self._rows.poll(limit_s):
            self.close()
            return {"reason": f"out of time after {limit_s:.0f} s"}
        try:
            answer: dict[str, Any] = self._rows.recv()
        except (EOFError, ConnectionError):
            assert self._process
            self._process.join()
            code = self._process.exitcode
            self.close()
            said = " ".join(self._log.read_text(errors="replace").split())[-_LOG_TAIL:]
            return {"reason": f"failed: its process ended with code {code}; {said or 'it printed nothing'}"}
        return answer


def _serve(source: str, setup: Setup, log: Path, names: Connection) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    if setup.device == "cpu":
        # With several threads the tiny operators of a rehearsal would mostly wait for each other.
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    rows = rows_of(source, setup)
    names.send({})
    while True:
        names.send(_measured(rows[names.recv()]))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _measured(row: Row) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        figures = row.measure()
        json.dumps(figures, allow_nan=False)
    except ImportError as error:
        figures = {"reason": f"left out: {error}"}
    except Exception as error:
        traceback.print_exc()
        figures = {"reason": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:_LOG_TAIL]}"}
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()
    return {**figures, "took_s": round(time.perf_counter() - start, 1)}
