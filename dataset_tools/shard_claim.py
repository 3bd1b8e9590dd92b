"""Which process may make shards in a folder, and how a new set replaces an old one."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dataset_tools.disk import Lock, exchange
from dataset_tools.shard_plan import PLAN_KEY, Plan, numbered_files
from dataset_tools.shard_set import finished_manifest, remove_side_files, settle_index
from pipelines.sets.manifest import SKIPPED_NAME, Manifest, manifest_path
from pipelines.sets.shards import (
    INDEX_NAME,
    PENDING_INDEX_NAME,
    PLAN_NAME,
    index_hint,
    open_shards,
    set_aside_path,
)
from training.files import sync_folder

LOCK_NAME = ".convert.lock"
"""Lock file in the folder of a set: shared by the processes that make its shards, exclusive to replace it."""


@contextlib.contextmanager
def claimed(folder: Path, plan: Plan) -> Iterator[Manifest | None]:
    """Claim the folder for a conversion, which other machines may share.

    Makes the folder and writes the plan into it. Yields the manifest if the set is already complete, else
    None.

    Raises:
        FileExistsError: if the folder holds a set of another plan, complete or not, or tars that were not
        made
            by a conversion, or if the set is being replaced.
    """
    finish_exchange(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if finished := _finished_by(plan, folder):
        if (folder / LOCK_NAME).exists():  # left by a killed process
            with contextlib.suppress(OSError):
                Lock(folder / LOCK_NAME, folder, shared=True).release()
        yield finished
        return
    with Lock(folder / LOCK_NAME, folder, shared=True):
        finished = _finished_by(plan, folder)
        if finished is None:
            _begin_or_continue(folder, plan)
        yield finished


def _finished_by(plan: Plan, folder: Path) -> Manifest | None:
    """Return the manifest of a finished set. Raises FileExistsError if it was made by another plan."""
    finished = finished_manifest(folder, replaced=False)
    if finished is None:
        return None
    if (made_by := finished.settings.get(PLAN_KEY)) is None:
        raise _indexed_in_place(folder)
    if made_by != plan.digest:
        raise FileExistsError(
            f"{folder} exists already, made of other images or with other options; choose another name or "
            "add --overwrite"
        )
    open_shards(folder)  # raises if a file is missing
    settle_index(folder, finished)
    remove_side_files(folder)
    return finished


def _begin_or_continue(folder: Path, plan: Plan) -> None:
    """Begin or continue the plan in a folder."""
    _refuse_foreign(folder, None)
    if Plan.read(folder) is None:
        # If two machines begin at the same time, one may already have renamed the temporary file of both.
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
    """Yield a new folder to make a set in; at the end of the block it is checked and replaces ``folder``.

    The old set stays until then. After an error the new folder is removed. Files in the old folder that do
    not belong to the set are kept.

    Raises:
        FileExistsError: if the old set was not made by a conversion, or is being made.
        ValueError: if the folder cannot be exchanged.
    """
    if folder.is_mount() or not os.access(folder.parent, os.W_OK):
        why = "is a mount point" if folder.is_mount() else f"lies in {folder.parent}, which cannot be written"
        raise ValueError(f"{folder} {why}, so it cannot be replaced; choose another name")
    finish_exchange(folder)
    new = folder.with_name(f".{folder.name}.maskmix-new")
    with Lock(folder / LOCK_NAME, folder) as old_lock:
        finished = finished_manifest(folder, replaced=True)
        if finished is not None and PLAN_KEY not in finished.settings:
            raise _indexed_in_place(folder)
        _refuse_foreign(folder, finished)
        new.mkdir(exist_ok=True)
        with Lock(new / LOCK_NAME, folder) as new_lock:
            try:
                _clear(new)
                plan.write(new)
                yield new
                open_shards(new)
                with contextlib.suppress(PermissionError):  # only the owner of a folder may change its mode
                    shutil.copymode(folder, new)
                    os.chown(new, -1, folder.stat().st_gid)
                exchange(new, folder, set_aside_path(folder))
            except BaseException:
                _remove_set(new, folder)
                raise
            old_lock.path, new_lock.path = new_lock.path, old_lock.path
            sync_folder(folder.parent)
            remove_side_files(folder)
            _remove_set(new, folder)


def _indexed_in_place(folder: Path) -> FileExistsError:
    return FileExistsError(
        f"{folder} was indexed in place, not converted; its tars are never replaced, choose another name"
    )


def finish_exchange(folder: Path) -> None:
    """Finish an exchange of folders that a killed process left incomplete.

    Raises:
        FileExistsError: if that process is alive, or if something else has the name ``folder``.
    """
    aside = set_aside_path(folder)
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
                f"a process was killed while it replaced {folder}; the old set is in {aside}. Move away what "
                f"is in {folder} now ({error}), and rename the old set back"
            ) from error
        _remove_set(aside, folder)


def _remove_set(old: Path, folder: Path) -> None:
    """Remove a set that is no longer valid. Files that do not belong to it are moved to ``folder``.

    The caller holds the lock of ``old``.
    """
    _clear(old)
    (old / LOCK_NAME).unlink(missing_ok=True)
    for file in old.iterdir():
        if not (folder / file.name).exists():
            file.rename(folder / file.name)
    with contextlib.suppress(OSError):  # not empty: a file stays if ``folder`` has one of its name
        old.rmdir()


def _refuse_foreign(folder: Path, finished: Manifest | None) -> None:
    """Raise FileExistsError for a tar that no conversion made: it has no manifest, plan or side file."""
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
    """Remove all files that belong to a set or are needed to make one, the manifest first."""
    for name in (manifest_path(folder).name, PLAN_NAME, INDEX_NAME, PENDING_INDEX_NAME, SKIPPED_NAME):
        for file in (folder / name, folder / f".{name}.partial"):
            file.unlink(missing_ok=True)
    for path in numbered_files(folder):
        path.unlink(missing_ok=True)
