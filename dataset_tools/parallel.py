"""Work spread over threads, results taken in order, a bounded number of them waiting."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipelines.workers import usable_cores

Result = TypeVar("Result")
_AHEAD_PER_WORKER = 4


def ordered_map(
    function: Callable[[int], Result], count: int, *, workers: int | None, chunk: int = 1
) -> Generator[Result, None, None]:
    """Yield ``function(0) … function(count − 1)`` in order, computed by threads.

    ``workers`` None takes all cores. Threads run at most ``4 · workers`` chunks of ``chunk`` items ahead of
    the consumer, so memory does not grow with ``count``. The first exception, in order, is raised here; work
    not yet started is dropped.
    """
    workers = num_workers(workers)

    def run(start: int) -> list[Result]:
        return [function(i) for i in range(start, min(start + chunk, count))]

    pool = ThreadPoolExecutor(workers, thread_name_prefix="dataset-tools")
    try:
        waiting: deque[Future[list[Result]]] = deque()
        for start in range(0, count, chunk):
            waiting.append(pool.submit(run, start))
            if len(waiting) >= _AHEAD_PER_WORKER * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def num_workers(wanted: int | None) -> int:
    """Threads to work with, by default all cores. Raises ValueError for a number that does no work."""
    workers = usable_cores() if wanted is None else wanted
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    return workers
