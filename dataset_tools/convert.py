"""Converts a source of images to a compiled set: one ``.beton`` file, or a folder of shards."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from dataset_tools.beton_writer import BetonWriter
from dataset_tools.normalise import BadImage, Normalising, StoredImage
from dataset_tools.shard_claim import claimed, replacing
from dataset_tools.shard_plan import DEFAULT_SHARD_SIZE, Plan
from dataset_tools.shard_set import SUFFIX, finish_set, missing, remove_side_files
from dataset_tools.shard_writer import Keys, ShardsWriter
from dataset_tools.sources import Source
from dataset_tools.work import MAX_BAD, NUM_NAMED, Progress, Work
from pipelines.randomness import EpochOrder
from pipelines.sets.manifest import Manifest, of_kind
from pipelines.sets.shards import set_aside_path


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    manifest: Manifest
    skipped: tuple[str, ...]
    """"path: reason" of the first twenty images left out."""
    num_skipped: int
    """Number of images left out."""
    already_there: bool = False
    """True if the set was complete before and nothing was done."""


@dataclass(frozen=True)
class Sharding:
    """How a set is divided into shards."""

    shard_size: int = DEFAULT_SHARD_SIZE
    """Images of the source per shard."""
    seed: int = 0
    """Seed of the order of the images in the shards."""
    shards: tuple[int, int] | None = None
    """Make only the shards [first, stop); None makes all."""


@dataclass(frozen=True)
class ShardsMade:
    """The result of making some of the shards of a set."""

    made: int
    """Number of shards made now; the other requested ones were complete before."""
    requested: int
    num_shards: int
    """Number of shards of the whole set."""


def convert(
    source: Source,
    out: str | Path,
    how: Normalising | None = None,
    *,
    sharding: Sharding | None = None,
    overwrite: bool = False,
    max_bad: float = MAX_BAD,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Convert ``source`` to a compiled set; :func:`convert_work` with the options of Work as arguments."""
    work = Work(source, how or Normalising(), max_bad, workers=workers, progress=progress)
    return convert_work(work, out, sharding=sharding, overwrite=overwrite)


def convert_work(
    work: Work, out: str | Path, *, sharding: Sharding | None = None, overwrite: bool = False
) -> Converted:
    """Write the compiled set of the images that ``work`` describes.

    The bytes depend on the source and the options, not on the number of threads. Images that cannot be
    decoded are left out, counted in the manifest and listed in the file ``skipped_path``. After an error no
    new ``.beton`` file is left. Complete shards stay, and the next call continues; but the shards of a
    set that was to replace an old one are removed.

    Args:
        work: the source, and how to convert it.
        out: a file (.beton), with its manifest and the list of paths next to it; or a folder (.shards).
        sharding: how to divide a folder; by default as in Sharding.
        overwrite: replace an existing set when the new one is complete.

    Raises:
        ValueError: if an option is unusable, or too few images are usable.
        FileExistsError: if ``out`` exists and ``overwrite`` is off. A complete set of shards of the same
            source and options is kept and is not an error.
        ImportError: if libturbojpeg, which finds damaged images, is missing.
    """
    if Path(out).suffix != SUFFIX:
        if sharding is not None:
            raise ValueError(
                f"{out} is a single file and has no shards; give a folder with the suffix {SUFFIX}"
            )
        return _convert_to_file(work, Path(out), overwrite)
    sharding = Sharding() if sharding is None else sharding
    if sharding.shards is not None:
        raise ValueError("convert makes all shards; call make_shards for some of them")
    return _convert_to_shards(work, Path(out), sharding, overwrite)


# ------------------------------------------------------------------------------------------------------------
# Shards


def make_shards(work: Work, folder: str | Path, sharding: Sharding) -> ShardsMade:
    """Make the shards ``sharding.shards`` of a set; a later :func:`convert` finishes the set.

    It never replaces another set, because machines that share the work would remove each other's shards.

    Raises:
        ValueError: if the set does not have these shards; also as :func:`convert_work` does.
        FileExistsError: as :func:`convert_work` does.
    """
    folder = _shards_folder(folder)
    plan = _plan(work, sharding)
    first, stop = sharding.shards or (0, plan.num_shards)
    if not 0 <= first < stop <= plan.num_shards:
        raise ValueError(
            f"shards is {first}:{stop}; the set has 0:{plan.num_shards}, of {plan.shard_size} images each"
        )
    with claimed(folder, plan) as finished:
        made = 0 if finished else _make_missing(work, folder, plan, range(first, stop))
    return ShardsMade(made, stop - first, plan.num_shards)


def _convert_to_shards(work: Work, folder: Path, sharding: Sharding, overwrite: bool) -> Converted:
    folder = _shards_folder(folder)
    plan = _plan(work, sharding)
    if overwrite and (folder.exists() or set_aside_path(folder).exists()):
        with replacing(folder, plan) as new:
            return _make_all(work, new, plan)
    with claimed(folder, plan) as manifest:
        if manifest is None:
            made = _make_all(work, folder, plan)
            remove_side_files(folder)
            return made
    work.advance(plan.count)
    return Converted(manifest, (), sum(of_kind("skipped", manifest.replaced).values()), already_there=True)


def _make_all(work: Work, folder: Path, plan: Plan) -> Converted:
    """Make the missing shards of a set, its index and its manifest."""
    _make_missing(work, folder, plan, range(plan.num_shards))
    done = finish_set(folder, plan, work)
    return Converted(done.manifest, done.skipped[:NUM_NAMED], len(done.skipped))


def _shards_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.suffix != SUFFIX:
        raise ValueError(f"{folder} does not end in {SUFFIX}; name the folder of the set so")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, a set of shards is a folder; choose another name")
    return folder.resolve() if folder.is_symlink() else folder


def _plan(work: Work, sharding: Sharding) -> Plan:
    if work.how.tier != "jpeg":
        raise ValueError(
            f"shards hold encoded images, tier jpeg; for the tier {work.how.tier} name the output x.beton"
        )
    source = work.source.fingerprint()
    return Plan(source, work.count, sharding.seed, sharding.shard_size, asdict(work.how))


def _make_missing(work: Work, folder: Path, plan: Plan, shards: range) -> int:
    """Make the incomplete ones of ``shards``; return their number."""
    todo, bad = missing(folder, plan, shards, work)
    work.advance(sum(map(len, map(plan.places, set(shards) - set(todo)))))
    if not todo:
        return 0
    order = EpochOrder(plan.seed, 0, plan.count)

    def index_of(place: int) -> int:
        at = plan.places(todo[place // plan.shard_size]).start + place % plan.shard_size
        return int(order[at : at + 1][0])

    keys = Keys(work.source.path(index) for index in range(len(work.source)))
    with ShardsWriter(folder, plan, todo, keys) as writer:
        work.fill(writer, index_of, sum(map(len, map(plan.places, todo))), bad)
    return len(todo)


# ------------------------------------------------------------------------------------------------------------
# One file


def _convert_to_file(work: Work, out: Path, overwrite: bool) -> Converted:
    with BetonWriter(out, capacity=work.count, tier=work.how.tier, overwrite=overwrite) as beton:
        writer = _FileWriter(beton)
        work.fill(writer, lambda place: place, work.count)
        if beton.count == 0:
            raise work.nothing_usable_error(writer.first_skipped)
        assert beton.count + writer.num_skipped == work.count, "images were lost"
        manifest = beton.commit(
            source=work.source.name,
            classes=work.source.classes,
            replaced=dict(sorted((writer.replaced + work.source.passed_over).items())),
            settings={**asdict(work.how), "max_bad": work.max_bad},
        )
    return Converted(manifest, tuple(writer.first_skipped), writer.num_skipped)


class _FileWriter:
    """Writes images into one file, and lists the images left out in a file next to it."""

    def __init__(self, beton: BetonWriter) -> None:
        self.replaced: Counter[str] = Counter()
        self.first_skipped: list[str] = []
        self.num_skipped = 0
        self._beton = beton

    def add(self, index: int, image: StoredImage, label: int, path: str) -> None:  # noqa: ARG002 – in order
        """Write one image."""
        if image.changed:
            self.replaced[f"transcoded: {image.changed}"] += 1
        self._beton.add(image.payload, label=label, width=image.width, height=image.height, source_path=path)

    def skip(self, index: int, path: str, fault: BadImage) -> None:  # noqa: ARG002
        """Count one image as left out and record its name."""
        line = f"{path}: {fault}"
        self.replaced[f"skipped: {fault.reason}"] += 1
        self._beton.skip(line)
        self.num_skipped += 1
        if len(self.first_skipped) < NUM_NAMED:
            self.first_skipped.append(line)
