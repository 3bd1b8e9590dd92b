"""A folder in which a set of shards is made: who may make it, what is left to do, and the end of it."""

import contextlib
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
from engine.checkpoint import write_atomically
from pipelines.manifest import Manifest, Shard, manifest_path, source_path_line
from pipelines.shards import INDEX_DTYPE, INDEX_NAME, PLAN_NAME, index_hint, open_shards, set_digest

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


def claim(folder: Path, plan: Plan, *, overwrite: bool) -> Manifest | None:
    """Take the folder for a conversion; return the manifest where the plan is carried out already.

    Makes the folder and writes the plan into it. Raises FileExistsError where another plan is being, or has
    been, carried out there and ``overwrite`` is off, or where tars lie there that no conversion made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finished = finished_before(folder, replaced=overwrite)
    if finished is not None:
        made_by = finished.settings.get(PLAN_KEY)
        if made_by is None:
            raise FileExistsError(
                f"{folder} is a set that was indexed where it lay, not converted; its tars are never "
                "replaced, choose another name"
            )
        if made_by == plan.digest and not overwrite:
            open_shards(folder)  # says what is missing
            _remove_sides(folder)
            return finished
        if not overwrite:
            raise FileExistsError(
                f"{folder} exists already, made of other pictures or with other options; choose another name "
                "or add --overwrite"
            )
    _refuse_foreign(folder, finished)
    if overwrite or Plan.read(folder) is None:
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
    _clear(folder, plan, everything=overwrite)
    return None


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


def _clear(folder: Path, plan: Plan, *, everything: bool) -> None:
    """Remove what an earlier conversion left: all of it, or what lies past this plan's last shard."""
    if everything:
        for name in (manifest_path(folder).name, INDEX_NAME, SKIPPED_NAME):
            (folder / name).unlink(missing_ok=True)
    for path, number in numbered_files(folder).items():
        if everything or number >= plan.num_shards:
            path.unlink(missing_ok=True)


def missing(folder: Path, plan: Plan, shards: range) -> list[int]:
    """Return which of ``shards`` are not whole yet."""
    digest = plan.digest
    return [shard for shard in shards if whole_part(folder, shard, digest) is None]


def finish(folder: Path, plan: Plan, work: Work) -> Finished:
    """Make the index and the manifest of a set all of whose shards are whole, and remove the side files.

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
    _remove_sides(folder)
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
    """Write a set's index, its list of pictures left out and, last of all, its manifest."""
    manifest_path(folder).unlink(missing_ok=True)  # an old one must not stand beside a new index
    write_atomically(folder / INDEX_NAME, lambda file: np.save(file, index))
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
    return manifest


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


def _remove_sides(folder: Path) -> None:
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
    of = f" of {plan.num_shards}" if plan else ""
    return f"{folder} is half made, {len(parts)}{of} shards are whole; {_GO_ON} and ends it"
