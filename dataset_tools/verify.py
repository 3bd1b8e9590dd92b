"""Is a compiled set whole? And what is in it?"""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataset_tools.beton_writer import contents_hash_end
from dataset_tools.parallel import ordered_map
from pipelines.beton import MODE_JPEG, TIER_MODES, BetonFile, open_beton, pixel_bytes
from pipelines.cores import usable_cores
from pipelines.manifest import Manifest, read_source_path
from pipelines.turbojpeg import check_jpeg

NUM_NAMED = 20
"""How many bad pictures a report names."""


@dataclass(frozen=True)
class BadIndex:
    """One picture of a set that cannot be decoded as promised."""

    index: int
    source_path: str | None
    """Where it came from; None where that is not recorded, or past the first twenty."""
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
    """Sentences about the file as a whole."""
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
    """Size of the file."""
    page_bytes: int
    per_class: tuple[tuple[str, int], ...]
    """(class name, number of pictures) in label order, "unlabelled" for −1."""
    width_px: tuple[int, float, int]
    """Smallest, median, largest."""
    height_px: tuple[int, float, int]
    """Smallest, median, largest."""
    payload_bytes_mean: float
    payload_bytes_median: float


def verify(
    path: str | Path, *, workers: int | None = None, progress: Callable[[], None] | None = None
) -> Report:
    """Check a compiled set: header, tables, manifest, hash of the contents, and each picture by decoding it.

    ``progress`` is called once a picture. Damage is reported, not raised; where there is no file,
    FileNotFoundError is.
    """
    path = Path(path)
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
    reasons, digest = _check_pictures(beton, usable_cores() if workers is None else workers, progress)
    if manifest is not None:
        problems += _compare(beton, manifest, digest)
    bad = tuple(
        BadIndex(index, read_source_path(path, index) if named < NUM_NAMED else None, reason)
        for named, (index, reason) in enumerate(reasons)
    )
    return Report(path, len(beton), _tier(beton), beton.data.size, manifest is not None, tuple(problems), bad)


def _check_pictures(
    beton: BetonFile, workers: int, progress: Callable[[], None] | None
) -> tuple[list[tuple[int, str]], str]:
    """Decode all pictures and hash them; return (index, reason) of the bad ones and the hash."""
    bad: list[tuple[int, str]] = []
    hasher = hashlib.sha256()
    results = ordered_map(lambda index: _fault(beton, index), len(beton), workers=workers, chunk=16)
    with contextlib.closing(results):
        for index, fault in enumerate(results):
            hasher.update(beton.payload(index).data)
            if fault:
                bad.append((index, fault))
            if progress is not None:
                progress()
    return bad, contents_hash_end(hasher, beton.metadata)


def _fault(beton: BetonFile, index: int) -> str:
    """Return what is wrong with one picture, "" where nothing is."""
    image = beton.metadata["f0"][index]
    mode, width, height = int(image["mode"]), int(image["width"]), int(image["height"])
    payload = beton.payload(index)
    if mode != MODE_JPEG:
        wanted = pixel_bytes(mode, width, height)
        if payload.size == wanted:
            return ""
        return f"{payload.size} bytes for {width} × {height} px in mode {mode}, expected {wanted}"
    verdict = check_jpeg(payload)
    if verdict.state == "damaged":
        return f"damaged: {verdict.message}"
    if (verdict.width, verdict.height) != (width, height):
        return f"holds {verdict.width} × {verdict.height} px, the metadata says {width} × {height}"
    return ""


def _compare(beton: BetonFile, manifest: Manifest, digest: str) -> list[str]:
    """Return sentences on where the set differs from its manifest."""
    problems = []
    if manifest.num_bytes != beton.data.size:
        problems.append(f"the file has {beton.data.size} bytes, the manifest says {manifest.num_bytes}")
    if manifest.count != len(beton):
        problems.append(f"the file holds {len(beton)} pictures, the manifest says {manifest.count}")
    if manifest.sha256 != digest:
        problems.append(f"the contents hash to {digest}, the manifest says {manifest.sha256}")
    if manifest.tier != _tier(beton):
        problems.append(f"the pictures are of tier {_tier(beton)}, the manifest says {manifest.tier}")
    if len(beton):
        low, high = int(beton.labels.min()), int(beton.labels.max())
        if low < -1 or (manifest.classes and high >= len(manifest.classes)):
            problems.append(
                f"labels reach from {low} to {high}, the manifest names {len(manifest.classes)} classes"
            )
    return problems


def stats(path: str | Path) -> Stats:
    """Count a compiled set without decoding it. Raises ValueError where its tables are damaged."""
    beton = open_beton(path)
    manifest = Manifest.read(path)
    if not len(beton):
        raise ValueError(f"{path} holds no pictures; compile it again")
    image = beton.metadata["f0"]
    return Stats(
        path=beton.path,
        count=len(beton),
        tier=_tier(beton),
        num_bytes=beton.data.size,
        page_bytes=beton.page_bytes,
        per_class=_per_class(beton.labels, manifest.classes if manifest else ()),
        width_px=_spread(image["width"]),
        height_px=_spread(image["height"]),
        payload_bytes_mean=float(beton.sizes.mean()),
        payload_bytes_median=float(np.median(beton.sizes)),
    )


def _tier(beton: BetonFile) -> str:
    """Name the tiers of the modes that occur."""
    modes = np.unique(beton.metadata["f0"]["mode"])
    return " and ".join(tier for tier, mode in TIER_MODES.items() if mode in modes)


def _per_class(labels: npt.NDArray[np.int64], classes: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """Count labels; classes that the manifest names but no picture has count 0."""
    found, counts = np.unique(labels, return_counts=True)
    by_label = dict.fromkeys(range(len(classes)), 0) | dict(zip(found.tolist(), counts.tolist(), strict=True))

    def name(label: int) -> str:
        if label == -1:
            return "unlabelled"
        return classes[label] if 0 <= label < len(classes) else f"label {label}"

    return tuple((name(label), by_label[label]) for label in sorted(by_label))


def _spread(values: npt.NDArray[np.uint16]) -> tuple[int, float, int]:
    return int(values.min()), float(np.median(values)), int(values.max())
