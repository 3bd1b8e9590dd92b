"""Subsets of a set: a share of each class, or the images of a list of names.

Shape letters: N images of the set, M of the subset, C classes.
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
    """Draw a share of each class, at least one image per class.

    From a class of n images, n · share are taken, rounded. The images of a smaller share are among those of a
    larger share.

    Args:
        label_N: (N,) classes from 0.
        share: in (0, 1].
        seed: of the random choice.

    Returns:
        (M,) sorted positions.

    Raises:
        ValueError: if the share is out of range, or an image has no label.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of labels is {share:g}; it must lie in (0, 1], 0.1 for 10 %")
    if (label_N < 0).any():
        raise ValueError(
            f"{int((label_N < 0).sum())} of {len(label_N)} images have no label; give a set that was made "
            "from folders of classes"
        )
    lot_N = bits(Draw(seed, 0, np.arange(len(label_N))), Purpose.SUBSET, 1)[:, 0]
    order_N = np.lexsort((lot_N, label_N))
    count_C = np.bincount(label_N)
    num_C = np.maximum(np.minimum(count_C, 1), np.floor(count_C * share + 0.5).astype(np.int64))
    rank_N = np.arange(len(label_N)) - np.repeat(np.cumsum(count_C) - count_C, count_C)
    chosen_M: NDArray[np.int64] = order_N[rank_N < np.repeat(num_C, count_C)]
    return np.sort(chosen_M)


def listed_subset(names: Callable[[], Iterable[str]], count: int, path: Path) -> NDArray[np.int64]:
    """Find the images that a text file lists, one per line.

    A line is the name of an image file, or the end of its path: ``n01440764_10043.JPEG`` or
    ``train/n01440764/n01440764_10043.JPEG``. If no image matches, names are compared without their suffixes.
    Empty lines are ignored. For a set without names, lines are positions: ``#0``, ``#1``, ….

    Args:
        names: returns the names of the set's images, in order.
        count: number of the set's images.
        path: path of the text file.

    Returns:
        (M,) sorted positions.

    Raises:
        ValueError: if a line names no image of the set, or several.
        OSError: if the file cannot be read.
    """
    # Names that are not UTF-8 are decoded as in X.paths.
    lines = [line.strip() for line in os.fsdecode(path.read_bytes()).split("\n") if line.strip()]
    positions = [int(line[1:]) for line in lines if _POSITION.fullmatch(line)]
    if lines and len(positions) == len(lines):
        if max(positions) >= count:
            raise ValueError(f"{path} has #{max(positions)}, the set's images are #0 … #{count - 1}")
        return np.unique(np.array(positions, np.int64))
    found = _matches(lines, names(), lambda name: name)
    if rest := [line for line in found if not found[line]]:
        found |= _matches(rest, names(), _without_suffix)
    missing = [line for line, matches in found.items() if not matches]
    if missing or not found:
        raise ValueError(
            f"{path} names {len(found)} images, of which the set lacks {len(missing)}"
            f"{f' (such as {_examples(missing)})' if missing else ''}; check that the list belongs to "
            "this set"
        )
    return np.unique(np.array([_position_of(path, *item) for item in found.items()], np.int64))


Matches = list[tuple[int, str]]
"""Positions and names of images."""


def _matches(lines: list[str], names: Iterable[str], key: Callable[[str], str]) -> dict[str, Matches]:
    """Line → images with the same last path components, compared after ``key`` is applied to both."""
    found: dict[str, Matches] = {line: [] for line in lines}
    by_file = defaultdict[str, list[str]](list)
    for line in found:
        by_file[_file_name(key(line))].append(line)
    for index, name in enumerate(names):
        for line in by_file.get(_file_name(key(name)), ()):
            if _ends_alike(key(name), key(line)):
                found[line].append((index, name))
    return found


def _position_of(path: Path, line: str, matches: Matches) -> int:
    """The position of the image that a line names. Raises ValueError if it names several."""
    exact = [index for index, name in matches if name == line]
    if len(exact) == 1:
        return exact[0]
    if len(matches) > 1:
        raise ValueError(
            f"{path} names {line}, and the set has several images of this name (the second is "
            f"{matches[1][1]}); give their paths below the source instead of their names"
        )
    return matches[0][0]


def lines_of(names: Callable[[], Iterable[str]], subset_M: NDArray[np.int64]) -> list[str] | None:
    """The names of images, as the lines of a text file that `listed_subset` reads.

    Args:
        names: returns the names of all images of the set, in order; may raise ValueError.
        subset_M: (M,) positions of the images.

    Returns:
        The lines; None if names are not recorded, not unique, or not possible as lines.
    """
    try:
        all_names = list(names())
    except ValueError:  # they are not recorded
        return None
    if len(set(all_names)) < len(all_names):
        return None
    lines = [all_names[index] for index in subset_M]
    unfit = any(line != line.strip() or "\n" in line or _POSITION.fullmatch(line) for line in lines)
    return None if unfit else lines


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.name else name


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def _ends_alike(path: str, other: str) -> bool:
    """Whether one path equals the other, or the last components of the other."""
    return f"/{path}".endswith(f"/{other}") or f"/{other}".endswith(f"/{path}")


def _examples(missing: list[str]) -> str:
    return ", ".join(missing[:_MOST_NAMED])
