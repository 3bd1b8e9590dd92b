"""Makes a set from existing shards: writes indices next to the tars and copies nothing."""

import hashlib
import json
import mmap
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataset_tools.shard_plan import PLAN_KEY
from dataset_tools.shard_set import finished_manifest, save_set, unfinished
from dataset_tools.shard_writer import MAX_IMAGE_BYTES
from dataset_tools.tars import Component, TarSample, dali_index, scan_tar, tar_samples, with_images_at
from dataset_tools.work import MAX_BAD, Progress, check_bad, check_share, num_workers, ordered_map
from pipelines.decode.pillow import read_size
from pipelines.sets.beton import MAX_SIDE_PX
from pipelines.sets.folder import IMAGE_SUFFIXES, NO_LABEL, PassedOver
from pipelines.sets.manifest import Manifest, Shard, of_kind
from pipelines.sets.shards import INDEX_DTYPE, dali_index_path, open_shards, positions_by_shard
from training.files import write_atomically

LABEL_SUFFIX, JSON_SUFFIX, JSON_KEY = "cls", "json", "label"
"""A sample's label is the number in its ``cls`` file, or this key of its ``json`` file."""
_NO_IMAGE = "no picture"
"""A reason in manifests. It must stay as it is, because existing manifests contain it."""
_NUMBER = re.compile(rb"\s*-?[0-9]{1,10}\s*")
MAX_NUMBERED_CLASSES = 1_000_000
"""Number of classes up to which labels without names are accepted; more must be a mistake."""


@dataclass(frozen=True)
class Indexed:
    """The result of indexing a folder of shards."""

    manifest: Manifest
    skipped: tuple[str, ...]
    """"shard: sample: reason" of every sample left out."""
    idx_written: int
    """Number of DALI indices written; the others were correct."""
    was_converted: bool
    """True if a conversion made the set. Its images were in the order of their source; now they are in the
    order of the tars."""


def index_shards(
    folder: str | Path,
    *,
    labelled: bool = True,
    classes: Sequence[str] | None = None,
    extensions: Sequence[str] | None = None,
    max_bad: float = MAX_BAD,
    accept_truncated: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Indexed:
    """Index the tars of a folder, sorted by name. Images are numbered in the order of the tars.

    Adds index.npy, set.json and one DALI index per tar, and changes no tar. Samples without an image, or
    with an image of unknown size, are left out and listed.

    Args:
        folder: holds the tars.
        labelled: take the label of a sample from its ``cls`` or ``json`` file; −1 if it has neither.
        classes: names of the labels; by default those of an earlier manifest, or else 0, 1, ….
        extensions: suffixes of images, without a dot, in any case; a sample's image is the file with the
            first one that it has. By default the suffix of the image in the first sample.
        max_bad: share of the images that may have an unknown size.
        accept_truncated: take the samples of a damaged tar before the damage, and record the damage in the
            manifest.
        workers: tars that are read at the same time; None takes all cores.
        progress: called once per tar.

    Raises:
        ValueError: if the folder has no tars, compressed tars or an unfinished conversion; if a tar is
            damaged; if too many samples are left out; if a label is not a number or has no name; if
            samples have images of another kind.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder)
    tars = _find_tars(folder)
    workers = num_workers(workers)
    check_share(max_bad)
    _check_writable(folder)
    before = finished_manifest(folder, replaced=True)
    suffixes = tuple(e.lower().lstrip(".") for e in extensions or _first_suffix(tars, accept_truncated))
    found = list(
        ordered_map(
            lambda i: _read_tar(tars[i], suffixes, labelled, accept_truncated),
            len(tars),
            workers=workers,
            progress=progress,
        )
    )
    kept = [tar for tar in found if len(tar.records)]
    skipped = tuple(line for tar in found for line in tar.skipped)
    if not kept:
        raise ValueError(f"{folder} holds no image that can be used: {'; '.join(skipped[:3])}")
    index = _join_records(kept)
    replaced = sum((tar.replaced for tar in found), Counter[str]())
    bad = {reason: count for reason, count in of_kind("skipped", replaced).items() if reason != _NO_IMAGE}
    check_bad(bad, len(index) + sum(bad.values()), max_bad, str(folder), skipped[-1] if skipped else "")
    manifest = save_set(
        folder,
        index,
        [tar.shard for tar in kept],
        skipped=skipped,
        source=folder.resolve().name,
        classes=_class_names(folder, index["label"], classes, before),
        replaced=replaced,
        settings={"indexed": True, "extensions": list(suffixes)},
    )
    was_converted = before is not None and PLAN_KEY in before.settings
    return Indexed(manifest, skipped, sum(tar.idx_written for tar in found), was_converted)


def write_dali_indices(
    folder: str | Path,
    *,
    accept_truncated: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the DALI indices of a set that are missing or wrong, and nothing else; return their number.

    Args:
        folder: of the set.
        accept_truncated: as in :func:`index_shards`.
        workers: tars that are read at the same time.
        progress: called once per tar.

    Raises:
        ValueError: if a tar is damaged; also as ``open_shards`` does.
        OSError: if the folder cannot be written.
    """
    shards = open_shards(folder)
    workers = num_workers(workers)
    _check_writable(shards.path)
    rows_by_shard = positions_by_shard(shards.shards, shards.index)

    def write(number: int) -> bool:
        tar = shards.tar_path(number)
        offsets = shards.index["offset"][rows_by_shard[number]]
        samples = _samples(tar, PassedOver() if accept_truncated else None)
        return _write_idx(tar, dali_index(with_images_at(offsets, samples)))

    return sum(ordered_map(write, len(shards.shards), workers=workers, progress=progress))


def _find_tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the folder that holds the .tar shards")
    if sentence := unfinished(folder):
        raise ValueError(sentence)
    tars = sorted(folder.glob("*.tar"))
    packed = sorted(p for p in folder.iterdir() if p.name.lower().endswith((".tgz", ".tar.gz", ".tar.zst")))
    if packed:
        raise ValueError(
            f"{packed[0]} is compressed ({len(packed)} such files): no image can be read without unpacking "
            "everything before it; unpack them to plain .tar files first"
        )
    if not tars:
        raise ValueError(f"{folder} holds no .tar files; give the folder that holds the shards")
    return tars


def _check_writable(folder: Path) -> None:
    """Raise OSError before the work instead of after it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror}); indices are stored next to the tars: make it "
            "writable, or link the tars into a folder of your own"
        ) from error


def _first_suffix(tars: Sequence[Path], accept_truncated: bool) -> tuple[str, ...]:
    for tar in tars:
        for sample in _samples(tar, PassedOver() if accept_truncated else None):
            if found := _image_files(sample):
                return (found[0].suffix.lower(),)
    raise ValueError(
        f"no images in the tars of {tars[0].parent}: looked for {' '.join(IMAGE_SUFFIXES)}; name their "
        "suffix with --ext"
    )


def _samples(tar: Path, passed_over: PassedOver | None) -> list[TarSample]:
    """Return the samples of a tar; damage is counted in ``passed_over``, or raises ValueError without it."""
    members = scan_tar(tar, None if passed_over is None else passed_over.count_damage)
    return list(tar_samples(member for member in members if not member.link))


def _image_files(sample: TarSample) -> list[Component]:
    return [c for c in sample.components if "." + c.suffix.lower() in IMAGE_SUFFIXES]


@dataclass
class _IndexedTar:
    """The contents of one tar."""

    path: Path
    shard: Shard = field(init=False)
    records: npt.NDArray[np.void] = field(init=False)
    """(n,) of INDEX_DTYPE; the column ``shard`` is not set."""
    idx_written: bool = False
    replaced: PassedOver = field(default_factory=PassedOver)
    skipped: list[str] = field(default_factory=list)


def _read_tar(path: Path, suffixes: tuple[str, ...], labelled: bool, accept_truncated: bool) -> _IndexedTar:
    tar = _IndexedTar(path)
    samples = _samples(path, tar.replaced if accept_truncated else None)
    if not samples:
        tar.records = np.zeros(0, INDEX_DTYPE)
        return tar
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        records = []
        for sample in samples:
            record = _record(path, sample, suffixes, labelled, content)
            if isinstance(record, str):
                tar.replaced[f"skipped: {record}"] += 1
                tar.skipped.append(f"{path.name}: {sample.key}: {record}")
            else:
                records.append(record)
        tar.records = np.array(records, INDEX_DTYPE)
        tar.shard = Shard(path.name, len(records), len(content), hashlib.sha256(content).hexdigest())
    tar.idx_written = _write_idx(path, dali_index(with_images_at(tar.records["offset"], samples)))
    return tar


def _record(
    path: Path, sample: TarSample, suffixes: tuple[str, ...], labelled: bool, content: mmap.mmap
) -> tuple[int, ...] | str:
    """Return the record of a sample's image, or the reason why it is left out."""
    by_suffix = {component.suffix.lower(): component for component in reversed(sample.components)}
    image = next((by_suffix[suffix] for suffix in suffixes if suffix in by_suffix), None)
    if image is None:
        if others := _image_files(sample):
            raise ValueError(
                f"{path}: the sample {sample.key} has the image {others[0].name}, others have "
                f"{' or '.join(suffixes)}; name all kinds with --ext {' '.join(suffixes)} {others[0].suffix}"
            )
        return _NO_IMAGE
    size = read_size(content[image.offset : image.offset + image.num_bytes])
    if size is None:
        return "no readable size"
    if max(size) > MAX_SIDE_PX or image.num_bytes > MAX_IMAGE_BYTES:
        return "too large"
    label = _label(path, sample, by_suffix, content) if labelled else NO_LABEL
    return image.offset, image.num_bytes, 0, label, size[1], size[0]


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
                f"{path}: {file.name} of the sample {sample.key} holds no class number (it starts with "
                f"{text[:20]!r}); a label is 0 … {(1 << 31) - 1}, or −1 for none"
            )
        return value
    return NO_LABEL


def _join_records(tars: Sequence[_IndexedTar]) -> npt.NDArray[np.void]:
    for number, tar in enumerate(tars):
        tar.records["shard"] = number
    return np.concatenate([tar.records for tar in tars])


def _class_names(
    folder: Path, labels: npt.NDArray[np.int32], given: Sequence[str] | None, before: Manifest | None
) -> tuple[str, ...]:
    """Return the names of all labels, or () if no image has a label."""
    num_needed = int(labels.max()) + 1
    if num_needed == 0:
        return ()
    if given is not None:
        if len(given) < num_needed:
            raise ValueError(
                f"{len(given)} classes are named, {folder} has the label {num_needed - 1}; name all classes"
            )
        return tuple(given)
    if before is not None and len(before.classes) >= num_needed:
        return before.classes
    if num_needed > MAX_NUMBERED_CLASSES:
        raise ValueError(
            f"{folder} has the label {num_needed - 1}, which would make {num_needed} classes; give a file of "
            "class names with --classes, or correct the labels"
        )
    return tuple(map(str, range(num_needed)))


def _write_idx(tar: Path, text: bytes) -> bool:
    """Write DALI's index if it is missing or differs; return whether it was written."""
    path = dali_index_path(tar)
    try:
        if path.read_bytes() == text:
            return False
    except FileNotFoundError:
        pass
    write_atomically(path, lambda file: file.write(text))
    return True
