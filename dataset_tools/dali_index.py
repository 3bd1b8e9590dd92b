"""DALI's index of a tar, version 1.2 of its wds2idx: a line for each sample, ``suffix offset size name``
for each of its files.

Written from the places where the files really lie. wds2idx asks GNU tar, and is told for a name of more than
100 letters that does not fit into tar's short form where the header of the long name is.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataset_tools.tar_members import Member
from pipelines.sets.shards import DALI_INDEX_VERSION

_VERSION_WITHOUT_NAMES = "v1.1"


class Component(NamedTuple):
    """One file of a sample."""

    suffix: str
    """What comes after the first dot of its name."""
    offset: int
    num_bytes: int
    name: str


class TarSample(NamedTuple):
    """Files that follow each other in a tar under one key."""

    key: str
    components: tuple[Component, ...]


def split_name(name: str) -> tuple[str, str]:
    """Return (key, suffix) as WebDataset cuts a member's name; ("", "") for one that belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}{slash}{stem}", suffix) if stem and suffix else ("", "")


def tar_samples(members: Iterable[Member]) -> Iterator[TarSample]:
    """Group the members of a tar into samples; hidden files, and names without a dot, are passed over."""
    key, components = "", list[Component]()
    for member in members:
        found, suffix = split_name(member.name)
        if not found:
            continue
        if components and found != key:
            yield TarSample(key, tuple(components))
            components = []
        key = found
        components.append(Component(suffix, member.offset, member.num_bytes, member.name))
    if components:
        yield TarSample(key, tuple(components))


def with_pictures_at(offsets: NDArray[np.uint64], samples: Iterable[TarSample]) -> Iterator[TarSample]:
    """Yield the samples that have a file at one of ``offsets``: those whose picture is in the set."""
    wanted = set(offsets.tolist())
    return (sample for sample in samples if any(part.offset in wanted for part in sample.components))


def dali_index(samples: Iterable[TarSample]) -> bytes:
    """The text of the index.

    Where a name has white space, at which DALI would split it, the index is of version 1.1, without names;
    files whose very suffix has some are left out.
    """
    kept = [[part for part in sample.components if not _has_space(part.suffix)] for sample in samples]
    named = not any(_has_space(part.name) for parts in kept for part in parts)
    version = DALI_INDEX_VERSION if named else _VERSION_WITHOUT_NAMES
    lines = [" ".join(" ".join(map(str, part[: 4 if named else 3])) for part in parts) for parts in kept]
    text = "\n".join([f"{version} {len(lines)}", *lines, ""])
    return text.encode("utf-8", "surrogateescape")


def _has_space(text: str) -> bool:
    return text.split() != [text]
