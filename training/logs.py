"""The log of a run: JSON lines, TensorBoard, and one line on the terminal.

Metrics are summed on their device and fetched every few seconds, so that the loop does not wait for the
device at each step.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from training.checkpoint import latest
from training.files import write_atomically

Value = float | int | str | None


class NonFiniteLoss(Exception):
    """The loss or the weights became NaN or infinite."""


def recovery_advice(run_dir: Path) -> str:
    """Advice at the end of an error message: how to continue a diverged run from its last checkpoint."""
    good = latest(run_dir)
    remedy = "a lower --lr, or --precision bf16 or fp32"
    if good is None:
        return f"no epoch was finished, so there is no checkpoint; start again in a new --out with {remedy}"
    return f"the last good state is {good}; continue from it with --resume and {remedy}"


class RunLog:
    """Collects the metrics of steps and writes their means every few seconds, on the main process only.

    It writes ``tensorboard/`` and ``metrics.jsonl``, one JSON object per line; a resumed run appends. A row
    of kind "step" has first_step and step (inclusive), epoch, time_s (Unix time), samples_per_s, wait_percent
    (share of the time spent waiting for data), and the mean of each metric, null if it is not finite.
    """

    def __init__(
        self,
        run_dir: Path,
        is_main: bool,
        *,
        total_steps: int,
        first_step: int = 0,
        every_s: float = 5.0,
        plain_every_s: float = 30.0,
        about: str = "",
        console: Console | None = None,
    ) -> None:
        """Open the files.

        Args:
            run_dir: the run's folder.
            is_main: whether this is the main process.
            total_steps: steps of the whole run.
            first_step: the first step of a resumed run. Rows from this step on are dropped: a killed run
                wrote them after its last checkpoint, and these steps are run again.
            every_s: seconds between rows.
            plain_every_s: seconds between printed lines if the output is not a terminal.
            about: explanation of the metrics, shown in TensorBoard.
            console: the terminal; by default standard output.
        """
        self.is_main = is_main
        if not is_main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "metrics.jsonl"
        _keep_rows_before(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)
        self._board.add_text("about", about)
        self._total_steps, self._every_s, self._plain_every_s = total_steps, every_s, plain_every_s
        self._terminal = _Terminal(console or Console(), total_steps, first_step)
        self._sums: dict[str, Tensor | float] = {}
        self._losses: list[Tensor | float] = []
        self._num_steps = self._num_samples = self._epoch = 0
        self._last_step = first_step
        self._wait_s = 0.0
        # The first row is written after a second, so that a bad start is visible at once.
        self._window_start = time.monotonic()
        self._next_flush = self._window_start + min(1.0, every_s)
        self._next_plain = self._window_start

    def step(
        self,
        step: int,
        metrics: Mapping[str, Tensor | float],
        *,
        epoch: int = 0,
        samples: int = 0,
        wait_s: float = 0.0,
    ) -> None:
        """Add the metrics of a step, and flush if it is time.

        Args:
            step: number of the step.
            metrics: numbers or 0-d tensors, which stay on their device. All steps between two flushes must
                have the same names.
            epoch: of the step.
            samples: in the step, over all processes.
            wait_s: seconds spent waiting for its batch.

        Raises:
            NonFiniteLoss: at a flush.
        """
        if not self.is_main:
            return
        for name, value in metrics.items():
            value = value.detach().double() if isinstance(value, Tensor) else float(value)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._losses.append(metrics.get("loss", 0.0))
        self._num_steps += 1
        self._num_samples += samples
        self._wait_s += wait_s
        self._last_step, self._epoch = step, epoch
        self._terminal.advance(step)
        if time.monotonic() >= self._next_flush:
            self.flush()

    def flush(self) -> None:
        """Write the means since the last flush. Raises NonFiniteLoss if the mean loss is not finite."""
        if not self.is_main or self._num_steps == 0:
            return
        means = self._fetch_means()
        now = time.monotonic()
        elapsed_s = max(now - self._window_start, 1e-9)
        first_step = self._last_step - self._num_steps + 1
        row: dict[str, Value] = {
            "kind": "step",
            "first_step": first_step,
            "step": self._last_step,
            "epoch": self._epoch,
            "samples_per_s": self._num_samples / elapsed_s,
            "wait_percent": 100 * self._wait_s / elapsed_s,
        }
        self._write(row | means)
        self._terminal.show(row | means, plain=now >= self._next_plain)
        if now >= self._next_plain:
            self._next_plain = now + self._plain_every_s
        self._sums, self._num_steps, self._num_samples, self._wait_s = {}, 0, 0, 0.0
        self._window_start, self._next_flush = now, now + self._every_s
        self._check_loss(first_step, means)

    def _check_loss(self, first_step: int, means: Mapping[str, float]) -> None:
        losses, self._losses = self._losses, []
        if math.isfinite(means.get("loss", 0.0)):
            return
        values = torch.stack([torch.as_tensor(loss) for loss in losses]).tolist()
        bad = next(n for n, value in enumerate(values) if not math.isfinite(value))
        raise NonFiniteLoss(
            f"the loss became {values[bad]} in step {first_step + bad} (learning rate "
            f"{means.get('lr', math.nan):.3g}); {recovery_advice(self._path.parent)}"
        )

    def _fetch_means(self) -> dict[str, float]:
        """The means, in one transfer for all tensors."""
        totals = {name: value for name, value in self._sums.items() if isinstance(value, float)}
        tensors = {name: value for name, value in self._sums.items() if isinstance(value, Tensor)}
        if tensors:
            totals |= zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True)
        return {name: total / self._num_steps for name, total in totals.items()}

    def busy(self, what: str) -> None:
        """Show a task other than training on the progress line."""
        if self.is_main:
            self._terminal.busy(what)

    def event(self, row: Mapping[str, Value]) -> None:
        """Write a row such as {"kind": "eval", "knn_top1": 0.62}, after the steps so far."""
        if not self.is_main:
            return
        if "kind" not in row or row["kind"] == "step":
            raise ValueError(f"an event is {dict(row)}; give it a kind other than 'step'")
        self.flush()
        self._write({"step": self._last_step} | dict(row))
        self._terminal.print(row)
        # The time of the event, such as an evaluation, does not count as the steps' time.
        self._window_start = time.monotonic()

    def _write(self, row: Mapping[str, Value]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps({"time_s": round(time.time(), 3)} | finite) + "\n")
        self._file.flush()
        for name, value in row.items():
            if isinstance(value, (int, float)) and name not in ("step", "first_step"):
                self._board.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def close(self, *, flush: bool = True) -> None:
        """Close the files, after writing the steps so far if ``flush`` is set."""
        if not self.is_main or self._file.closed:
            return
        try:
            if flush:
                self.flush()
        finally:
            self._file.close()
            self._board.close()
            self._terminal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error, a flush could raise another one, or wait forever for the device.
        self.close(flush=error is None)


def _keep_rows_before(path: Path, step: int) -> None:
    """Drop the rows from ``step`` on, and an incomplete last line of a killed run."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] < step]
    if kept != lines:
        write_atomically(path, lambda file: file.writelines(kept))


_SHOWN = {
    "loss": "loss",
    "lr": "lr",
    "train_top1": "training top-1",
    "pos_sim": "pos",
    "neg_sim": "neg",
    "feature_std": "std",
}
"""Metrics that the terminal shows, and their names there."""


class _Terminal:
    """A progress bar on a terminal; occasional plain lines on other outputs."""

    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        self._console, self._total_steps = console, total_steps
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console
            )
            self._task: TaskID = self._progress.add_task("", total=total_steps, completed=first_step)
            self._progress.start()

    def advance(self, step: int) -> None:
        if self._progress:
            self._progress.update(self._task, completed=step + 1)

    def show(self, row: Mapping[str, Value], plain: bool) -> None:
        parts = [f"epoch {row['epoch']}", f"step {row['step']}/{self._total_steps}"]
        parts += [f"{row['samples_per_s']:.0f} samples/s"]
        parts += [f"{word} {row[name]:.4g}" for name, word in _SHOWN.items() if name in row]
        filled = row.get("queue_filled", 1.0)
        if isinstance(filled, float) and filled < 1:
            parts.append(f"queue {100 * filled:.0f} % filled, the loss rises until it is full")
        line = "  ".join([*parts, f"data wait {row['wait_percent']:.0f} %"])
        if self._progress:
            self._progress.update(self._task, description=line)
        elif plain:
            self._console.print(line, highlight=False, soft_wrap=True)

    def busy(self, what: str) -> None:
        if self._progress:
            self._progress.update(self._task, description=what)

    def print(self, row: Mapping[str, Value]) -> None:
        words = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.items()
        ]
        self._console.print("  ".join(words), highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()


@contextlib.contextmanager
def progress(console: Console, what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a bar with rate and time left, and print a line at the end.

    Args:
        console: where to show it; without a terminal only the last line is printed.
        what: name of the task.
        total: number of samples; None if unknown.

    Yields:
        The function to call with the number of further samples done.
    """
    start, done, line = time.perf_counter(), 0, what
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)

        def advance(num: int) -> None:
            nonlocal done, line
            done += num
            line = f"{what}: {done:,} ({done / (time.perf_counter() - start):,.0f}/s)"
            bar.update(task, advance=num, description=line)

        yield advance
    console.print(line)
