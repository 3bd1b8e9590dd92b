"""Who may make a set of shards in a folder, and how a new set takes the place of an old one."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dataset_tools.disk import Lock, exchange
from dataset_tools.shard_plan import Plan, numbered_files
from dataset_tools.shard_set import (
    PLAN_KEY,
    finished_before,
    remove_sides,
    settle_index,
)
from pipelines.sets.manifest import SKIPPED_NAME, Manifest, manifest_path
from pipelines.sets.shards import (
    INDEX_NAME,
    PENDING_INDEX_NAME,
    PLAN_NAME,
    index_hint,
    open_shards,
    set_aside,
)
from training.files import sync_folder

LOCK_NAME = ".convert.lock"
"""In a folder where a set is made: shared by those who make shards there, held alone to replace it."""


@contextlib.contextmanager
def claimed(folder: Path, plan: Plan) -> Iterator[Manifest | None]:
    """Take the folder for a conversion, which other machines may share; gives the manifest if it is done.

    Makes the folder and writes the plan into it. Raises FileExistsError where another plan is being, or has
    been, carried out there, where tars lie there that no conversion made, or where it is being replaced.
    """
    put_back(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if finished := _finished_by(plan, folder):
        if (folder / LOCK_NAME).exists():  # left by a process that was killed
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
    settle_index(folder, finished)
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
                with contextlib.suppress(PermissionError):  # only the owner of a folder may change its mode
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
                f"a process was killed while it replaced {folder}, whose old set is in {aside}; move away "
                f"what is in its place now ({error}), and rename the old set back"
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


def _refuse_foreign(folder: Path, finished: Manifest | None) -> None:
    """Raise FileExistsError for a tar that no conversion made: one without manifest, plan or side file."""
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
