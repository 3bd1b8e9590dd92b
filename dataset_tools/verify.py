"""Checks a compiled set, of either format: its manifest and tables, its hashes, and every image."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset_tools.beton_writer import finish_contents_hash
from dataset_tools.shard_set import unfinished
from dataset_tools.stats import tiers
from dataset_tools.tars import Member, dali_index, scan_tar, tar_samples, with_images_at
from dataset_tools.work import NUM_NAMED, Progress, ordered_map
from pipelines.decode.jpeg import check_jpeg
from pipelines.decode.pillow import is_jpeg, read_rgb, read_size
from pipelines.sets.beton import MODE_JPEG, BetonFile, open_beton, pixel_bytes
from pipelines.sets.folder import IMAGE_SUFFIXES
from pipelines.sets.manifest import Manifest, Shard, of_kind, read_source_path
from pipelines.sets.shards import (
    INDEX_DTYPE,
    check_tar,
    dali_index_path,
    index_hint,
    map_index,
    positions_by_shard,
    set_digest,
    shards_manifest,
)


@dataclass(frozen=True)
class DamagedImage:
    """An image of a set that cannot be decoded, or differs from its record."""

    index: int
    source_path: str | None
    """Path in the source, or shard and name in it; None if it is not recorded, or after the first twenty."""
    reason: str


@dataclass(frozen=True)
class Report:
    """The result of ``verify``."""

    path: Path
    count: int
    """Number of images; 0 if the tables cannot be read."""
    tier: str
    """As in Stats; "" if the tables cannot be read."""
    num_bytes: int
    has_manifest: bool
    """Without a manifest the contents cannot be compared with what was written."""
    problems: tuple[str, ...]
    """Sentences on the set as a whole and on its files."""
    bad: tuple[DamagedImage, ...]
    """All damaged images, in order."""

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems and not self.bad


def verify(path: str | Path, *, workers: int | None = None, progress: Progress | None = None) -> Report:
    """Check a compiled set: tables, manifest, hash of the contents, and every image by decoding it.

    Damage is reported, not raised.

    Args:
        path: a .beton file or a folder of shards.
        workers: number of threads; None takes all cores.
        progress: called once per image.

    Raises:
        FileNotFoundError: if there is no set.
    """
    path = Path(path)
    return (_verify_shards if path.is_dir() else _verify_file)(path, workers, progress)


def _faults(
    fault: Callable[[int], str], count: int, workers: int | None, progress: Progress | None
) -> Iterator[tuple[int, str]]:
    """Yield (i, what is wrong with image i, or "") in order; ``fault`` runs in threads."""
    results = ordered_map(fault, count, workers=workers, progress=progress, chunk=16)
    with contextlib.closing(results):
        yield from enumerate(results)


def _label_problems(labels: NDArray[np.int64] | NDArray[np.int32], manifest: Manifest) -> list[str]:
    if not len(labels):
        return []
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or (manifest.classes and high >= len(manifest.classes)):
        return [f"the labels range from {low} to {high}, the manifest names {len(manifest.classes)} classes"]
    return []


# ------------------------------------------------------------------------------------------------------------
# One file


def _verify_file(path: Path, workers: int | None, progress: Progress | None) -> Report:
    problems: list[str] = []
    manifest = None
    try:
        manifest = Manifest.read(path)
    except ValueError as error:
        problems.append(str(error))
    try:
        beton = open_beton(path)
    except ValueError as error:
        return Report(path, 0, "", path.stat().st_size, manifest is not None, (*problems, str(error)), ())
    reasons, digest = _check_file_images(beton, workers, progress)
    if manifest is not None:
        problems += _compare_with_manifest(beton, manifest, digest)
    elif beton.sha256 not in ("", digest):
        problems.append(f"the hash of the contents is {digest}, the file records {beton.sha256}")
    bad = tuple(
        DamagedImage(index, read_source_path(path, index) if named < NUM_NAMED else None, reason)
        for named, (index, reason) in enumerate(reasons)
    )
    return Report(path, len(beton), tiers(beton), beton.data.size, manifest is not None, tuple(problems), bad)


def _check_file_images(
    beton: BetonFile, workers: int | None, progress: Progress | None
) -> tuple[list[tuple[int, str]], str]:
    """Decode and hash all images; return (index, reason) of the damaged ones and the hash."""
    hasher = hashlib.sha256()
    bad = []
    for index, reason in _faults(lambda i: _fault_in_file(beton, i), len(beton), workers, progress):
        hasher.update(beton.payload(index).data)
        if reason:
            bad.append((index, reason))
    return bad, finish_contents_hash(hasher, beton.metadata)


def _fault_in_file(beton: BetonFile, index: int) -> str:
    """Return what is wrong with an image, or ""."""
    image = beton.metadata["f0"][index]
    mode, width, height = int(image["mode"]), int(image["width"]), int(image["height"])
    payload = beton.payload(index)
    if mode != MODE_JPEG:
        expected = pixel_bytes(mode, width, height)
        if payload.size == expected:
            return ""
        return f"{payload.size} bytes for {width} × {height} px in mode {mode}, expected {expected}"
    verdict = check_jpeg(payload)
    if verdict.state == "damaged":
        return f"damaged: {verdict.message}"
    if (verdict.width, verdict.height) != (width, height):
        return f"has {verdict.width} × {verdict.height} px, the metadata says {width} × {height}"
    return ""


def _compare_with_manifest(beton: BetonFile, manifest: Manifest, digest: str) -> list[str]:
    """Return a sentence for each difference between a file and its manifest."""
    problems = []
    if manifest.num_bytes != beton.data.size:
        problems.append(f"the file has {beton.data.size} bytes, the manifest says {manifest.num_bytes}")
    if manifest.count != len(beton):
        problems.append(f"the file holds {len(beton)} images, the manifest says {manifest.count}")
    if manifest.sha256 != digest:
        problems.append(f"the hash of the contents is {digest}, the manifest says {manifest.sha256}")
    if manifest.tier != tiers(beton):
        problems.append(f"the images are of tier {tiers(beton)}, the manifest says {manifest.tier}")
    return problems + _label_problems(beton.labels, manifest)


# ------------------------------------------------------------------------------------------------------------
# Shards


def _verify_shards(path: Path, workers: int | None, progress: Progress | None) -> Report:
    """Check a folder of shards. Raises FileNotFoundError if it is not a set, not even an incomplete one."""
    if sentence := unfinished(path):
        return Report(path, 0, "", 0, False, (sentence,), ())
    try:
        manifest = shards_manifest(path)
    except ValueError as error:
        return Report(path, 0, "", 0, False, (str(error),), ())
    index, problems = _check_index(path, manifest)
    if (total := sum(shard.num_bytes for shard in manifest.shards)) != manifest.num_bytes:
        problems.append(f"the shards have {total} bytes, the manifest says {manifest.num_bytes}")
    accepted = of_kind("damaged", manifest.replaced)
    bad: list[DamagedImage] = []
    for shard, rows in zip(manifest.shards, positions_by_shard(manifest.shards, index), strict=True):
        of_shard, damaged = _check_shard(path, shard, accepted, index, rows, workers, progress)
        problems += of_shard
        bad += damaged
    bad.sort(key=lambda image: image.index)
    return Report(path, manifest.count, manifest.tier, manifest.num_bytes, True, tuple(problems), tuple(bad))


def _check_index(path: Path, manifest: Manifest) -> tuple[NDArray[np.void], list[str]]:
    """Return the index, empty if it cannot be used, and what is wrong with it."""
    try:
        index = map_index(path, manifest)
    except (ValueError, FileNotFoundError) as error:
        return np.zeros(0, INDEX_DTYPE), [str(error)]
    problems = []
    if (digest := set_digest(manifest.shards, index)) != manifest.sha256:
        problems.append(
            f"the hash of the shards' hashes and the index is {digest}, the manifest says {manifest.sha256}: "
            f"the index is of another set; {index_hint(path)}"
        )
    return index, problems + _label_problems(index["label"], manifest)


def _check_shard(
    path: Path,
    shard: Shard,
    accepted: Collection[str],
    index: NDArray[np.void],
    rows: NDArray[np.int64],
    workers: int | None,
    progress: Progress | None,
) -> tuple[list[str], list[DamagedImage]]:
    """Return what is wrong with a tar and its DALI index, and its damaged images.

    ``accepted``: sentences on damage that was accepted when the set was made. ``rows``: (n,) positions in the
    index of the images of this tar, in the order of the tar.
    """
    problems = []
    try:
        check_tar(path, shard)
    except FileNotFoundError as error:
        return [str(error)], []
    except ValueError as error:
        problems.append(str(error))
    tar, records = path / shard.name, index[rows]
    members, damage = _read_members(tar)
    if damage and damage not in accepted:
        problems.append(f"{path}/{damage}")
    else:
        problems += _check_idx(path, tar, members, records["offset"])
    by_offset = {member.offset: member for member in members}
    reasons, digest = _check_shard_images(tar, records, by_offset, workers, progress)
    bad = []
    for n, reason in reasons:
        member = by_offset.get(int(records["offset"][n]))
        name = f"{shard.name}: {member.name}" if member else shard.name
        bad.append(DamagedImage(int(rows[n]), name, reason))
    if not problems and digest != shard.sha256:
        problems.append(f"the hash of {tar} is {digest}, the manifest says {shard.sha256}: it was changed")
    return problems, bad


def _read_members(tar: Path) -> tuple[list[Member], str]:
    """Return the files in a tar up to where it can be read, and what is wrong there."""
    members: list[Member] = []
    damage: list[str] = []
    try:
        members.extend(scan_tar(tar, damage.append))
    except ValueError as error:
        damage.append(str(error).removeprefix(f"{tar.parent}/"))
    return members, "; ".join(damage)


def _check_idx(path: Path, tar: Path, members: list[Member], offsets: NDArray[np.uint64]) -> list[str]:
    """Compare every entry of DALI's index with the tar; without ``offsets``, only check that it exists."""
    idx = dali_index_path(tar)
    hint = f"write it again with `python -m dataset_tools index {path} --dali-only`"
    try:
        found = idx.read_bytes()
    except FileNotFoundError:
        return [f"{idx} is missing, and without it DALI reads the whole tar first; {hint}"]
    samples = tar_samples(member for member in members if not member.link)
    expected = dali_index(with_images_at(offsets, samples))
    if not len(offsets) or found == expected:
        return []
    lines = zip_longest(found.split(b"\n"), expected.split(b"\n"))
    number, (line, true) = next((i, pair) for i, pair in enumerate(lines, 1) if pair[0] != pair[1])
    difference = f"line {number} is {_shorten(line)}, expected {_shorten(true)}"
    return [f"{idx} does not match {tar.name}: {difference}; {hint}"]


def _shorten(line: bytes | None) -> str:
    return "missing" if line is None else repr(os.fsdecode(line)[:80])


def _check_shard_images(
    tar: Path,
    records: NDArray[np.void],
    by_offset: dict[int, Member],
    workers: int | None,
    progress: Progress | None,
) -> tuple[list[tuple[int, str]], str]:
    """Decode all images of a tar and hash it; return (n, reason) of the damaged ones and the hash.

    The records are in the order of the tar.
    """
    data = np.memmap(tar, np.uint8, mode="r") if tar.stat().st_size else np.zeros(0, np.uint8)
    hasher, hashed, bad = hashlib.sha256(), 0, []
    faults = _faults(lambda i: _fault_in_shard(data, records[i], by_offset), len(records), workers, progress)
    for n, reason in faults:
        # The threads have just read these bytes, so they are still in memory.
        stop = int(records["offset"][n]) + int(records["num_bytes"][n])
        hasher.update(data[hashed:stop].data)
        hashed = max(hashed, stop)
        if reason:
            bad.append((n, reason))
    hasher.update(data[hashed:].data)
    return bad, hasher.hexdigest()


def _fault_in_shard(data: NDArray[np.uint8], record: np.void, by_offset: dict[int, Member]) -> str:
    """Return what is wrong with an image, or ""."""
    offset, num_bytes = int(record["offset"]), int(record["num_bytes"])
    member = by_offset.get(offset)
    if member is None:
        return f"the tar has no file at byte {offset}, where the index says it is"
    if member.num_bytes != num_bytes:
        return f"has {member.num_bytes} bytes in the tar, {num_bytes} in the index"
    if not member.name.lower().endswith(IMAGE_SUFFIXES):
        return "its name has no suffix of an image"
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
    recorded = (int(record["height"]), int(record["width"]))
    if size != recorded:
        size = read_size(payload.tobytes())  # upright by EXIF, which the decoder ignores
    if size != recorded:
        found = "an unknown size" if size is None else f"{size[1]} × {size[0]} px"
        return f"has {found}, the index says {recorded[1]} × {recorded[0]}"
    return ""
