"""A folder in which a set of shards is made: who may make it, what is left to do, and the end of it."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset_tools.disk import Lock, aside, exchange, lock
from dataset_tools.shard_plan import (
    Part,
    Plan,
    numbered_files,
    whole_part,
)
from dataset_tools.work import Work
from engine.checkpoint import sync_folder, write_atomically
from pipelines.manifest import Manifest, Shard, manifest_path, source_path_line
from pipelines.shards import (
    INDEX_DTYPE,
    INDEX_NAME,
    PENDING_INDEX_NAME,
    PLAN_NAME,
    index_hint,
    index_in_force,
    open_shards,
    set_digest,
)

SUFFIX = ".shards"
"""Of the name of a folder that a conversion makes."""
SKIPPED_NAME = "skipped.txt"
PLAN_KEY = "plan"
"""The setting in a manifest that holds the plan's hash; only a set that was converted has it."""
_GO_ON = "run the same conversion again, which keeps whole shards"


@dataclass(frozen=True)
class Finished:
    """A set of shards with its index."""

    manifest: Manifest
    skipped: tuple[str, ...]
    """"path: reason" of every picture left out, in the order of the source."""


@contextlib.contextmanager
def claimed(folder: Path, plan: Plan) -> Iterator[Manifest | None]:
    """Take the folder for a conversion, which other machines may share; gives the manifest if it is done.

    Makes the folder and writes the plan into it. Raises FileExistsError where another plan is being, or has
    been, carried out there, where tars lie there that no conversion made, or where it is being replaced.
    """
    put_back(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finished = finished_before(folder, replaced=False)
    if finished is not None:
        if (made_by := finished.settings.get(PLAN_KEY)) is None:
            raise _indexed(folder)
        if made_by != plan.digest:
            raise FileExistsError(
                f"{folder} exists already, made of other pictures or with other options; choose another name "
                "or add --overwrite"
            )
        open_shards(folder)  # says what is missing
        _settle_index(folder, finished)
        remove_sides(folder)
        yield finished
        return
    _refuse_foreign(folder, None)
    if Plan.read(folder) is None:
        # Of machines that begin at once, one finds its temporary file renamed by another.
        with contextlib.suppress(FileNotFoundError):
            plan.write(folder)
    begun = Plan.read(folder)
    if begun != plan:
        differences = "no plan" if begun is None else plan.differences(begun)
        raise FileExistsError(
            f"another conversion has begun in {folder} (it has {differences}); finish that one, choose "
            "another name or add --overwrite"
        )
    descriptor = lock(folder / PLAN_NAME, shared=True, target=folder)
    try:
        for path, number in numbered_files(folder).items():
            if number >= plan.num_shards:
                path.unlink(missing_ok=True)
        yield None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(folder: Path, plan: Plan) -> Iterator[Path]:
    """A folder beside ``folder`` to make a set in; at the end of the block, checked, it takes its place.

    The old set stands until then. After an error the new folder stays, and the next call with the same plan
    goes on with it. Files in the old folder that are not the set's are kept.
    Raises FileExistsError where what lies there was not made by a conversion, or is being made.
    """
    folder = folder.resolve()
    new, shared = folder.with_name(f".{folder.name}.maskmix-new"), folder / PLAN_NAME
    if folder.is_mount():
        raise ValueError(
            f"{folder} is a mount point, whose set cannot be exchanged; convert to a new name in it"
        )
    claim = Lock(folder)
    try:
        put_back(folder)
        finished = finished_before(folder, replaced=True)
        if finished is not None and PLAN_KEY not in finished.settings:
            raise _indexed(folder)
        _refuse_foreign(folder, finished)
        with contextlib.ExitStack() as at_work:
            if shared.exists():
                at_work.callback(os.close, lock(shared, target=folder))
            new.mkdir(exist_ok=True)
            if Plan.read(new) != plan:
                _clear(new)
                plan.write(new)
            yield new
            open_shards(new)
            # A plan marks what is to be gone on with, which the old folder is not once it has the new name.
            shared.unlink(missing_ok=True)
            exchange(new, folder)
            sync_folder(folder.parent)
        remove_sides(folder)
        _retire(new, folder)
    finally:
        claim.release()


def _indexed(folder: Path) -> FileExistsError:
    return FileExistsError(
        f"{folder} is a set that was indexed where it lay, not converted; its tars are never replaced, "
        "choose another name"
    )


def put_back(folder: Path) -> None:
    """End an exchange of folders in which a process was killed."""
    if aside(folder).exists():
        if folder.exists():
            _retire(aside(folder), folder)
        else:
            aside(folder).rename(folder)


def _retire(old: Path, folder: Path) -> None:
    """Remove a set that the one in ``folder`` has replaced; files that are not the set's go there."""
    _clear(old)
    for file in old.iterdir():
        if not (folder / file.name).exists():
            file.rename(folder / file.name)
    with contextlib.suppress(OSError):  # a file of a name that is taken stays where it was
        old.rmdir()


def finished_before(folder: Path, *, replaced: bool) -> Manifest | None:
    """The manifest of a finished set; a damaged one counts as none where it is to be replaced."""
    try:
        return Manifest.read(folder)
    except ValueError:
        if replaced:
            return None
        raise


def _refuse_foreign(folder: Path, finished: Manifest | None) -> None:
    """Tars that stand neither in a manifest of ours nor beside a plan or a side file are somebody's data."""
    if (folder / PLAN_NAME).exists():
        return
    known = {shard.name for shard in finished.shards} if finished else set()
    for tar in sorted(folder.glob("*.tar")):
        if tar.name not in known and not tar.with_suffix(".part.npz").exists():
            raise FileExistsError(
                f"{tar} was not made by a conversion; {index_hint(folder)}, or choose another name for the "
                "new set"
            )


def _clear(folder: Path) -> None:
    """Remove all that belongs to a set or to the making of one, the manifest first."""
    for name in (manifest_path(folder).name, PLAN_NAME, INDEX_NAME, PENDING_INDEX_NAME, SKIPPED_NAME):
        for file in (folder / name, folder / f".{name}.partial", folder / f"{name}.partial"):
            file.unlink(missing_ok=True)
    for path in numbered_files(folder):
        path.unlink(missing_ok=True)


def missing(folder: Path, plan: Plan, shards: range) -> list[int]:
    """Return which of ``shards`` are not whole yet."""
    digest = plan.digest
    return [shard for shard in shards if whole_part(folder, shard, digest) is None]


def finish(folder: Path, plan: Plan, work: Work) -> Finished:
    """Make the index and the manifest of a set all of whose shards are whole; the side files stay.

    Raises ValueError where none of the pictures could be used, TooManyBadError where too few could,
    FileNotFoundError where a shard has gone.
    """
    source = work.source
    kept, told, skipped = np.zeros(plan.count, np.bool_), [], list[tuple[int, str]]()
    replaced: Counter[str] = Counter()
    for shard in range(plan.num_shards):
        part = _part(folder, shard, plan)
        kept[part.records["source"].astype(np.int64)] = True
        replaced.update(part.replaced)
        skipped += part.skipped
        if part.tar is not None:
            told.append(part.tar)
    lines = tuple(line for _, line in sorted(skipped))
    if not told:
        raise ValueError(
            f"none of the {plan.count} pictures of {source.name} can be used: {'; '.join(lines[:3])}; look "
            "at them with another program"
        )
    if lines:
        work.check_bad(len(lines), lines[-1])
    assert int(kept.sum()) + len(lines) == plan.count, "pictures were lost"
    settings = {**plan.settings, "seed": plan.seed, "shard_size": plan.shard_size, PLAN_KEY: plan.digest}
    manifest = save_set(
        folder,
        _merge(folder, plan, kept),
        told,
        skipped=lines,
        source=source.name,
        classes=source.classes,
        replaced=replaced + source.passed_over,
        settings=settings,
    )
    return Finished(manifest, lines)


def save_set(
    folder: Path,
    index: npt.NDArray[np.void],
    shards: Sequence[Shard],
    *,
    skipped: Sequence[str],
    source: str,
    classes: Sequence[str],
    replaced: Mapping[str, int],
    settings: Mapping[str, Any],
) -> Manifest:
    """Write a set's index, its list of pictures left out and its manifest, in place of others.

    The index gets its name after the manifest. Until then, also where the process is killed, that one of two
    indices counts that the manifest has the hash of.
    """
    _settle_index(folder, finished_before(folder, replaced=True))
    write_atomically(folder / PENDING_INDEX_NAME, lambda file: np.save(file, index))
    if skipped:
        text = b"".join(map(source_path_line, skipped))
        write_atomically(folder / SKIPPED_NAME, lambda file: file.write(text))
    else:
        (folder / SKIPPED_NAME).unlink(missing_ok=True)
    manifest = Manifest(
        tier="jpeg",
        count=len(index),
        num_bytes=sum(shard.num_bytes for shard in shards),
        sha256=set_digest(shards, index),
        source=source,
        classes=tuple(classes),
        replaced=dict(sorted(replaced.items())),
        settings=dict(settings),
        format="shards",
        shards=tuple(shards),
    )
    manifest.write(folder)
    (folder / PENDING_INDEX_NAME).replace(folder / INDEX_NAME)
    sync_folder(folder)
    return manifest


def _settle_index(folder: Path, manifest: Manifest | None) -> None:
    """Give a pending index its name where it belongs to the manifest, and remove it where not."""
    pending = folder / PENDING_INDEX_NAME
    if pending.exists():
        if manifest is not None and index_in_force(folder, manifest) == pending:
            pending.replace(folder / INDEX_NAME)
        else:
            pending.unlink()


def _part(folder: Path, shard: int, plan: Plan) -> Part:
    part = whole_part(folder, shard, plan.digest)
    if part is None:
        raise FileNotFoundError(f"shard {shard} of {folder} has gone while the set was finished; {_GO_ON}")
    return part


def _merge(folder: Path, plan: Plan, kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.void]:
    """The records of all shards in the order of the source, counting only tars that are there."""
    place = np.cumsum(kept) - 1
    index = np.zeros(int(place[-1]) + 1, INDEX_DTYPE)
    number = 0
    for shard in range(plan.num_shards):
        part = _part(folder, shard, plan)
        if part.tar is None:
            continue
        records = part.records
        target = place[records["source"].astype(np.int64)]
        for name in INDEX_DTYPE.names or ():
            index[name][target] = number if name == "shard" else records[name]
        number += 1
    return index


def remove_sides(folder: Path) -> None:
    """Remove what belongs to the making of a set and not to the set."""
    for path in numbered_files(folder):
        if path.name.endswith((".part.npz", ".partial")):
            path.unlink(missing_ok=True)
    (folder / PLAN_NAME).unlink(missing_ok=True)


def unfinished(folder: Path) -> str:
    """A sentence on a set that is still being made, "" where ``folder`` holds none."""
    parts = list(folder.glob("*.part.npz"))
    if not parts and not (folder / PLAN_NAME).exists():
        return ""
    plan = Plan.read(folder)
    finished = finished_before(folder, replaced=True)
    if plan is not None and finished is not None and finished.settings.get(PLAN_KEY) == plan.digest:
        return ""  # whoever made it was killed at the very end
    of = f" of {plan.num_shards}" if plan else ""
    return f"{folder} is half made, {len(parts)}{of} shards are whole; {_GO_ON} and ends it"
