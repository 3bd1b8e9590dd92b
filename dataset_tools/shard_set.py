"""The set in a folder of shards: which shards are missing, and its index and manifest."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset_tools.disk import write_manifest
from dataset_tools.shard_plan import PLAN_KEY, Part, Plan, complete_part, numbered_files
from dataset_tools.work import Work
from pipelines.sets.manifest import SKIPPED_NAME, Manifest, Shard, of_kind, source_path_line
from pipelines.sets.shards import (
    INDEX_DTYPE,
    INDEX_NAME,
    PENDING_INDEX_NAME,
    PLAN_NAME,
    set_digest,
    valid_index_path,
)
from training.files import sync_folder, write_atomically

SUFFIX = ".shards"
"""Suffix of a folder that a conversion makes."""
_HOW_TO_CONTINUE = "run the same conversion again, which keeps complete shards"


@dataclass(frozen=True)
class Finished:
    """A set of shards with its index."""

    manifest: Manifest
    skipped: tuple[str, ...]
    """"path: reason" of every image left out, in the order of the source."""


def finished_manifest(folder: Path, *, replaced: bool) -> Manifest | None:
    """Return the manifest of a finished set, or None.

    Raises ValueError for a damaged manifest, unless the set is to be ``replaced``.
    """
    try:
        return Manifest.read(folder)
    except ValueError:
        if replaced:
            return None
        raise


def missing(folder: Path, plan: Plan, shards: range, work: Work) -> tuple[list[int], Counter[str]]:
    """Return the shards to make, and reason → number of images left out of the other shards.

    A shard is made if it is incomplete, or if an image that was left out of it has become usable.
    """
    todo, bad, digest = list[int](), Counter[str](), plan.digest
    for shard in shards:
        part = complete_part(folder, shard, digest)
        if part is None or not all(work.is_bad(index) for index, _ in part.skipped):
            todo.append(shard)
        else:
            bad.update(of_kind("skipped", part.replaced))
    return todo, bad


def finish_set(folder: Path, plan: Plan, work: Work) -> Finished:
    """Write the index and the manifest of a set when all of its shards are complete; side files stay.

    Raises:
        ValueError: if none of the images is usable.
        TooManyBadError: if too many images are bad.
        FileNotFoundError: if a shard has disappeared.
    """
    source = work.source
    kept, shards, skipped = np.zeros(plan.count, np.bool_), list[Shard](), list[tuple[int, str]]()
    replaced: Counter[str] = Counter()
    for shard in range(plan.num_shards):
        part = _read_part(folder, shard, plan)
        kept[part.records["source"].astype(np.int64)] = True
        replaced.update(part.replaced)
        skipped += part.skipped
        if part.tar is not None:
            shards.append(part.tar)
    lines = tuple(line for _, line in sorted(skipped))
    if not shards:
        raise work.nothing_usable_error(lines)
    if lines:
        work.check_bad(of_kind("skipped", replaced), lines[-1])
    assert int(kept.sum()) + len(lines) == plan.count, "images were lost"
    settings = {**plan.settings, "seed": plan.seed, "shard_size": plan.shard_size, PLAN_KEY: plan.digest}
    manifest = save_set(
        folder,
        _merge_records(folder, plan, kept),
        shards,
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
    """Write the index, the list of images left out and the manifest of a set, replacing existing ones.

    The index is renamed after the manifest. Until then the index with the hash that the manifest records is
    the valid one, see ``valid_index_path``.

    Args:
        folder: of the set.
        index: (N,) of INDEX_DTYPE.
        shards: in the order in which the index counts them.
        skipped: a line for each image left out.
        source: name of the source.
        classes: class names in label order.
        replaced: reason → number of images.
        settings: options of the conversion.
    """
    settle_index(folder, finished_manifest(folder, replaced=True))
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
    write_manifest(manifest, folder)
    (folder / PENDING_INDEX_NAME).replace(folder / INDEX_NAME)
    sync_folder(folder)
    return manifest


def settle_index(folder: Path, manifest: Manifest | None) -> None:
    """Rename a pending index if it belongs to the manifest; remove it otherwise."""
    pending = folder / PENDING_INDEX_NAME
    if pending.exists():
        if manifest is not None and valid_index_path(folder, manifest) == pending:
            pending.replace(folder / INDEX_NAME)
        else:
            pending.unlink()


def _read_part(folder: Path, shard: int, plan: Plan) -> Part:
    part = complete_part(folder, shard, plan.digest)
    if part is None:
        raise FileNotFoundError(
            f"shard {shard} of {folder} disappeared while the set was finished; {_HOW_TO_CONTINUE}"
        )
    return part


def _merge_records(folder: Path, plan: Plan, kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.void]:
    """Return the records of all shards in the order of the source; shards without a tar get no number."""
    place = np.cumsum(kept) - 1
    index = np.zeros(int(place[-1]) + 1, INDEX_DTYPE)
    number = 0
    for shard in range(plan.num_shards):
        part = _read_part(folder, shard, plan)
        if part.tar is None:
            continue
        records = part.records
        target = place[records["source"].astype(np.int64)]
        for name in INDEX_DTYPE.names or ():
            index[name][target] = number if name == "shard" else records[name]
        number += 1
    return index


def remove_side_files(folder: Path) -> None:
    """Remove the files that are only needed while a set is made."""
    for path in numbered_files(folder):
        if path.name.endswith((".part.npz", ".partial")):
            path.unlink(missing_ok=True)
    (folder / PLAN_NAME).unlink(missing_ok=True)


def unfinished(folder: Path) -> str:
    """Return a sentence about a set that is still being made; "" if ``folder`` holds none."""
    parts = list(folder.glob("*.part.npz"))
    if not parts and not (folder / PLAN_NAME).exists():
        return ""
    plan = Plan.read(folder)
    finished = finished_manifest(folder, replaced=True)
    if plan is not None and finished is not None and finished.settings.get(PLAN_KEY) == plan.digest:
        return ""  # the process that made it was killed before it removed the side files
    total = f" of {plan.num_shards}" if plan else ""
    complete = f"{len(parts)}{total} shards are complete"
    return f"{folder} is incomplete: {complete}; {_HOW_TO_CONTINUE} and makes the others"
