"""The set that a folder of shards holds: what is left to make, its index and manifest, and the end of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset_tools.shard_plan import (
    Part,
    Plan,
    numbered_files,
    whole_part,
)
from dataset_tools.work import Work
from pipelines.sets.manifest import SKIPPED_NAME, Manifest, Shard, of_kind, source_path_line
from pipelines.sets.shards import (
    INDEX_DTYPE,
    INDEX_NAME,
    PENDING_INDEX_NAME,
    PLAN_NAME,
    index_in_force,
    set_digest,
)
from training.files import sync_folder, write_atomically

SUFFIX = ".shards"
"""Of the name of a folder that a conversion makes."""
PLAN_KEY = "plan"
"""The setting in a manifest that holds the plan's hash; only a set that was converted has it."""
_GO_ON = "run the same conversion again, which keeps whole shards"


@dataclass(frozen=True)
class Finished:
    """A set of shards with its index."""

    manifest: Manifest
    skipped: tuple[str, ...]
    """"path: reason" of every picture left out, in the order of the source."""


def finished_before(folder: Path, *, replaced: bool) -> Manifest | None:
    """The manifest of a finished set; a damaged one counts as none where it is to be replaced."""
    try:
        return Manifest.read(folder)
    except ValueError:
        if replaced:
            return None
        raise


def missing(folder: Path, plan: Plan, shards: range, work: Work) -> tuple[list[int], Counter[str]]:
    """Return which of ``shards`` are to be made, and the pictures left out of the others, by reason.

    A shard is to be made if it is not whole, or if a picture that was left out of it can be used now.
    """
    todo, bad, digest = list[int](), Counter[str](), plan.digest
    for shard in shards:
        part = whole_part(folder, shard, digest)
        if part is None or not all(work.is_bad(index) for index, _ in part.skipped):
            todo.append(shard)
        else:
            bad.update(of_kind("skipped", part.replaced))
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
        work.check_bad(of_kind("skipped", replaced), lines[-1])
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
    settle_index(folder, finished_before(folder, replaced=True))
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


def settle_index(folder: Path, manifest: Manifest | None) -> None:
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
        return ""  # the process that made it was killed before it removed the side files
    of = f" of {plan.num_shards}" if plan else ""
    return f"{folder} is half made, {len(parts)}{of} shards are whole; {_GO_ON} and ends it"
