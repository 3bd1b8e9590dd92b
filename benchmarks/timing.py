"""Rates measured in turns: all runners are opened and warmed up, then measured round-robin.

So other load on the machine, and changes of its clock, affect all runners alike.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, cast

_LONGEST_FILL_S = 10.0
_FILL_MARGIN = 1.25
_WARM_UP_SHARE = 0.5


@dataclass(frozen=True)
class Runner:
    """Something to measure in turns."""

    open: Callable[[], Iterator[object]]  # returns an endless iterator; each `next` is one batch
    items: float  # what one batch counts for
    queued: int = 0  # finished batches that may wait in its queues
    round: int = 1  # batches come in rounds of so many, one from each worker; a turn ends with a whole round
    settle: Callable[[], None] | None = None
    """Waits until everything handed out is done, where `next` returns before; a turn ends with it."""


@dataclass(frozen=True)
class Turns:
    """How often and how long each runner is measured."""

    num: int  # turns of each runner that count, after one that is a warm-up
    seconds: float  # minimum length of a turn; its last round is completed

    def __post_init__(self) -> None:
        if self.num < 1 or self.seconds <= 0:
            raise ValueError(
                f"{self.num} turns of {self.seconds} s measure nothing; take at least one turn of 0.1 s"
            )


def take_turns(
    runners: Mapping[str, Runner], turns: Turns, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Open all runners, measure them in turns, close them; returns name → items per second in each turn."""
    rates: dict[str, list[float]] = {name: [] for name in runners}
    with ExitStack() as stack:
        opened: dict[str, Iterator[object]] = {}
        for name, runner in runners.items():
            progress(f"opening {name}")
            opened[name] = runner.open()
            stack.enter_context(closing(cast(Any, opened[name])))
            next(opened[name])
        for turn in range(turns.num + 1):
            for name, runner in runners.items():
                progress(name)
                seconds = turns.seconds if turn else turns.seconds * _WARM_UP_SHARE
                rates[name].append(_turn(opened[name], runner, seconds))
                # Let the runner fill its queue now, and not in the next runner's turn.
                fill_s = _FILL_MARGIN * runner.queued * runner.items / rates[name][-1]
                time.sleep(min(_LONGEST_FILL_S, fill_s))
    return {name: values[1:] for name, values in rates.items()}


def num_steps(runners: Mapping[str, Runner], turns: Turns) -> int:
    """Return how often `take_turns` reports progress."""
    return len(runners) * (turns.num + 2)


def _turn(batches: Iterator[object], runner: Runner, seconds: float) -> float:
    # The queue was filled between turns; batches that waited in it do not count.
    for _ in range(runner.queued):
        next(batches)
    if runner.settle:
        runner.settle()
    num, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < seconds:
        for _ in range(runner.round):
            next(batches)
        num += runner.round
        elapsed = time.perf_counter() - start
    if runner.settle:
        runner.settle()
        elapsed = time.perf_counter() - start
    return num * runner.items / elapsed


@contextmanager
def sampling(read: Callable[[], float], every_s: float) -> Iterator[list[float]]:
    """Yield a list that a thread extends by ``read()`` every ``every_s`` seconds, until that raises."""
    seen: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(every_s):
            try:
                seen.append(read())
            except Exception:  # such as NVML's errors, which have no other base class
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def summary(rates: list[float], digits: int = 2) -> dict[str, Any]:
    """Return median, lowest, highest and all turns, for the JSON, rounded to so many digits."""
    turns = [round(rate, digits) for rate in rates]
    median = round(statistics.median(rates), digits)
    return {"median": median, "low": min(turns), "high": max(turns), "turns": turns}
