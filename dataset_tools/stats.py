"""Figures of a compiled set: images, classes, sizes. Nothing is decoded."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.sets.beton import TIER_MODES, BetonFile, open_beton
from pipelines.sets.manifest import Manifest
from pipelines.sets.shards import open_shards


@dataclass(frozen=True)
class Stats:
    """Figures of a compiled set."""

    path: Path
    count: int
    tier: str
    """jpeg, yuv420, raw, or "jpeg and raw" in a set that another program wrote; "" without images."""
    num_bytes: int
    """Size of the file, or of all shards."""
    layout: str
    """How the images are divided: "pages of 8 MiB", "5 shards"."""
    per_class: tuple[tuple[str, int], ...]
    """(class name, number of images) in label order; the label −1 is "unlabelled"."""
    width_px: tuple[int, float, int]
    """Minimum, median, maximum."""
    height_px: tuple[int, float, int]
    """Minimum, median, maximum."""
    payload_bytes_mean: float
    payload_bytes_median: float


def stats(path: str | Path) -> Stats:
    """Return the figures of a compiled set. Raises ValueError if its tables are damaged."""
    return _stats_of_shards(Path(path)) if Path(path).is_dir() else _stats_of_file(Path(path))


def count_images(path: str | Path) -> int:
    """Return the number of images; 0 if the tables are too damaged to know it."""
    try:
        return len(open_shards(path)) if Path(path).is_dir() else len(open_beton(path))
    except ValueError:
        return 0
    except FileNotFoundError:
        if Path(path).is_dir():
            return 0  # a file of the set is missing, which verify reports
        raise


def tiers(beton: BetonFile) -> str:
    """Names of the tiers that occur in a file."""
    modes = np.unique(beton.metadata["f0"]["mode"])
    return " and ".join(tier for tier, mode in TIER_MODES.items() if mode in modes)


def _stats_of_file(path: Path) -> Stats:
    beton = open_beton(path)
    manifest = Manifest.read(path)
    if not len(beton):
        raise ValueError(f"{path} holds no images; compile it again")
    image = beton.metadata["f0"]
    return Stats(
        path=beton.path,
        count=len(beton),
        tier=tiers(beton),
        num_bytes=beton.data.size,
        layout=f"pages of {beton.page_bytes / 2**20:g} MiB",
        per_class=_per_class(beton.labels, manifest.classes if manifest else ()),
        width_px=_min_median_max(image["width"]),
        height_px=_min_median_max(image["height"]),
        payload_bytes_mean=float(beton.sizes.mean()),
        payload_bytes_median=float(np.median(beton.sizes)),
    )


def _stats_of_shards(path: Path) -> Stats:
    shards = open_shards(path)
    index, manifest = shards.index, shards.manifest
    return Stats(
        path=path,
        count=len(shards),
        tier=manifest.tier,
        num_bytes=manifest.num_bytes,
        layout=f"{len(shards.shards)} shards",
        per_class=_per_class(index["label"], manifest.classes),
        width_px=_min_median_max(index["width"]),
        height_px=_min_median_max(index["height"]),
        payload_bytes_mean=float(index["num_bytes"].mean()),
        payload_bytes_median=float(np.median(index["num_bytes"])),
    )


def _per_class(
    labels: npt.NDArray[np.int64] | npt.NDArray[np.int32], classes: tuple[str, ...]
) -> tuple[tuple[str, int], ...]:
    """Count the labels; classes without images have the count 0."""
    found, counts = np.unique(labels, return_counts=True)
    by_label = dict.fromkeys(range(len(classes)), 0) | dict(zip(found.tolist(), counts.tolist(), strict=True))

    def name(label: int) -> str:
        if label == -1:
            return "unlabelled"
        return classes[label] if 0 <= label < len(classes) else f"label {label}"

    return tuple((name(label), by_label[label]) for label in sorted(by_label))


def _min_median_max(values: npt.NDArray[np.uint16]) -> tuple[int, float, int]:
    return int(values.min()), float(np.median(values)), int(values.max())
