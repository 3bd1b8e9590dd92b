"""A source of pictures → a compiled set."""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from dataset_tools.beton_writer import DEFAULT_PAGE_BYTES, BetonWriter
from dataset_tools.normalise import BadPicture, Normal, Normalising, normalise
from dataset_tools.parallel import ordered_map
from dataset_tools.sources import Source
from pipelines.cores import usable_cores
from pipelines.listing import NO_LABEL
from pipelines.manifest import Manifest, Tier, source_path_line

OnError = Literal["skip", "stop"]
NUM_NAMED = 20
"""How many of the pictures left out a report names; the file ``X.skipped.txt`` names all."""


@dataclass(frozen=True)
class Converted:
    """The outcome of one conversion."""

    manifest: Manifest
    skipped: tuple[str, ...]
    """"path: reason" of the first twenty pictures left out."""
    num_skipped: int


@dataclass(frozen=True, slots=True)
class _Made:
    outcome: Normal | BadPicture
    label: int
    path: str


def skipped_path(beton_path: str | Path) -> Path:
    """Return the path of the list of pictures left out of ``beton_path``."""
    return Path(beton_path).with_suffix(".skipped.txt")


def convert(
    source: Source,
    out: str | Path,
    *,
    tier: Tier = "jpeg",
    workers: int | None = None,
    quality: int = 95,
    max_side: int | None = None,
    short_side: int | None = None,
    recompress: bool = False,
    verify: bool = True,
    on_error: OnError = "skip",
    limit: int | None = None,
    page_bytes: int = DEFAULT_PAGE_BYTES,
    overwrite: bool = False,
    progress: Callable[[], None] | None = None,
) -> Converted:
    """Compile ``source`` into the file ``out`` (.beton), with its manifest and list of paths beside it.

    The options from ``tier`` to ``verify``, but for ``workers``, are those of Normalising. The bytes written
    depend on the source and the options, not on ``workers`` (None: all cores).
    ``limit`` takes only the first pictures of the source; ``progress`` is called once a picture.
    Pictures that cannot be decoded are left out, counted in the manifest and named in ``out`` with the
    suffix .skipped.txt; with ``on_error="stop"`` the first of them is a ValueError naming it. After any error
    nothing new is left on disk.
    Raises ValueError for an unusable option and where no picture is usable, FileExistsError where ``out``
    exists and ``overwrite`` is off, ImportError without FFCV.
    """
    how = Normalising(
        tier=tier,
        quality=quality,
        max_side=max_side,
        short_side=short_side,
        recompress=recompress,
        verify=verify,
    )
    if on_error not in ("skip", "stop"):
        raise ValueError(f"on_error is {on_error!r}; known are skip, stop")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    workers = usable_cores() if workers is None else workers
    count = len(source) if limit is None else min(limit, len(source))
    replaced: Counter[str] = Counter()
    with (
        BetonWriter(out, capacity=count, tier=tier, page_bytes=page_bytes, overwrite=overwrite) as writer,
        _SkippedList(skipped_path(out)) as skipped,
        contextlib.closing(
            ordered_map(lambda index: _make(source, index, how), count, workers=workers, chunk=4)
        ) as made,
    ):
        for picture in made:
            _take(picture, writer, skipped, replaced, on_error)
            if progress is not None:
                progress()
        if writer.count == 0:
            raise ValueError(
                f"none of the {len(source)} pictures of {source.name} can be used: "
                f"{'; '.join(skipped.first[:3])}; look at them with another program"
            )
        settings = {**asdict(how), "on_error": on_error}
        manifest = writer.commit(
            source=source.name,
            classes=source.classes,
            replaced=dict(sorted(replaced.items())),
            settings=settings,
        )
        skipped.commit()
    return Converted(manifest, tuple(skipped.first), skipped.count)


def _make(source: Source, index: int, how: Normalising) -> _Made:
    """Read and normalise one picture; what is wrong with it becomes its outcome."""
    try:
        sample = source.read(index)
    except OSError as error:
        return _Made(BadPicture("cannot be read", error.strerror or str(error)), NO_LABEL, source.path(index))
    try:
        return _Made(normalise(sample.payload, how), sample.label, sample.path)
    except BadPicture as error:
        return _Made(error, sample.label, sample.path)


def _take(
    picture: _Made, writer: BetonWriter, skipped: "_SkippedList", replaced: Counter[str], on_error: OnError
) -> None:
    """Write one picture, or count and name it as left out."""
    outcome = picture.outcome
    if isinstance(outcome, BadPicture):
        if on_error == "stop":
            raise ValueError(
                f"{picture.path} cannot be used: {outcome}; mend or remove it, or choose --on-error skip"
            ) from outcome
        replaced[f"skipped: {outcome.reason}"] += 1
        skipped.add(f"{picture.path}: {outcome}")
        return
    if outcome.changed:
        replaced[f"transcoded: {outcome.changed}"] += 1
    writer.add(
        outcome.payload,
        label=picture.label,
        width=outcome.width,
        height=outcome.height,
        source_path=picture.path,
    )


class _SkippedList:
    """The text file that names every picture left out; it exists only where there is one."""

    def __init__(self, path: Path) -> None:
        self.first: list[str] = []
        self.count = 0
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._file: BinaryIO | None = None

    def __enter__(self) -> "_SkippedList":
        return self

    def __exit__(self, *error: object) -> None:
        self._partial.unlink(missing_ok=True)
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk, reported already
                self._file.close()

    def add(self, line: str) -> None:
        """Name one picture."""
        if self._file is None:
            self._file = self._partial.open("wb")
        self._file.write(source_path_line(line))
        self.count += 1
        if len(self.first) < NUM_NAMED:
            self.first.append(line)

    def commit(self) -> None:
        """Give the list its name, or remove that of an earlier conversion."""
        if self._file is None:
            self._path.unlink(missing_ok=True)
            return
        self._file.close()
        self._partial.replace(self._path)
