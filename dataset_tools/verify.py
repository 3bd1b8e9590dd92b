"""Is a compiled set whole? And what is in it? Shards have a module of their own, ``verify_shards``."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dataset_tools.beton_writer import contents_hash_end
from dataset_tools.parallel import ordered_map
from dataset_tools.report import NUM_NAMED, BadIndex, Report, Stats, label_problems, per_class, spread
from dataset_tools.verify_shards import shards_stats, verify_shards
from pipelines.decode.jpeg import check_jpeg
from pipelines.sets.beton import MODE_JPEG, TIER_MODES, BetonFile, open_beton, pixel_bytes
from pipelines.sets.manifest import Manifest, read_source_path
from pipelines.sets.shards import open_shards


def verify(
    path: str | Path, *, workers: int | None = None, progress: Callable[[], None] | None = None
) -> Report:
    """Check a compiled set: tables, manifest, hash of the contents, and each picture by decoding it.

    ``progress`` is called once a picture. Damage is reported, not raised; where there is no set,
    FileNotFoundError is.
    """
    path = Path(path)
    return (verify_shards if path.is_dir() else _verify_file)(path, workers, progress)


def _verify_file(path: Path, workers: int | None, progress: Callable[[], None] | None) -> Report:
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
    reasons, digest = _check_pictures(beton, workers, progress)
    if manifest is not None:
        problems += _compare(beton, manifest, digest)
    elif beton.sha256 not in ("", digest):
        problems.append(f"the contents hash to {digest}, the file itself says {beton.sha256}")
    bad = tuple(
        BadIndex(index, read_source_path(path, index) if named < NUM_NAMED else None, reason)
        for named, (index, reason) in enumerate(reasons)
    )
    return Report(path, len(beton), _tier(beton), beton.data.size, manifest is not None, tuple(problems), bad)


def _check_pictures(
    beton: BetonFile, workers: int | None, progress: Callable[[], None] | None
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
    return problems + label_problems(beton.labels, manifest)


def stats(path: str | Path) -> Stats:
    """Count a compiled set without decoding it. Raises ValueError where its tables are damaged."""
    return shards_stats(Path(path)) if Path(path).is_dir() else _file_stats(Path(path))


def count_pictures(path: str | Path) -> int:
    """Return the number of pictures, 0 where the tables are too damaged to tell."""
    try:
        return len(open_shards(path)) if Path(path).is_dir() else len(open_beton(path))
    except ValueError:
        return 0
    except FileNotFoundError:
        if Path(path).is_dir():
            return 0  # a file of the set is missing, which verify tells
        raise


def _file_stats(path: Path) -> Stats:
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
        layout=f"pages of {beton.page_bytes / 2**20:g} MiB",
        per_class=per_class(beton.labels, manifest.classes if manifest else ()),
        width_px=spread(image["width"]),
        height_px=spread(image["height"]),
        payload_bytes_mean=float(beton.sizes.mean()),
        payload_bytes_median=float(np.median(beton.sizes)),
    )


def _tier(beton: BetonFile) -> str:
    """Name the tiers of the modes that occur."""
    modes = np.unique(beton.metadata["f0"]["mode"])
    return " and ".join(tier for tier, mode in TIER_MODES.items() if mode in modes)
