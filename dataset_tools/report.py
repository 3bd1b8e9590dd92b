"""What is said of a compiled set, whatever its format."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.sets.manifest import Manifest

NUM_NAMED = 20
"""How many pictures a report names."""


@dataclass(frozen=True)
class BadIndex:
    """One picture of a set that cannot be decoded as promised."""

    index: int
    source_path: str | None
    """Where it came from, or shard and name in it; None where that is not recorded, or past the first
    twenty."""
    reason: str


@dataclass(frozen=True)
class Report:
    """What ``verify`` found."""

    path: Path
    count: int
    """Pictures in the set; 0 where not even its tables can be read."""
    tier: str
    """As in Stats; "" where the tables cannot be read."""
    num_bytes: int
    has_manifest: bool
    """Without a manifest the contents cannot be compared with what was written."""
    problems: tuple[str, ...]
    """Sentences about the set as a whole, and about its files."""
    bad: tuple[BadIndex, ...]
    """Every picture that does not decode, in order."""

    @property
    def ok(self) -> bool:
        """True where nothing is wrong."""
        return not self.problems and not self.bad


@dataclass(frozen=True)
class Stats:
    """Figures of a compiled set."""

    path: Path
    count: int
    tier: str
    """jpeg, yuv420, raw, or "jpeg and raw" in a set that another program wrote; "" without pictures."""
    num_bytes: int
    """Size of the file, or of all shards."""
    layout: str
    """Of what the pictures lie in: "pages of 8 MiB", "5 shards"."""
    per_class: tuple[tuple[str, int], ...]
    """(class name, number of pictures) in label order, "unlabelled" for −1."""
    width_px: tuple[int, float, int]
    """Smallest, median, largest."""
    height_px: tuple[int, float, int]
    """Smallest, median, largest."""
    payload_bytes_mean: float
    payload_bytes_median: float


def per_class(
    labels: npt.NDArray[np.int64] | npt.NDArray[np.int32], classes: tuple[str, ...]
) -> tuple[tuple[str, int], ...]:
    """Count labels; classes that the manifest names but no picture has count 0."""
    found, counts = np.unique(labels, return_counts=True)
    by_label = dict.fromkeys(range(len(classes)), 0) | dict(zip(found.tolist(), counts.tolist(), strict=True))

    def name(label: int) -> str:
        if label == -1:
            return "unlabelled"
        return classes[label] if 0 <= label < len(classes) else f"label {label}"

    return tuple((name(label), by_label[label]) for label in sorted(by_label))


def spread(values: npt.NDArray[np.uint16]) -> tuple[int, float, int]:
    """Smallest, median, largest."""
    return int(values.min()), float(np.median(values)), int(values.max())


def label_problems(labels: npt.NDArray[np.int64] | npt.NDArray[np.int32], manifest: Manifest) -> list[str]:
    """Return a sentence where labels have no class."""
    if not len(labels):
        return []
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or (manifest.classes and high >= len(manifest.classes)):
        return [f"labels reach from {low} to {high}, the manifest names {len(manifest.classes)} classes"]
    return []
