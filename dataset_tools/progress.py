"""A progress bar that shows up only where somebody looks and only where it takes a while."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[[], None]
"""Called once for each item done."""
_SHOW_AFTER_S = 2.0
_UPDATE_EVERY_S = 0.1


class _Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


@contextlib.contextmanager
def track(total: int, description: str, console: Console) -> Iterator[Advance]:
    """Yield a function to call after each of ``total`` items.

    On a terminal a bar with rate and time left appears once two seconds have passed; elsewhere nothing is
    written.
    """
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
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
def count_up(description: str, console: Console) -> Iterator[Advance]:
    """Like :func:`track`, for work whose end is not known: a count in the place of a bar."""
    if not console.is_terminal:
        yield lambda: None
        return
    done, drawn = 0, time.monotonic() + _SHOW_AFTER_S

    with console.status(description) as status:

        def advance() -> None:
            nonlocal done, drawn
            done += 1
            if (now := time.monotonic()) - drawn > _UPDATE_EVERY_S:
                drawn = now
                status.update(f"{description}: {done:,}")

        yield advance
