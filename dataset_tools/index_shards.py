"""Shards that are there already → a set: nothing is copied, only indices are written beside the tars."""

import hashlib
import json
import mmap
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataset_tools.dali_index import Component, TarSample, dali_index, tar_samples, with_pictures_at
from dataset_tools.parallel import num_workers, ordered_map
from dataset_tools.shard_set import PLAN_KEY, finished_before, save_set, unfinished
from dataset_tools.shard_writer import MAX_PICTURE_BYTES
from dataset_tools.tar_members import scan_tar
from dataset_tools.work import MAX_BAD, check_bad, check_share
from pipelines.decode.pillow import read_size
from pipelines.sets.beton import MAX_SIDE_PX
from pipelines.sets.folder import NO_LABEL, PICTURE_SUFFIXES, PassedOver
from pipelines.sets.manifest import Manifest, Shard, of_kind
from pipelines.sets.shards import INDEX_DTYPE, dali_index_path, open_shards, pictures_on_disk
from training.files import write_atomically

LABEL_SUFFIX, JSON_SUFFIX, JSON_KEY = "cls", "json", "label"
"""A sample's label: the number in its ``cls`` file, or the key of that name in its ``json`` file."""
_NO_PICTURE = "no picture"
_NUMBER = re.compile(rb"\s*-?[0-9]{1,10}\s*")
MAX_NUMBERED_CLASSES = 1_000_000
"""Past so many, labels that no file names are taken for a mistake."""


@dataclass(frozen=True)
class Indexed:
    """The outcome of indexing a folder of shards."""

    manifest: Manifest
    skipped: tuple[str, ...]
    """"shard: sample: reason" of every sample left out."""
    idx_written: int
    """DALI indices made or made anew; the others were right."""
    was_converted: bool
    """The set had been converted here; its pictures were in their source's order and are now in the tars'."""


def index_shards(
    folder: str | Path,
    *,
    labelled: bool = True,
    classes: Sequence[str] | None = None,
    extensions: Sequence[str] | None = None,
    max_bad: float = MAX_BAD,
    accept_truncated: bool = False,
    workers: int | None = None,
    progress: Callable[[], None] | None = None,
) -> Indexed:
    """Index the tars of a folder, sorted by name; picture i is the i-th on the disk.

    Adds index.npy, set.json and a DALI index beside each tar, and changes no tar. A sample's picture is the
    file with one of ``extensions`` (without a dot, any case, the first that it has); by default the kind of
    picture that the first sample has. Its label is the number in ``cls``, or ``label`` in ``json``, or none
    (always with ``labelled`` off).
    ``classes`` names the labels; by default an earlier manifest does, else they are called 0, 1, ….
    Samples without a picture, or with one whose size cannot be read, are left out and named. More pictures
    without a size than the share ``max_bad`` are an error. ``accept_truncated`` takes of a damaged tar the
    samples that come before the place where it cannot be read on, and counts that place in the manifest.
    ``progress`` is called once a tar.
    Raises ValueError, naming tar and sample, for a folder without tars, with compressed ones or with a
    conversion that has not ended, for a tar that is damaged, for too many samples left out, for a label that
    is none or has no name, and for samples that have another kind of picture; OSError where the folder cannot
    be written.
    """
    folder = Path(folder)
    tars = _find_tars(folder)
    workers = num_workers(workers)
    check_share(max_bad)
    _check_writable(folder)
    before = finished_before(folder, replaced=True)
    wanted = (
        tuple(e.lower().lstrip(".") for e in extensions)
        if extensions
        else _first_kind(tars, accept_truncated)
    )
    found: list[_Tar] = []
    for tar in ordered_map(
        lambda i: _read_tar(tars[i], wanted, labelled, accept_truncated), len(tars), workers=workers
    ):
        found.append(tar)
        if progress is not None:
            progress()
    skipped = tuple(line for tar in found for line in tar.skipped)
    kept = [tar for tar in found if len(tar.records)]
    if not kept:
        raise ValueError(f"{folder} holds no picture that can be used: {'; '.join(skipped[:3])}")
    index = _join(kept)
    replaced = sum((tar.replaced for tar in found), Counter[str]())
    bad = {reason: count for reason, count in of_kind("skipped", replaced).items() if reason != _NO_PICTURE}
    check_bad(bad, len(index) + sum(bad.values()), max_bad, str(folder), skipped[-1] if skipped else "")
    names = _class_names(folder, index["label"], classes, before)
    manifest = save_set(
        folder,
        index,
        [tar.shard for tar in kept],
        skipped=skipped,
        source=folder.resolve().name,
        classes=names,
        replaced=replaced,
        settings={"indexed": True, "extensions": list(wanted)},
    )
    was_converted = before is not None and PLAN_KEY in before.settings
    return Indexed(manifest, skipped, sum(tar.idx_written for tar in found), was_converted)


def _find_tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the folder that holds the .tar shards")
    if sentence := unfinished(folder):
        raise ValueError(sentence)
    tars = sorted(folder.glob("*.tar"))
    packed = sorted(p for p in folder.iterdir() if p.name.lower().endswith((".tgz", ".tar.gz", ".tar.zst")))
    if packed:
        raise ValueError(
            f"{packed[0]} is compressed ({len(packed)} such files), so that no picture can be reached "
            "without unpacking all before it; unpack them to plain .tar files first"
        )
    if not tars:
        raise ValueError(f"{folder} holds no .tar files; give the folder that holds the shards")
    return tars


def _check_writable(folder: Path) -> None:
    """Fail before the work, not after it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror}); indices lie beside the tars: make it writable, "
            "or link the tars into a folder of your own"
        ) from error


def _first_kind(tars: Sequence[Path], accept_truncated: bool) -> tuple[str, ...]:
    for tar in tars:
        for sample in _samples(tar, PassedOver() if accept_truncated else None):
            if found := _pictures(sample):
                return (found[0].suffix.lower(),)
    raise ValueError(
        f"no pictures in the tars of {tars[0].parent}: looked for {' '.join(PICTURE_SUFFIXES)}; name their "
        "kind with --ext"
    )


def _samples(tar: Path, passed_over: PassedOver | None) -> list[TarSample]:
    """The samples of a tar; damage is counted in ``passed_over``, or without it an error."""
    members = scan_tar(tar, None if passed_over is None else passed_over.count_damage)
    return list(tar_samples(member for member in members if not member.link))


def _pictures(sample: TarSample) -> list[Component]:
    return [c for c in sample.components if "." + c.suffix.lower() in PICTURE_SUFFIXES]


def write_dali_indices(
    folder: str | Path,
    *,
    accept_truncated: bool = False,
    workers: int | None = None,
    progress: Callable[[], None] | None = None,
) -> int:
    """Write the DALI index of every tar of a set where it is missing or wrong, and nothing else.

    ``accept_truncated`` as in ``index_shards``. Returns how many were written. Raises as ``open_shards``
    does, ValueError for a damaged tar, and OSError where the folder cannot be written.
    """
    shards = open_shards(folder)
    workers = num_workers(workers)
    _check_writable(shards.path)

    rows_by_shard = pictures_on_disk(shards.shards, shards.index)

    def write(number: int) -> bool:
        tar = shards.tar_path(number)
        offsets = shards.index["offset"][rows_by_shard[number]]
        samples = _samples(tar, PassedOver() if accept_truncated else None)
        return _write_idx(tar, dali_index(with_pictures_at(offsets, samples)))

    written = 0
    for anew in ordered_map(write, len(shards.shards), workers=workers):
        written += anew
        if progress is not None:
            progress()
    return written


@dataclass
class _Tar:
    """What was found in one tar."""

    path: Path
    shard: Shard = field(init=False)
    records: npt.NDArray[np.void] = field(init=False)
    """(n,) of INDEX_DTYPE, the column ``shard`` still empty."""
    idx_written: bool = False
    replaced: PassedOver = field(default_factory=PassedOver)
    skipped: list[str] = field(default_factory=list)


def _read_tar(path: Path, wanted: tuple[str, ...], labelled: bool, accept_truncated: bool) -> _Tar:
    tar = _Tar(path)
    samples = _samples(path, tar.replaced if accept_truncated else None)
    if not samples:
        tar.records = np.zeros(0, INDEX_DTYPE)
        return tar
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        records = []
        for sample in samples:
            record = _record(path, sample, wanted, labelled, content)
            if isinstance(record, str):
                tar.replaced[f"skipped: {record}"] += 1
                tar.skipped.append(f"{path.name}: {sample.key}: {record}")
            else:
                records.append(record)
        tar.records = np.array(records, INDEX_DTYPE)
        tar.shard = Shard(path.name, len(records), len(content), hashlib.sha256(content).hexdigest())
    tar.idx_written = _write_idx(path, dali_index(with_pictures_at(tar.records["offset"], samples)))
    return tar


def _record(
    path: Path, sample: TarSample, wanted: tuple[str, ...], labelled: bool, content: mmap.mmap
) -> tuple[int, ...] | str:
    """The record of a sample's picture, or why it is left out."""
    by_suffix = {component.suffix.lower(): component for component in reversed(sample.components)}
    picture = next((by_suffix[suffix] for suffix in wanted if suffix in by_suffix), None)
    if picture is None:
        if others := _pictures(sample):
            raise ValueError(
                f"{path}: the sample {sample.key} has the picture {others[0].name}, others have "
                f"{' or '.join(wanted)}; name all kinds with --ext {' '.join(wanted)} {others[0].suffix}"
            )
        return _NO_PICTURE
    size = read_size(content[picture.offset : picture.offset + picture.num_bytes])
    if size is None:
        return "no readable size"
    if max(size) > MAX_SIDE_PX or picture.num_bytes > MAX_PICTURE_BYTES:
        return "too large"
    label = _label(path, sample, by_suffix, content) if labelled else NO_LABEL
    return picture.offset, picture.num_bytes, 0, label, size[1], size[0]


def _label(path: Path, sample: TarSample, by_suffix: dict[str, Component], content: mmap.mmap) -> int:
    for suffix in (LABEL_SUFFIX, JSON_SUFFIX):
        if (file := by_suffix.get(suffix)) is None:
            continue
        text = content[file.offset : file.offset + file.num_bytes]
        try:
            if suffix == LABEL_SUFFIX:
                value = int(text) if _NUMBER.fullmatch(text) else None
            else:
                value = json.loads(text).get(JSON_KEY, NO_LABEL)
        except (ValueError, AttributeError):
            value = None
        if not isinstance(value, int) or isinstance(value, bool) or not NO_LABEL <= value < 1 << 31:
            raise ValueError(
                f"{path}: {file.name} of the sample {sample.key} gives no class number (it starts with "
                f"{text[:20]!r}); a label is 0 … {(1 << 31) - 1}, or −1 for none"
            )
        return value
    return NO_LABEL


def _join(tars: Sequence[_Tar]) -> npt.NDArray[np.void]:
    for number, tar in enumerate(tars):
        tar.records["shard"] = number
    return np.concatenate([tar.records for tar in tars])


def _class_names(
    folder: Path, labels: npt.NDArray[np.int32], given: Sequence[str] | None, before: Manifest | None
) -> tuple[str, ...]:
    """The names of all labels; none where no picture has a label."""
    num_needed = int(labels.max()) + 1
    if num_needed == 0:
        return ()
    if given is not None:
        if len(given) < num_needed:
            raise ValueError(
                f"{len(given)} classes are named, {folder} has the label {num_needed - 1}; name all of them"
            )
        return tuple(given)
    if before is not None and len(before.classes) >= num_needed:
        return before.classes
    if num_needed > MAX_NUMBERED_CLASSES:
        raise ValueError(
            f"{folder} has the label {num_needed - 1}, which would make {num_needed} classes; give a file of "
            "class names with --classes, or mend the labels"
        )
    return tuple(map(str, range(num_needed)))


def _write_idx(tar: Path, text: bytes) -> bool:
    """Write DALI's index where it is not there as it should be; return whether it was written."""
    path = dali_index_path(tar)
    try:
        if path.read_bytes() == text:
            return False
    except FileNotFoundError:
        pass
    write_atomically(path, lambda file: file.write(text))
    return True
