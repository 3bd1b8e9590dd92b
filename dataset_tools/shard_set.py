"""A folder in which a set of shards is made: who may make it, what is left to do, and the end of it."""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset_tools.disk import Lock, exchange
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
    set_aside,
    set_digest,
)

SUFFIX = ".shards"
"""Of the name of a folder that a conversion makes."""
SKIPPED_NAME = "skipped.txt"
LOCK_NAME = ".convert.lock"
"""In a folder where a set is made: shared by those who make shards there, held alone to replace it."""
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
    if finished := _finished_by(plan, folder):
        if (folder / LOCK_NAME).exists():  # of a process that was killed at its very end
            with contextlib.suppress(OSError):
                Lock(folder / LOCK_NAME, folder, shared=True).release()
        yield finished
        return
    with Lock(folder / LOCK_NAME, folder, shared=True):
        finished = _finished_by(plan, folder)
        if finished is None:
            _begin(folder, plan)
        yield finished


def _finished_by(plan: Plan, folder: Path) -> Manifest | None:
    """The manifest of the finished set in a folder. Raises FileExistsError where it is another plan's."""
    finished = finished_before(folder, replaced=False)
    if finished is None:
        return None
    if (made_by := finished.settings.get(PLAN_KEY)) is None:
        raise _indexed(folder)
    if made_by != plan.digest:
        raise FileExistsError(
            f"{folder} exists already, made of other pictures or with other options; choose another name or "
            "add --overwrite"
        )
    open_shards(folder)  # says what is missing
    _settle_index(folder, finished)
    remove_sides(folder)
    return finished


def _begin(folder: Path, plan: Plan) -> None:
    """Begin or go on with the plan in a folder."""
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
    for path, number in numbered_files(folder).items():
        if number >= plan.num_shards:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(folder: Path, plan: Plan) -> Iterator[Path]:
    """A folder beside ``folder`` to make a set in; at the end of the block, checked, it takes its place.

    The old set stands until then; after an error the new folder is removed. Files in the old folder that are
    not the set's are kept.
    Raises FileExistsError where what lies there was not made by a conversion or is being made, and ValueError
    where the folder cannot be exchanged.
    """
    if folder.is_mount() or not os.access(folder.parent, os.W_OK):
        why = "is a mount point" if folder.is_mount() else f"lies in {folder.parent}, which cannot be written"
        raise ValueError(f"{folder} {why}, so no new folder can take its place; choose another name")
    put_back(folder)
    new = folder.with_name(f".{folder.name}.maskmix-new")
    with Lock(folder / LOCK_NAME, folder) as held:
        finished = finished_before(folder, replaced=True)
        if finished is not None and PLAN_KEY not in finished.settings:
            raise _indexed(folder)
        _refuse_foreign(folder, finished)
        new.mkdir(exist_ok=True)
        with Lock(new / LOCK_NAME, folder) as held_too:
            try:
                _clear(new)
                plan.write(new)
                yield new
                open_shards(new)
                with contextlib.suppress(PermissionError):  # of another's folder only its owner may tell
                    shutil.copymode(folder, new)
                    os.chown(new, -1, folder.stat().st_gid)
                exchange(new, folder, set_aside(folder))
            except BaseException:
                _retire(new, folder)
                raise
            held.path, held_too.path = held_too.path, held.path
            sync_folder(folder.parent)
            remove_sides(folder)
            _retire(new, folder)


def _indexed(folder: Path) -> FileExistsError:
    return FileExistsError(
        f"{folder} is a set that was indexed where it lay, not converted; its tars are never replaced, "
        "choose another name"
    )


def put_back(folder: Path) -> None:
    """End an exchange of folders in which a process was killed.

    Raises FileExistsError where that process lives, or something else has taken the folder's name.
    """
    aside = set_aside(folder)
    if not aside.exists():
        return
    with Lock(aside / LOCK_NAME, folder) as held:
        if not folder.exists():
            aside.rename(folder)
            held.path = folder / LOCK_NAME
            return
        try:
            open_shards(folder)
        except (OSError, ValueError) as error:
            raise FileExistsError(
                f"a process was killed while it replaced {folder}, whose old set is in {aside}; remove what "
                f"has the name now ({error}), and give the old set its name back"
            ) from error
        _retire(aside, folder)


def _retire(old: Path, folder: Path) -> None:
    """Remove a set that does not count, in favour of ``folder``, where files that are not the set's go.

    Its lock is held by the caller.
    """
    _clear(old)
    (old / LOCK_NAME).unlink(missing_ok=True)
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


def missing(folder: Path, plan: Plan, shards: range, work: Work) -> tuple[list[int], Counter[str]]:
    """Return which of ``shards`` are to be made, and the pictures left out of the others, by reason.

    To be made are those that are not whole, and those without a picture that can be used by now.
    """
    todo, bad, digest = list[int](), Counter[str](), plan.digest
    for shard in shards:
        part = whole_part(folder, shard, digest)
        if part is None or not all(work.is_bad(index) for index, _ in part.skipped):
            todo.append(shard)
        else:
            bad.update(left_out(part.replaced))
    return todo, bad


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
        work.check_bad(left_out(replaced), lines[-1])
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

    The index gets its name after the manifest. Until then the valid index is the one whose hash is in the
    manifest, see ``index_in_force``.
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


def left_out(replaced: Mapping[str, int]) -> dict[str, int]:
    """Of a manifest's ``replaced`` the pictures left out: reason → number."""
    word = "skipped: "
    return {reason.removeprefix(word): n for reason, n in replaced.items() if reason.startswith(word)}


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
