"""Some pictures of a set: a share of each class, or those of a list of names.

Shape letters: N pictures of the set, M of the subset, C classes.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from pipelines.randomness import Draw, Purpose, bits

_MOST_NAMED = 3
_POSITION = re.compile(r"#\d+")


def balanced_subset(label_N: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """(M,) positions, rising, of a share of each class, drawn by the seed; at least one picture of each.

    A class of n pictures gives n · share of them, rounded, and the larger of two shares has all pictures of
    the smaller. label_N: classes from 0; share: in (0, 1]. Raises ValueError for another share, and for
    pictures without a class.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of labels is {share:g}; it must lie in (0, 1], 0.1 for 10 %")
    if (label_N < 0).any():
        raise ValueError(
            f"{int((label_N < 0).sum())} of {len(label_N)} pictures have no label; give a set that was made "
            "from folders of classes"
        )
    lots_N = bits(Draw(seed, 0, np.arange(len(label_N))), Purpose.SUBSET, 1)[:, 0]
    order_N = np.lexsort((lots_N, label_N))
    count_C = np.bincount(label_N)
    wanted_C = np.maximum(np.minimum(count_C, 1), np.floor(count_C * share + 0.5).astype(np.int64))
    place_N = np.arange(len(label_N)) - np.repeat(np.cumsum(count_C) - count_C, count_C)
    chosen_M: NDArray[np.int64] = order_N[place_N < np.repeat(wanted_C, count_C)]
    return np.sort(chosen_M)


def listed_subset(names: Callable[[], Iterable[str]], count: int, path: Path) -> NDArray[np.int64]:
    """(M,) positions, rising, of the pictures that a file names, one a line.

    A line is a file's name, or its path from any folder on: ``n01440764_10043.JPEG`` as well as
    ``train/n01440764/n01440764_10043.JPEG``. Suffixes count only where names differ in nothing else; empty
    lines do not. A list for a set without names has positions, ``#0`` and on.

    Args:
        names: gives those of the set's pictures, in order.
        count: of the set's pictures.
        path: of the file.

    Raises:
        ValueError: if lines name no picture of the set, or the same name stands for several.
        OSError: if the file cannot be read.
    """
    # As X.paths: what is not UTF-8 in a name stays as it is.
    lines = [line.strip() for line in os.fsdecode(path.read_bytes()).split("\n") if line.strip()]
    positions = [int(line[1:]) for line in lines if _POSITION.fullmatch(line)]
    if lines and len(positions) == len(lines):
        if max(positions) >= count:
            raise ValueError(f"{path} has #{max(positions)}, the set's pictures are #0 … #{count - 1}")
        return np.unique(np.array(positions, np.int64))
    found = _matches(lines, names(), lambda name: name)
    if rest := [line for line in found if not found[line]]:
        found |= _matches(rest, names(), _without_suffix)
    missing = [line for line, pictures in found.items() if not pictures]
    if missing or not found:
        raise ValueError(
            f"{path} names {len(found)} pictures, of which the set lacks {len(missing)}"
            f"{f' (such as {_some(missing)})' if missing else ''}; check that the list is of this set"
        )
    return np.unique(np.array([_the_one(path, *item) for item in found.items()], np.int64))


Pictures = list[tuple[int, str]]
"""Positions and names."""


def _matches(lines: list[str], names: Iterable[str], key: Callable[[str], str]) -> dict[str, Pictures]:
    """Line → the pictures whose names by ``key`` end alike."""
    found: dict[str, Pictures] = {line: [] for line in lines}
    by_file = defaultdict[str, list[str]](list)
    for line in found:
        by_file[_file(key(line))].append(line)
    for index, name in enumerate(names):
        for line in by_file.get(_file(key(name)), ()):
            if _ends_alike(key(name), key(line)):
                found[line].append((index, name))
    return found


def _the_one(path: Path, line: str, pictures: Pictures) -> int:
    """The position of the picture that a line means."""
    whole = [index for index, name in pictures if name == line]
    if len(whole) == 1:
        return whole[0]
    if len(pictures) > 1:
        raise ValueError(
            f"{path} names {line}, and the set has several pictures of this name (the second is "
            f"{pictures[1][1]}); give their paths below the source in place of their names"
        )
    return pictures[0][0]


def lines_of(names: Callable[[], Iterable[str]], subset_M: NDArray[np.int64]) -> list[str] | None:
    """What `listed_subset` takes these pictures by: their names, None where not all names are good for it.

    names: gives those of all the set's pictures, in order; it may raise ValueError.
    """
    try:
        everyone = list(names())
    except ValueError:  # they are not on record
        return None
    if len(set(everyone)) < len(everyone):
        return None
    lines = [everyone[index] for index in subset_M]
    unfit = any(line != line.strip() or "\n" in line or _POSITION.fullmatch(line) for line in lines)
    return None if unfit else lines


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.name else name


def _file(path: str) -> str:
    return path.rpartition("/")[2]


def _ends_alike(path: str, other: str) -> bool:
    """Whether the last parts of one path are those of the other, all of them."""
    return f"/{path}".endswith(f"/{other}") or f"/{other}".endswith(f"/{path}")


def _some(missing: list[str]) -> str:
    return ", ".join(missing[:_MOST_NAMED])
