"""The loop of every conversion: threads read and normalise images, and a writer stores them in order."""

import contextlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from dataset_tools.normalise import BadImage, Normalising, StoredImage, normalise
from dataset_tools.sources import Source
from pipelines.sets.folder import NO_LABEL
from pipelines.workers import usable_cores

Progress = Callable[[], None]
"""Called once for each item that is done."""
Result = TypeVar("Result")
MAX_BAD = 0.01
"""Default for the share of a source's images that may be left out as unusable."""
NUM_NAMED = 20
"""Number of images that a report names."""
_CHUNKS_AHEAD_PER_WORKER = 4


class TooManyBadError(ValueError):
    """More images of a source are unusable than may be left out."""


def check_share(max_bad: float) -> None:
    """Raise ValueError if ``max_bad`` is not a share."""
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad is {max_bad}; it is a share of the images, from 0 to 1")


def check_bad(bad: Mapping[str, int], count: int, max_bad: float, source: str, last: str) -> None:
    """Raise TooManyBadError if more than the share ``max_bad`` of ``count`` images are bad.

    Args:
        bad: reason → number of bad images.
        count: number of images in all.
        max_bad: the share allowed, 0 … 1.
        source: name of the source, for the error message.
        last: "path: reason" of one bad image, for the error message.
    """
    if (num_bad := sum(bad.values())) > max_bad * count:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in bad.items())
        raise TooManyBadError(
            f"{num_bad:,} of {count:,} images of {source} cannot be used ({reasons}), --max-bad "
            f"{max_bad:g} allows {int(max_bad * count):,}; the last is {last}; repair or remove them, or "
            "allow more with --max-bad"
        )


class Writer(Protocol):
    """Stores the images of a set; each kind of set has its own writer."""

    def add(self, index: int, image: StoredImage, label: int, path: str) -> None:
        """Store image ``index`` of the source, which has the path ``path`` there."""

    def skip(self, index: int, path: str, fault: BadImage) -> None:
        """Leave image ``index`` out; count it and record its name."""


@dataclass(frozen=True)
class Work:
    """The options of a conversion to either kind of set. Raises ValueError for unusable values."""

    source: Source
    how: Normalising
    max_bad: float = MAX_BAD
    """Share of the images that may be left out as unusable; more is a TooManyBadError."""
    limit: int | None = None
    """Number of images to take, from the first on; None takes all."""
    workers: int | None = None
    """Number of threads; None takes all cores."""
    progress: Progress | None = None
    """Called once per image."""

    def __post_init__(self) -> None:
        check_share(self.max_bad)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1")
        num_workers(self.workers)  # raises now for an unusable number, not at the first image

    @property
    def count(self) -> int:
        """Number of images to convert."""
        return len(self.source) if self.limit is None else min(self.limit, len(self.source))

    def advance(self, num_images: int) -> None:
        """Report images that were done before."""
        if self.progress is not None:
            for _ in range(num_images):
                self.progress()

    def fill(
        self,
        writer: Writer,
        index_of: Callable[[int], int],
        num_places: int,
        bad_before: Mapping[str, int] | None = None,
    ) -> None:
        """Normalise images and give them to the writer in order.

        Args:
            writer: receives every image.
            index_of: place → index in the source; called for the places 0 … ``num_places`` − 1.
            num_places: number of images.
            bad_before: reason → number of bad images in the rest of the set.

        Raises:
            TooManyBadError: if too many images of the set are bad.
        """
        made = ordered_map(
            lambda place: self._prepare(index_of(place)),
            num_places,
            workers=self.workers,
            progress=self.progress,
            chunk=4,
        )
        bad = Counter(bad_before)
        with contextlib.closing(made):
            for image in made:
                if isinstance(image.outcome, BadImage):
                    bad[image.outcome.reason] += 1
                    self.check_bad(bad, f"{image.path}: {image.outcome}")
                    writer.skip(image.index, image.path, image.outcome)
                else:
                    writer.add(image.index, image.outcome, image.label, image.path)

    def check_bad(self, bad: Mapping[str, int], last: str) -> None:
        """Raise TooManyBadError if there are too many bad images; arguments as in :func:`check_bad`."""
        check_bad(bad, self.count, self.max_bad, self.source.name, last)

    def nothing_usable_error(self, skipped: Sequence[str]) -> ValueError:
        """The error for a source without a usable image; ``skipped`` is "path: reason" of each of them."""
        return ValueError(
            f"none of the {self.count} images of {self.source.name} can be used: {'; '.join(skipped[:3])}; "
            "open some of them with another program to see why"
        )

    def is_bad(self, index: int) -> bool:
        """Whether an image, as it is now, is unusable."""
        return isinstance(self._prepare(index).outcome, BadImage)

    def _prepare(self, index: int) -> "_Prepared":
        """Read and normalise one image."""
        try:
            sample = self.source.read(index)
        except OSError as error:
            fault = BadImage("cannot be read", error.strerror or str(error))
            return _Prepared(index, fault, NO_LABEL, self.source.path(index))
        try:
            return _Prepared(index, normalise(sample.payload, self.how), sample.label, sample.path)
        except BadImage as error:
            return _Prepared(index, error, sample.label, sample.path)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An image that is ready for the writer, or the reason why it is unusable."""

    index: int
    outcome: StoredImage | BadImage
    label: int
    path: str


# ------------------------------------------------------------------------------------------------------------
# Threads


def ordered_map(
    function: Callable[[int], Result],
    count: int,
    *,
    workers: int | None,
    progress: Progress | None = None,
    chunk: int = 1,
) -> Generator[Result, None, None]:
    """Yield ``function(0) … function(count − 1)`` in order, computed by threads.

    The threads run a bounded number of items ahead of the consumer, so memory does not grow with ``count``.
    The first exception, in order, is raised here; work that has not started is dropped.

    Args:
        function: called from several threads.
        count: number of items.
        workers: number of threads; None takes all cores.
        progress: called when the consumer is done with an item.
        chunk: number of items that a thread takes at a time.
    """
    workers = num_workers(workers)

    def run(start: int) -> list[Result]:
        return [function(i) for i in range(start, min(start + chunk, count))]

    pool = ThreadPoolExecutor(workers, thread_name_prefix="dataset-tools")
    waiting: deque[Future[list[Result]]] = deque()
    starts = iter(range(0, count, chunk))
    try:
        while True:
            for start in itertools.islice(starts, _CHUNKS_AHEAD_PER_WORKER * workers - len(waiting)):
                waiting.append(pool.submit(run, start))
            if not waiting:
                return
            for result in waiting.popleft().result():
                yield result
                if progress is not None:
                    progress()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def num_workers(workers: int | None) -> int:
    """Number of threads; None takes all cores. Raises ValueError for less than one."""
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    return workers
