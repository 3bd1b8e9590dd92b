"""The side files of a compiled set: the manifest ``X.json``, and the images' sources in ``X.paths``."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

VERSION = 1
SKIPPED_NAME = "skipped.txt"
"""The list of images that were left out, in a folder of shards."""
PENDING = ".next"
"""Suffix of the side files of a new set, until the set itself has replaced the old one."""
HASH_BYTES, HASH_AT = 64, 24 + 1041 + 17
"""Length and position of the hash of the contents in a .beton file of our writer. It equals the hash in the
manifest, and is at the start of the arguments of the second field, label, which FFCV does not use."""
Tier = Literal["jpeg", "yuv420", "raw"]
"""How images are stored: as JPEG files, as Y, U, V planes at 4:2:0, or as (H, W, 3) uint8 pixels."""
TIERS: tuple[Tier, ...] = get_args(Tier)
_BLOCK = 1 << 18
"""Entries of an index that are checked at a time."""


def blocks(count: int) -> Iterator[slice]:
    """Slices that cover ``range(count)``. A check of one at a time needs little memory."""
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))


@dataclass(frozen=True)
class Shard:
    """One tar file of a set."""

    name: str
    """File name in the set's folder."""
    count: int
    """Number of images."""
    num_bytes: int
    """File size."""
    sha256: str
    """Hash of the whole file."""


@dataclass(frozen=True)
class Manifest:
    """Description of one compiled set, stored as JSON next to a file or inside a folder of shards."""

    tier: str
    """One of TIERS."""
    count: int
    """Number of images."""
    num_bytes: int
    """Size of the compiled file, or of all shards together."""
    sha256: str
    """Of a file: hash of all images' bytes in order, then of the columns mode, width, height and label (see
    BetonWriter). Of shards: hash of their hashes in order, 64 digits each, then of the index's records."""
    source: str
    """Name of the source, without the path to it."""
    classes: tuple[str, ...] = ()
    """Class names in the order of their labels; empty if the images have no labels."""
    replaced: Mapping[str, int] = field(default_factory=dict)
    """Reason → number of images that were left out ("skipped: …") or encoded again ("transcoded: …"), of
    files that are not images ("ignored: …"), and of places after which a source could not be read
    ("damaged: …")."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The options of the conversion."""
    format: str = "beton"
    """beton: one file; shards: a folder of tars."""
    shards: tuple[Shard, ...] = ()
    """The files of a sharded set."""
    version: int = VERSION
    """Version of this JSON."""

    @staticmethod
    def read(path: str | Path) -> "Manifest | None":
        """The manifest of the set at ``path``, or None if there is none.

        Raises:
            ValueError: if the file is not JSON, or its keys or types are not those of a manifest.
        """
        target = valid_side_file(path, manifest_path(path))
        try:
            text = target.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise ValueError(f"{target} is not UTF-8 text ({error}); compile the set again") from error
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{target} is not valid JSON ({error}); compile the set again") from error
        return _from_json(content, target)


def manifest_path(path: str | Path) -> Path:
    """The path of a set's manifest: next to a file, or inside a folder of shards."""
    path = Path(path)
    return path / "set.json" if path.is_dir() else path.with_suffix(".json")


def paths_path(beton_path: str | Path) -> Path:
    """The path of the list of source paths of ``beton_path``."""
    return Path(beton_path).with_suffix(".paths")


def skipped_path(path: str | Path) -> Path:
    """The path of the list of left-out images: next to a file, or inside a folder of shards."""
    path = Path(path)
    return path / SKIPPED_NAME if path.is_dir() else path.with_suffix(".skipped.txt")


def of_kind(kind: str, replaced: Mapping[str, int]) -> dict[str, int]:
    """Reason → number, for the entries of one kind, such as "skipped", in a manifest's ``replaced``."""
    return {
        reason.removeprefix(f"{kind}: "): count
        for reason, count in replaced.items()
        if reason.startswith(f"{kind}: ")
    }


def pending_path(side_file: Path) -> Path:
    """The temporary name of a side file, while its set is about to replace another."""
    return side_file.with_name(side_file.name + PENDING)


def valid_side_file(path: str | Path, side_file: Path) -> Path:
    """The side file that belongs to the set at ``path``: ``side_file``, or the pending one of that name.

    If a process was killed after renaming the set and before renaming its side files, the pending side files
    belong to the set. The manifest is renamed last.
    """
    path = Path(path)
    pending_manifest = pending_path(manifest_path(path))
    if not pending_manifest.exists():
        return side_file
    try:
        content = json.loads(pending_manifest.read_bytes())
        promised = content["sha256"], content["num_bytes"]
        with path.open("rb") as file:
            file.seek(HASH_AT)
            recorded = file.read(HASH_BYTES).decode("ascii", "replace"), file.seek(0, os.SEEK_END)
    except (OSError, ValueError, KeyError, TypeError):
        return side_file
    pending = pending_path(side_file)
    return pending if promised == recorded and pending.exists() else side_file


def verify_hint(path: str | Path = "SET") -> str:
    """What to do about a compiled set that seems damaged; a clause of a message."""
    return f"see what is whole with `python -m dataset_tools verify {path}`"


def _from_json(content: Any, file: Path) -> Manifest:
    """Make a manifest from parsed JSON. Raises ValueError, naming ``file``, for unexpected contents."""
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a {type(content).__name__}, a manifest is an object; compile the set again"
        )
    if content.get("version") != VERSION:
        raise ValueError(
            f"{file} has manifest version {content.get('version')!r}, this program reads {VERSION}; "
            "compile the set again"
        )
    fields = {f.name: f for f in dataclasses.fields(Manifest)}
    if unknown := sorted(set(content) - set(fields)):
        raise ValueError(f"{file} has unknown keys {unknown}; known are {sorted(fields)}")
    if missing := sorted({"tier", "count", "num_bytes", "sha256", "source"} - set(content)):
        raise ValueError(f"{file} lacks the keys {missing}; compile the set again")
    kinds: dict[str, type] = {
        "count": int,
        "num_bytes": int,
        "classes": list,
        "shards": list,
        "replaced": dict,
        "settings": dict,
    }
    for name, value in content.items():
        kind = kinds.get(name, int if name == "version" else str)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{file}: {name} is {value!r}, expected {kind.__name__}; compile the set again")
    if content["tier"] not in TIERS:
        raise ValueError(f"{file}: tier is {content['tier']!r}, known are {', '.join(TIERS)}")
    shards = tuple(_shard(shard, file) for shard in content.get("shards", ()))
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError(f"{file} names a shard twice; compile the set again")
    if not all(isinstance(name, str) for name in content.get("classes", ())):
        raise ValueError(f"{file}: a class name is not text; compile the set again")
    return Manifest(**{**content, "classes": tuple(content.get("classes", ())), "shards": shards})


def _shard(content: Any, file: Path) -> Shard:
    """Make a shard from parsed JSON. Raises ValueError unless its name is that of a file in the folder."""
    kinds: dict[str, type] = {"name": str, "count": int, "num_bytes": int, "sha256": str}
    if not isinstance(content, dict) or set(content) != set(kinds):
        raise ValueError(f"{file}: a shard is {content!r}, expected {sorted(kinds)}; compile the set again")
    for key, kind in kinds.items():
        value = content[key]
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise ValueError(f"{file}: {key} of a shard is {value!r}; compile the set again")
    name = content["name"]
    if name != Path(name).name or "\0" in name or name in ("", ".."):
        raise ValueError(f"{file}: the shard {name!r} is not a file in the folder; compile the set again")
    return Shard(**content)


# File names may contain line breaks, which are escaped in X.paths.
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {escaped: plain for plain, escaped in _ESCAPES.items()}


def source_path_line(path: str) -> bytes:
    r"""The line of ``X.paths`` for a relative source path; line breaks and ``\`` are escaped."""
    escaped = re.sub(r"[\\\n\r]", lambda match: _ESCAPES[match.group()], path)
    return os.fsencode(escaped) + b"\n"


def read_source_path(beton_path: str | Path, index: int) -> str | None:
    """The path of an image relative to its source; None if it is not recorded.

    Reads ``X.paths`` line by line up to this image, which needs little memory but is too slow for loops.
    """
    if index < 0:
        return None
    try:
        with valid_side_file(beton_path, paths_path(beton_path)).open("rb") as file:
            line = next(itertools.islice(file, index, None), None)
    except FileNotFoundError:
        return None
    return None if line is None else _source_path(line)


def read_source_paths(beton_path: str | Path, count: int) -> Iterator[str]:
    """The paths of all images relative to their source, in order, read line by line.

    Args:
        beton_path: the set.
        count: number of its images.

    Raises:
        ValueError: if ``X.paths`` is missing or has another number of lines.
    """
    paths, lines = valid_side_file(beton_path, paths_path(beton_path)), 0
    with contextlib.suppress(FileNotFoundError), paths.open("rb") as file:
        for line in file:
            lines += 1
            yield _source_path(line)
    if lines != count:
        raise ValueError(
            f"{paths} names {lines} of the {count} images of {beton_path}; copy the right file there, or "
            "compile the set again"
        )


def _source_path(line: bytes) -> str:
    return re.sub(r"\\[\\nr]", lambda match: _UNESCAPES[match.group()], os.fsdecode(line.rstrip(b"\n")))
