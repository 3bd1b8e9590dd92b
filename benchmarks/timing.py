"""Rates measured in turns: everybody is open and warm, one at a time is asked, then the next.

What a machine does besides, and what it does to one clock or the other, so falls on all alike.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Protocol, cast

_LONGEST_FILL_S = 10.0
_FILL_MARGIN = 1.25
_WARM_UP_SHARE = 0.5


class Closing(Protocol):
    """An iterator that frees what it holds, as generators do."""

    def close(self) -> None:
        """Free it."""


@dataclass(frozen=True)
class Runner:
    """Somebody who takes part in the turns."""

    open: Callable[[], Iterator[object]]
    """Gives an endless iterator; each `next` is one batch."""
    items: float
    """What one batch counts for."""
    queued: int = 0
    """At most so many finished batches wait while nobody asks."""
    round: int = 1
    """Batches come in rounds of so many, one from each worker; a turn ends with a whole round."""
    settle: Callable[[], None] | None = None
    """Waits until everything handed out is done, where `next` returns before; a turn ends with it."""


@dataclass(frozen=True)
class Turns:
    """How often and how long everybody is asked."""

    num: int
    """Turns of each that count; one more comes before as a warm-up."""
    seconds: float
    """Least length of a turn; the last round is waited for."""

    def __post_init__(self) -> None:
        if self.num < 1 or self.seconds <= 0:
            raise ValueError(
                f"{self.num} turns of {self.seconds} s measure nothing; take at least one turn of 0.1 s"
            )


def take_turns(
    runners: Mapping[str, Runner], turns: Turns, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Open all runners, let them take turns, close them.

    Returns:
        For each name its items per second in each turn.
    """
    rates: dict[str, list[float]] = {name: [] for name in runners}
    with ExitStack() as stack:
        opened: dict[str, Iterator[object]] = {}
        for name, runner in runners.items():
            progress(f"opening {name}")
            opened[name] = runner.open()
            stack.enter_context(closing(cast(Closing, opened[name])))
            next(opened[name])
        for turn in range(turns.num + 1):
            for name, runner in runners.items():
                progress(name)
                seconds = turns.seconds if turn else turns.seconds * _WARM_UP_SHARE
                rate = _turn(opened[name], runner, seconds)
                # Having stopped asking, let it fill its queue on its own time and not on the next one's.
                time.sleep(min(_LONGEST_FILL_S, _FILL_MARGIN * runner.queued * runner.items / rate))
                if turn:
                    rates[name].append(rate)
    return rates


def num_steps(runners: Mapping[str, Runner], turns: Turns) -> int:
    """How often `take_turns` reports progress."""
    return len(runners) * (turns.num + 2)


def _turn(batches: Iterator[object], runner: Runner, seconds: float) -> float:
    # Between turns a queue was filled; those batches were made on nobody's time.
    for _ in range(runner.queued):
        next(batches)
    if runner.settle:
        runner.settle()
    num = 0
    start = time.perf_counter()
    while True:
        for _ in range(runner.round):
            next(batches)
        num += runner.round
        elapsed = time.perf_counter() - start
        if elapsed < seconds:
            continue
        if runner.settle:
            runner.settle()
            elapsed = time.perf_counter() - start
        return num * runner.items / elapsed


def summary(rates: list[float]) -> dict[str, Any]:
    """Median, lowest, highest and all turns, for the JSON."""
    return {
        "median": round(statistics.median(rates), 2),
        "low": round(min(rates), 2),
        "high": round(max(rates), 2),
        "turns": [round(rate, 2) for rate in rates],
    }
