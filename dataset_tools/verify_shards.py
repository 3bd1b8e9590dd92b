"""Is a set of shards whole? Manifest, index, every tar with its DALI index, every picture."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset_tools.dali_index import dali_index, tar_samples, with_pictures_at
from dataset_tools.parallel import ordered_map
from dataset_tools.report import BadIndex, Report, Stats, label_problems, per_class, spread
from dataset_tools.shard_set import unfinished
from dataset_tools.tar_members import Member, scan_tar
from pipelines.decode.jpeg import check_jpeg
from pipelines.decode.pillow import is_jpeg, read_rgb, read_size
from pipelines.sets.folder import PICTURE_SUFFIXES
from pipelines.sets.manifest import Shard, of_kind
from pipelines.sets.shards import (
    check_tar,
    dali_index_path,
    index_hint,
    map_index,
    open_shards,
    pictures_on_disk,
    set_digest,
    shards_manifest,
)


def verify_shards(path: Path, workers: int | None, progress: Callable[[], None] | None) -> Report:
    """Check a set of shards; see ``verify``. Raises FileNotFoundError for a folder that was never one."""
    if sentence := unfinished(path):
        return _nothing(path, sentence)
    try:
        manifest = shards_manifest(path)
    except ValueError as error:
        return _nothing(path, str(error))
    problems: list[str] = []
    index = None
    try:
        index = map_index(path, manifest)
        if (digest := set_digest(manifest.shards, index)) != manifest.sha256:
            problems.append(
                f"the shards' hashes and the index hash to {digest}, the manifest says {manifest.sha256}: "
                f"the index is of another set; {index_hint(path)}"
            )
        problems += label_problems(index["label"], manifest)
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))
    if (total := sum(shard.num_bytes for shard in manifest.shards)) != manifest.num_bytes:
        problems.append(f"the shards have {total} bytes, the manifest says {manifest.num_bytes}")
    accepted = of_kind("damaged", manifest.replaced)
    bad: list[BadIndex] = []
    no_rows = [np.zeros(0, np.int64)] * len(manifest.shards)
    rows_by_shard = no_rows if index is None else pictures_on_disk(manifest.shards, index)
    for shard, rows in zip(manifest.shards, rows_by_shard, strict=True):
        problems += _check_shard(path, shard, index, rows, accepted, bad, workers, progress)
    bad.sort(key=lambda picture: picture.index)
    return Report(path, manifest.count, manifest.tier, manifest.num_bytes, True, tuple(problems), tuple(bad))


def _nothing(path: Path, problem: str) -> Report:
    return Report(path, 0, "", 0, False, (problem,), ())


def _check_shard(
    path: Path,
    shard: Shard,
    index: NDArray[np.void] | None,
    rows: NDArray[np.int64],
    accepted: Collection[str],
    bad: list[BadIndex],
    workers: int | None,
    progress: Callable[[], None] | None,
) -> list[str]:
    """Return what is wrong with a tar and its DALI index; add its bad pictures to ``bad``.

    ``accepted``: damage that was known, and passed over, when the set was made.
    """
    problems = []
    try:
        check_tar(path, shard)
    except FileNotFoundError as error:
        return [str(error)]
    except ValueError as error:
        problems.append(str(error))
    tar = path / shard.name
    members, damage = _members(tar)
    offsets = np.zeros(0, np.uint64) if index is None else index["offset"][rows]
    if damage and damage not in accepted:
        problems.append(f"{path}/{damage}")
    else:
        problems += _check_idx(path, tar, members, offsets)
    places = {member.offset: member for member in members}
    data = np.memmap(tar, np.uint8, mode="r") if tar.stat().st_size else np.zeros(0, np.uint8)

    def fault(place: int) -> str:
        assert index is not None, "there are no rows without an index"
        return _fault(data, index[rows[place]], places)

    hasher, hashed = hashlib.sha256(), 0
    results = ordered_map(fault, len(rows), workers=workers, chunk=16)
    with contextlib.closing(results):
        for row, reason in zip(rows.tolist(), results, strict=True):
            # What the threads have just read is still in memory.
            assert index is not None
            stop = int(index["offset"][row]) + int(index["num_bytes"][row])
            hasher.update(data[hashed:stop].data)
            hashed = max(hashed, stop)
            if reason:
                member = places.get(int(index["offset"][row]))
                name = f"{shard.name}: {member.name}" if member else shard.name
                bad.append(BadIndex(row, name, reason))
            if progress is not None:
                progress()
    hasher.update(data[hashed:].data)
    if not problems and (digest := hasher.hexdigest()) != shard.sha256:
        problems.append(f"{tar} hashes to {digest}, the manifest says {shard.sha256}: it was changed")
    return problems


def _members(tar: Path) -> tuple[list[Member], str]:
    """The files in a tar up to where it can be read, and what is wrong there."""
    members: list[Member] = []
    damage: list[str] = []
    try:
        members.extend(scan_tar(tar, damage.append))
    except ValueError as error:
        damage.append(str(error).removeprefix(f"{tar.parent}/"))
    return members, "; ".join(damage)


def _check_idx(path: Path, tar: Path, members: list[Member], offsets: NDArray[np.uint64]) -> list[str]:
    """Hold every entry of DALI's index against the tar; without places of pictures, see if it is there."""
    idx = dali_index_path(tar)
    anew = f"write it anew with `python -m dataset_tools index {path} --dali-only`"
    try:
        found = idx.read_bytes()
    except FileNotFoundError:
        return [f"{idx} is missing, without which DALI reads the whole tar first; {anew}"]
    samples = tar_samples(member for member in members if not member.link)
    wanted = dali_index(with_pictures_at(offsets, samples))
    if not len(offsets) or found == wanted:
        return []
    lines = zip_longest(found.split(b"\n"), wanted.split(b"\n"))
    number, (told, true) = next((i, pair) for i, pair in enumerate(lines, 1) if pair[0] != pair[1])
    return [f"{idx} is not of {tar.name}: line {number} is {_cut(told)}, the tar says {_cut(true)}; {anew}"]


def _cut(line: bytes | None) -> str:
    return "missing" if line is None else repr(os.fsdecode(line)[:80])


def _fault(data: NDArray[np.uint8], record: np.void, places: dict[int, Member]) -> str:
    """Return what is wrong with one picture, "" where nothing is."""
    offset, num_bytes = int(record["offset"]), int(record["num_bytes"])
    member = places.get(offset)
    if member is None:
        return f"the tar has no file at byte {offset}, where the index says it is"
    if member.num_bytes != num_bytes:
        return f"has {member.num_bytes} bytes in the tar, {num_bytes} in the index"
    if not member.name.lower().endswith(PICTURE_SUFFIXES):
        return "its name is not that of a picture"
    payload = data[offset : offset + num_bytes]
    if is_jpeg(payload):
        verdict = check_jpeg(payload)
        if verdict.state == "damaged":
            return f"damaged: {verdict.message}"
        size: tuple[int, int] | None = (verdict.height, verdict.width)
    else:
        image = read_rgb(payload.tobytes())
        if image is None:
            return "damaged: it cannot be decoded"
        size = (image.height, image.width)
    told = (int(record["height"]), int(record["width"]))
    if size != told:
        size = read_size(payload.tobytes())  # upright by EXIF, which the decoder does not look at
    if size != told:
        held = "unknown size" if size is None else f"{size[1]} × {size[0]} px"
        return f"holds {held}, the index says {told[1]} × {told[0]}"
    return ""


def shards_stats(path: Path) -> Stats:
    """Count a set of shards by its index; see ``stats``."""
    shards = open_shards(path)
    index, manifest = shards.index, shards.manifest
    return Stats(
        path=path,
        count=len(shards),
        tier=manifest.tier,
        num_bytes=manifest.num_bytes,
        layout=f"{len(shards.shards)} shards",
        per_class=per_class(index["label"], manifest.classes),
        width_px=spread(index["width"]),
        height_px=spread(index["height"]),
        payload_bytes_mean=float(index["num_bytes"].mean()),
        payload_bytes_median=float(np.median(index["num_bytes"])),
    )
