"""DALI's index of a tar, version 1.2 of its wds2idx: a line for each sample, ``suffix offset size name``
for each of its files.

Written from the places where the files really lie. wds2idx asks GNU tar, and is told for a name of more than
100 letters that does not fit into tar's short form where the header of the long name is.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dataset_tools.tar_members import Member
from pipelines.shards import DALI_INDEX_VERSION


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


def dali_index(samples: Iterable[TarSample]) -> bytes:
    """The text of the index; DALI cannot read one whose names have white space in their suffix."""
    lines = [" ".join(" ".join(map(str, component)) for component in s.components) for s in samples]
    text = "\n".join([f"{DALI_INDEX_VERSION} {len(lines)}", *lines, ""])
    return text.encode("utf-8", "surrogateescape")
