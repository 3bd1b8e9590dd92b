"""The loop of every conversion: pictures are read and normalised by threads, and written in order."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from dataset_tools.normalise import BadPicture, Normal, Normalising, normalise
from dataset_tools.parallel import num_workers, ordered_map
from dataset_tools.sources import Source
from pipelines.listing import NO_LABEL

OnError = Literal["skip", "stop"]
Progress = Callable[[], None]


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
    on_error: OnError = "skip"
    limit: int | None = None
    workers: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.on_error not in get_args(OnError):
            raise ValueError(f"on_error is {self.on_error!r}; known are {', '.join(get_args(OnError))}")
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

    def fill(self, writer: Writer, index_of: Callable[[int], int], num_places: int) -> None:
        """Normalise the pictures ``index_of(0) … index_of(num_places − 1)`` and hand them over in order."""
        made = ordered_map(
            lambda place: self._make(index_of(place)), num_places, workers=self.workers, chunk=4
        )
        with contextlib.closing(made):
            for picture in made:
                self._hand_over(picture, writer)
                self.advance()

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

    def _hand_over(self, picture: "_Made", writer: Writer) -> None:
        outcome = picture.outcome
        if not isinstance(outcome, BadPicture):
            writer.add(picture.index, outcome, picture.label, picture.path)
            return
        if self.on_error == "stop":
            raise ValueError(
                f"{picture.path} cannot be used: {outcome}; mend or remove it, or choose --on-error skip"
            ) from outcome
        writer.skip(picture.index, picture.path, outcome)


@dataclass(frozen=True, slots=True)
class _Made:
    index: int
    outcome: Normal | BadPicture
    label: int
    path: str
