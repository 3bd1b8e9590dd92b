"""What the commands print: results on stdout, one per line; progress bars and errors on stderr."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import rich.progress
from rich.console import Console
from rich.text import Text

from dataset_tools.work import NUM_NAMED, Progress
from training.cli import console

error_console = Console(stderr=True, highlight=False, soft_wrap=True)
"""Standard error."""
_SHOW_AFTER_S = 2.0
_UPDATE_EVERY_S = 0.1


def print_line(text: str, *, out: Console = console, style: str | None = None) -> None:
    """Print one line as it is: no wrapping, and no markup from file names."""
    out.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Replace the bytes of file names that are not UTF-8 by ``\\udc…``."""
    return text.encode(errors="backslashreplace").decode()


def pace(count: int, seconds: float) -> str:
    """Count, time and rate."""
    return f"{count:,} in {seconds:.1f} s ({count / max(seconds, 1e-9):,.0f}/s)"


def print_left_out(
    names: Path, replaced: Mapping[str, int], skipped: Sequence[str], num_skipped: int
) -> None:
    """Print how many images were encoded again or left out, and the names of the first ones left out.

    Args:
        names: the file that lists all images left out.
        replaced: reason → number of images, as in the manifest.
        skipped: "path: reason" of at least the first ``NUM_NAMED`` images left out.
        num_skipped: number of images left out.
    """
    for reason, count in replaced.items():
        print_line(f"{count:,} {reason}")
    for named in skipped[:NUM_NAMED]:
        print_line(f"  {named}")
    if num_skipped > NUM_NAMED:
        print_line(f"  … and {num_skipped - NUM_NAMED:,} more; all are in {names}")


# ------------------------------------------------------------------------------------------------------------
# Progress


class _Rate(rich.progress.ProgressColumn):
    """Items per second."""

    def render(self, task: rich.progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


@contextlib.contextmanager
def track(total: int, description: str) -> Iterator[Progress]:
    """Yield a function to call after each of ``total`` items.

    On a terminal, a bar with the rate and the remaining time appears after two seconds. Elsewhere nothing is
    written.
    """
    if not error_console.is_terminal:
        yield lambda: None
        return
    columns = (
        rich.progress.TextColumn(description),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        _Rate(),
        rich.progress.TimeRemainingColumn(),
    )
    bar = rich.progress.Progress(*columns, console=error_console, transient=True)
    task = bar.add_task(description, total=total)
    started = drawn = time.monotonic()
    done, shown = 0, False

    def advance() -> None:
        nonlocal done, drawn, shown
        done += 1
        now = time.monotonic()
        if now - drawn < _UPDATE_EVERY_S and done < total:
            return
        drawn = now
        if not shown and now - started > _SHOW_AFTER_S:
            bar.start()
            shown = True
        bar.update(task, completed=done)

    try:
        yield advance
    finally:
        bar.stop()


@contextlib.contextmanager
def count_up(description: str) -> Iterator[Progress]:
    """Like :func:`track`, for an unknown number of items: shows a count instead of a bar."""
    if not error_console.is_terminal:
        yield lambda: None
        return
    done, drawn = 0, time.monotonic() + _SHOW_AFTER_S

    with error_console.status(description) as status:

        def advance() -> None:
            nonlocal done, drawn
            done += 1
            if (now := time.monotonic()) - drawn > _UPDATE_EVERY_S:
                drawn = now
                status.update(f"{description}: {done:,}")

        yield advance
