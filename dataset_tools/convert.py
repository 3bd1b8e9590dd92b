"""A source of pictures → a compiled set: one ``.beton`` file, or a folder of shards."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from dataset_tools.beton_writer import DEFAULT_PAGE_BYTES, BetonWriter
from dataset_tools.keys import Keys
from dataset_tools.normalise import BadPicture, Normal, Normalising
from dataset_tools.report import NUM_NAMED
from dataset_tools.shard_claim import claimed, replacing
from dataset_tools.shard_plan import DEFAULT_SHARD_SIZE, Plan, plan_for
from dataset_tools.shard_set import SUFFIX, finish, missing, remove_sides
from dataset_tools.shard_writer import ShardsWriter
from dataset_tools.sources import Source
from dataset_tools.work import MAX_BAD, Progress, Work
from pipelines.randomness import EpochOrder
from pipelines.sets.manifest import Manifest, Tier, of_kind
from pipelines.sets.shards import set_aside


@dataclass(frozen=True)
class Converted:
    """The outcome of one conversion."""

    manifest: Manifest
    skipped: tuple[str, ...]
    """"path: reason" of the first twenty pictures left out."""
    num_skipped: int
    already_there: bool = False
    """The set was complete before, nothing was done."""


@dataclass(frozen=True)
class Sharding:
    """How a set is divided among tars."""

    shard_size: int = DEFAULT_SHARD_SIZE
    """Pictures of the source per shard."""
    seed: int = 0
    """Of the order in which pictures lie in the shards."""
    shards: tuple[int, int] | None = None
    """Make only the shards [first, stop); None: all."""


@dataclass(frozen=True)
class ShardsMade:
    """The outcome of a conversion that was asked for some of the shards and did not end the set."""

    made: int
    """Shards made now; the others asked for were whole."""
    asked: int
    num_shards: int
    """Of the whole set."""


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
    max_bad: float = MAX_BAD,
    limit: int | None = None,
    page_bytes: int = DEFAULT_PAGE_BYTES,
    sharding: Sharding | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Compile ``source`` into ``out``: a file (.beton) with its manifest and list of paths beside it, or a
    folder (.shards) with them inside.

    The options from ``tier`` to ``verify``, but for ``workers``, are those of Normalising. The bytes written
    depend on the source and the options, not on ``workers`` (None: all cores).
    ``limit`` takes only the first pictures of the source; ``page_bytes`` is for files, ``sharding`` for
    shards; ``progress`` is called once a picture.
    Pictures that cannot be decoded are left out, counted in the manifest and named in the list that
    ``skipped_path`` tells. It is an error if they are more than the share ``max_bad`` of the source.
    After any error nothing new is left of a file. Of shards those that are whole stay, unless they were to
    replace others, and the next call goes on.
    Raises ValueError for an unusable option and where no picture, or too few, can be used, FileExistsError
    where ``out`` exists and ``overwrite`` is off (shards made of the same source with the same options are
    taken as they are), ImportError without libturbojpeg, which finds damaged pictures.
    """
    how = Normalising(
        tier=tier,
        quality=quality,
        max_side=max_side,
        short_side=short_side,
        recompress=recompress,
        verify=verify,
    )
    work = Work(source, how, max_bad, limit, workers, progress)
    return compile_set(work, out, page_bytes=page_bytes, sharding=sharding, overwrite=overwrite)


def compile_set(
    work: Work,
    out: str | Path,
    *,
    page_bytes: int = DEFAULT_PAGE_BYTES,
    sharding: Sharding | None = None,
    overwrite: bool = False,
) -> Converted:
    """Like ``convert``, of work that is described already."""
    if Path(out).suffix != SUFFIX:
        if sharding is not None:
            raise ValueError(f"{out} is to be one file, which has no shards; name a folder {SUFFIX} for them")
        return _convert_to_file(work, Path(out), page_bytes, overwrite)
    sharding = Sharding() if sharding is None else sharding
    if sharding.shards is not None:
        raise ValueError("convert makes all shards; call make_shards for some of them")
    return _convert_to_shards(work, Path(out), sharding, overwrite)


# ------------------------------------------------------------------------------------------------------------
# Shards


def make_shards(work: Work, folder: str | Path, sharding: Sharding) -> ShardsMade:
    """Make the shards that ``sharding`` asks for, and leave the set's end to a later ``convert``.

    Never replaces another set, as machines that share the work would remove each other's shards.
    Raises as ``convert`` does, and ValueError for shards that the set does not have.
    """
    folder = _shards_folder(folder)
    plan = _plan(work, sharding)
    first, stop = sharding.shards or (0, plan.num_shards)
    if not 0 <= first < stop <= plan.num_shards:
        raise ValueError(
            f"the shards {first}:{stop} are asked for; the set has 0:{plan.num_shards}, of "
            f"{plan.shard_size} pictures each"
        )
    with claimed(folder, plan) as finished:
        made = 0 if finished else _make_missing(work, folder, plan, range(first, stop))
    return ShardsMade(made, stop - first, plan.num_shards)


def _convert_to_shards(work: Work, folder: Path, sharding: Sharding, overwrite: bool) -> Converted:
    folder = _shards_folder(folder)
    plan = _plan(work, sharding)
    if overwrite and (folder.exists() or set_aside(folder).exists()):
        with replacing(folder, plan) as new:
            return _make_all(work, new, plan)
    with claimed(folder, plan) as manifest:
        if manifest is None:
            made = _make_all(work, folder, plan)
            remove_sides(folder)
            return made
    work.advance(plan.count)
    return Converted(manifest, (), sum(of_kind("skipped", manifest.replaced).values()), already_there=True)


def _make_all(work: Work, folder: Path, plan: Plan) -> Converted:
    """Make what is missing of a set, and its end."""
    _make_missing(work, folder, plan, range(plan.num_shards))
    done = finish(folder, plan, work)
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
            f"shards hold encoded pictures, tier jpeg; for the tier {work.how.tier} name the output x.beton"
        )
    return plan_for(
        work.source, work.count, asdict(work.how), seed=sharding.seed, shard_size=sharding.shard_size
    )


def _make_missing(work: Work, folder: Path, plan: Plan, shards: range) -> int:
    """Make those of ``shards`` that are not whole; return how many."""
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


def _convert_to_file(work: Work, out: Path, page_bytes: int, overwrite: bool) -> Converted:
    with BetonWriter(
        out, capacity=work.count, tier=work.how.tier, page_bytes=page_bytes, overwrite=overwrite
    ) as beton:
        writer = _FileWriter(beton)
        work.fill(writer, lambda place: place, work.count)
        if beton.count == 0:
            raise ValueError(
                f"none of the {work.count} pictures of {work.source.name} can be used: "
                f"{'; '.join(writer.first_skipped[:3])}; look at them with another program"
            )
        assert beton.count + writer.num_skipped == work.count, "pictures were lost"
        manifest = beton.commit(
            source=work.source.name,
            classes=work.source.classes,
            replaced=dict(sorted((writer.replaced + work.source.passed_over).items())),
            settings={**asdict(work.how), "max_bad": work.max_bad},
        )
    return Converted(manifest, tuple(writer.first_skipped), writer.num_skipped)


class _FileWriter:
    """Pictures into one file, their faults into the list beside it."""

    def __init__(self, beton: BetonWriter) -> None:
        self.replaced: Counter[str] = Counter()
        self.first_skipped: list[str] = []
        self.num_skipped = 0
        self._beton = beton

    def add(self, index: int, picture: Normal, label: int, path: str) -> None:  # noqa: ARG002 – the order is the source's
        """Write one picture."""
        if picture.changed:
            self.replaced[f"transcoded: {picture.changed}"] += 1
        self._beton.add(
            picture.payload, label=label, width=picture.width, height=picture.height, source_path=path
        )

    def skip(self, index: int, path: str, fault: BadPicture) -> None:  # noqa: ARG002
        """Count and name one picture as left out."""
        line = f"{path}: {fault}"
        self.replaced[f"skipped: {fault.reason}"] += 1
        self._beton.skip(line)
        self.num_skipped += 1
        if len(self.first_skipped) < NUM_NAMED:
            self.first_skipped.append(line)
