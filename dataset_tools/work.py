"""The loop of every conversion: pictures are read and normalised by threads, and written in order."""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from dataset_tools.normalise import BadPicture, Normal, Normalising, normalise
from dataset_tools.parallel import num_workers, ordered_map
from dataset_tools.sources import Source
from pipelines.sets.folder import NO_LABEL

Progress = Callable[[], None]
MAX_BAD = 0.01
"""Share of a source's pictures that may be left out as unusable."""


class TooManyBadError(ValueError):
    """More pictures of a source cannot be used than may be left out."""


def check_share(max_bad: float) -> None:
    """Raise ValueError for what is no share."""
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad is {max_bad}; it is a share of the pictures, from 0 to 1")


def check_bad(bad: Mapping[str, int], count: int, max_bad: float, source: str, last: str) -> None:
    """Raise TooManyBadError where more than the share ``max_bad`` of ``count`` pictures are bad.

    ``bad`` counts them by reason; ``last`` is one of them.
    """
    if (num_bad := sum(bad.values())) > max_bad * count:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in bad.items())
        raise TooManyBadError(
            f"{num_bad:,} of {count:,} pictures of {source} cannot be used ({reasons}), --max-bad "
            f"{max_bad:g} allows {int(max_bad * count):,}; the last is {last}; mend or remove them, or allow "
            "more with --max-bad"
        )


class Writer(Protocol):
    """Where pictures go. Both kinds of set are filled by the same loop."""

    def add(self, index: int, picture: Normal, label: int, path: str) -> None:
        """Store picture ``index`` of the source, which lies at ``path`` there."""

    def skip(self, index: int, path: str, fault: BadPicture) -> None:
        """Leave picture ``index`` out, and count and name it."""


@dataclass(frozen=True)
class Work:
    """What is to be converted and how, whatever the set's format. Unusable values are ValueErrors."""

    source: Source
    how: Normalising
    max_bad: float = MAX_BAD
    """Share of the pictures that may be left out as unusable; one more is a TooManyBadError."""
    limit: int | None = None
    workers: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        check_share(self.max_bad)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1")
        num_workers(self.workers)  # says what is wrong with them now, and not at the first picture

    @property
    def count(self) -> int:
        """Pictures to convert."""
        return len(self.source) if self.limit is None else min(self.limit, len(self.source))

    def advance(self, num_pictures: int = 1) -> None:
        """Tell of pictures that are done."""
        if self.progress is not None:
            for _ in range(num_pictures):
                self.progress()

    def fill(
        self,
        writer: Writer,
        index_of: Callable[[int], int],
        num_places: int,
        bad_before: Mapping[str, int] | None = None,
    ) -> None:
        """Normalise the pictures ``index_of(0) … index_of(num_places − 1)`` and hand them over in order.

        ``bad_before`` counts the bad pictures, by reason, of the rest of the set.
        """
        made = ordered_map(
            lambda place: self._make(index_of(place)), num_places, workers=self.workers, chunk=4
        )
        bad = Counter(bad_before)
        with contextlib.closing(made):
            for picture in made:
                if isinstance(picture.outcome, BadPicture):
                    bad[picture.outcome.reason] += 1
                    self.check_bad(bad, f"{picture.path}: {picture.outcome}")
                    writer.skip(picture.index, picture.path, picture.outcome)
                else:
                    writer.add(picture.index, picture.outcome, picture.label, picture.path)
                self.advance()

    def check_bad(self, bad: Mapping[str, int], last: str) -> None:
        """Raise TooManyBadError where so many bad pictures are too many; see the function of this name."""
        check_bad(bad, self.count, self.max_bad, self.source.name, last)

    def is_bad(self, index: int) -> bool:
        """Whether a picture cannot be used, as it is now."""
        return isinstance(self._make(index).outcome, BadPicture)

    def _make(self, index: int) -> "_Made":
        """Read and normalise one picture; what is wrong with it becomes its outcome."""
        try:
            sample = self.source.read(index)
        except OSError as error:
            fault = BadPicture("cannot be read", error.strerror or str(error))
            return _Made(index, fault, NO_LABEL, self.source.path(index))
        try:
            return _Made(index, normalise(sample.payload, self.how), sample.label, sample.path)
        except BadPicture as error:
            return _Made(index, error, sample.label, sample.path)


@dataclass(frozen=True, slots=True)
class _Made:
    index: int
    outcome: Normal | BadPicture
    label: int
    path: str
