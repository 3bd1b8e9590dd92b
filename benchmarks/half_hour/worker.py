"""A row, the process of its own that measures it, and rates.

The process runs in a process group of its own and ends with its parent. Whatever it prints goes to a log.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.half_hour.plan import Setup
from benchmarks.timing import summary
from pipelines.workers import usable_cores

LOG_TAIL = 300
"""Characters of a log that a reason quotes."""
_START_LIMIT_S = 300.0


@dataclass(frozen=True)
class Row:
    """One row of a part."""

    cost_s: float  # estimate; a row starts only where its part has as much time left
    measure: Callable[..., dict[str, Any]]
    """Returns the figures for (setup, \\*args); raises ImportError where a package is missing."""
    args: tuple[Any, ...] = ()
    needs_gpu: bool = False
    grace_s: float = 60.0

    @property
    def limit_s(self) -> float:
        """The row is ended when it takes longer than this."""
        return 2 * self.cost_s + self.grace_s


def measure_row(row: Row, setup: Setup, log: Path, limit_s: float) -> dict[str, Any]:
    """Return a row's figures, or ``reason``: it took longer than ``limit_s``, failed, or lacks a package."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    before = log.stat().st_size
    # The server imports the libraries once, but never uses the GPU; the processes that it forks do.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["benchmarks.half_hour.rows"])
    answers, sender = server.Pipe(duplex=False)
    process = server.Process(target=_serve, args=(row, setup, log, sender))
    process.start()
    sender.close()
    try:
        # The first answer says that the process has started.
        for limit in (_START_LIMIT_S, limit_s):
            if not answers.poll(limit):
                return {"reason": f"out of time after {limit:.0f} s"}
            found: dict[str, Any] = answers.recv()
        return found
    except EOFError:
        process.join()
        said = " ".join(log.read_bytes()[before:].decode(errors="replace").split())[-LOG_TAIL:]
        end = f"its process ended with code {process.exitcode}; {said or 'it printed nothing'}"
        return {"reason": f"failed: {end}"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()


def _serve(row: Row, setup: Setup, log: Path, answers: Connection) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    if setup.device == "cpu":
        # With several threads the tiny operators of a rehearsal would mostly wait for each other.
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    answers.send({})
    start = time.perf_counter()
    try:
        figures = row.measure(setup, *row.args)
        json.dumps(figures, allow_nan=False)
    except ImportError as error:
        figures = {"reason": f"left out: {error}"}
    except Exception as error:
        traceback.print_exc()
        figures = {"reason": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:LOG_TAIL]}"}
    answers.send({**figures, "took_s": round(time.perf_counter() - start, 1)})


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os.killpg(0, signal.SIGKILL)


def rates(
    call: Callable[[], object],
    items: float,
    setup: Setup,
    unit: str = "samples/s",
    *,
    warm_up: int = 3,
    queued: int = 8,
) -> dict[str, Any]:
    """Measure items per second of ``call``, which does the work of ``items`` once, or queues it.

    After ``warm_up`` calls and a first turn come the turns that count. The device is waited for after every
    ``queued`` calls.

    Returns:
        median, low, high and turns, the unit, the share of the host's cores that this process used, and on a
        GPU the peak memory of this process's tensors.
    """

    def turn() -> float:
        num, elapsed, start = 0, 0.0, time.perf_counter()
        while elapsed < setup.size.turn_s:
            for _ in range(queued):
                call()
            setup.settle()
            num += queued
            elapsed = time.perf_counter() - start
        return items * num / elapsed

    for _ in range(warm_up):
        call()
    turn()
    cpu_start, start = time.process_time(), time.perf_counter()
    turns = [turn() for _ in range(setup.size.turns)]
    cpu_share = (time.process_time() - cpu_start) / (time.perf_counter() - start) / usable_cores(0)
    found = {**summary(turns), "unit": unit, "cpu_share": round(cpu_share, 4)}
    if setup.device == "cuda":
        found["peak_mib"] = round(torch.cuda.max_memory_allocated(setup.on) / 2**20, 1)
    return found
