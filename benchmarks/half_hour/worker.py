"""A process that measures rows, one at a time; whoever asks for them can end it when a row takes too long.

    python -m benchmarks.half_hour.worker      (started by benchmarks.half_hour; it reads its work from stdin)

The first line of stdin is the part and the setup as JSON, each further line names a row; each is answered by
one line of JSON on stdout. What libraries print goes to the log. When stdin ends, because the parent closed
it or was killed, the worker ends at once and takes its own child processes along.
"""

import contextlib
import gc
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.half_hour.plan import Row, Setup, rows_of

_LOG_TAIL = 300
_START_LIMIT_S = 300.0


class Worker:
    """The parent's side."""

    def __init__(self, source: str, setup: Setup, log: Path) -> None:
        """Nothing is started before the first row.

        Args:
            source: the part, as in :data:`benchmarks.half_hour.plan.SOURCES`.
            setup: handed to the rows.
            log: gets what the process prints.
        """
        self._job = json.dumps({"source": source, "setup": asdict(setup)})
        self._log, self._on_gpu = log, setup.device == "cuda"
        self._process: subprocess.Popen[bytes] | None = None

    def measure(self, name: str, limit_s: float) -> dict[str, Any]:
        """Measure a row.

        Returns:
            Its figures, or ``reason``, why there are none: it took longer than ``limit_s``, or failed.
        """
        if self._process is None and (
            reason := self._ask(self._start(), self._job, _START_LIMIT_S).get("reason")
        ):
            return {"reason": f"its process did not start: {reason}"}
        assert self._process
        answer = self._ask(self._process, name, limit_s)
        if self._on_gpu and answer.get("reason", "").startswith("failed"):
            self.close()  # a GPU that reported an error may not recover within the process
        return answer

    def _ask(self, process: "subprocess.Popen[bytes]", line: str, limit_s: float) -> dict[str, Any]:
        """Send a line and wait for the answer; a process that gives none is ended."""
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the empty answer shows
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], limit_s)
        if not ready:
            self.close()
            return {"reason": f"out of time after {limit_s:.0f} s"}
        if not (text := process.stdout.readline()):
            code = process.wait()
            self.close()
            return {"reason": f"failed: its process ended with code {code}; {self._last_words()}"}
        answer: dict[str, Any] = json.loads(text)
        return answer

    def close(self) -> None:
        """End the process and its children; the next row starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _start(self) -> "subprocess.Popen[bytes]":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        # In a rehearsal tiny operators would spend their time waiting for each other's threads.
        environment = os.environ if self._on_gpu else {**os.environ, "OMP_NUM_THREADS": "1"}
        with self._log.open("ab") as log:
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.half_hour.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return process

    def _last_words(self) -> str:
        return " ".join(self._log.read_text(errors="replace").split())[-_LOG_TAIL:] or "it said nothing"


def _listen(lines: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        lines.put(line.rstrip("\n"))
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


def main() -> None:
    """The process's side."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_listen, args=(lines,), daemon=True).start()
        job = json.loads(lines.get())
        rows = rows_of(job["source"], Setup.from_json(job["setup"]))
        answer: dict[str, Any] = {}
        while True:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
            answer = _measured(rows[lines.get()])


if __name__ == "__main__":
    main()
