"""The pictures that loaders are measured on, made once under data/ and used again.

The photographs of `python -m dataset_tools photographs` as they are, and the same encoded anew the way a
converter that reduces stores them; both as files in class folders and compiled, into one file and into
shards. Whatever is half made has another name or no manifest.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.decode.pillow import FORMATS
from pipelines.sets.folder import FolderListing
from pipelines.sets.manifest import Manifest, manifest_path

QUALITY = 86
"""Gives these photographs about 55 KB at 500 px, what ImageNet's own have at quality 90: they are sharper."""
MAX_SIDE_PX = 500
SHORT_SIDE_PX = 256
"""Of the two sets that hold no JPEG: ours of planes, stock FFCV's of RGB pixels."""
PHOTOGRAPHS = 2000
"""Pictures of the sample set that `make samples` leaves in data/photographs."""
_SPLIT = "train"
_PHOTOGRAPHS_MARKER = "photographs.json"


@dataclass(frozen=True)
class SampleSet:
    """Pictures as files and compiled as they are."""

    folder: Path
    """Class folders of JPEG files."""
    beton: Path
    """The same bytes compiled; stock FFCV reads it too."""
    shards: Path
    """The same bytes compiled into a folder of shards."""
    how: str
    """What they are, in a sentence."""

    def facts(self) -> dict[str, Any]:
        """Number and mean size of the pictures, for the JSON."""
        listing = FolderListing(self.folder)
        num_bytes = sum((self.folder / listing.path(i)).stat().st_size for i in range(len(listing)))
        return {
            "pictures": len(listing),
            "mean_kb": round(num_bytes / len(listing) / 1e3, 1),
            "bytes": self.beton.stat().st_size,
            "how": self.how,
        }


class SampleSets:
    """Everything the loader benchmark reads; each set is made when it is first asked for and not there yet.

    Making fails with a ValueError that holds the words of the program that makes sets.
    """

    def __init__(self, data: Path, num: int, progress: Callable[[str], None]) -> None:
        """Make nothing yet.

        Args:
            data: folder of the sets; ``data/photographs`` is used where it holds ``num`` pictures.
            num: pictures in each set.
            progress: is told what is being made.
        """
        self._data, self._num, self._progress = data, num, progress

    @cached_property
    def pass_through(self) -> SampleSet:
        """The photographs as they are."""
        return self._sample_set(self._photographs, "made photographs, 4:2:0, bytes passed through")

    @cached_property
    def reencoded(self) -> SampleSet:
        """The photographs encoded anew; the main set."""
        how = (
            f"the photographs, longer side at most {MAX_SIDE_PX} px, encoded anew by PIL at quality "
            f"{QUALITY}, 4:2:0"
        )
        return self._sample_set(self.reencoded_folder, how)

    @cached_property
    def yuv420(self) -> Path:
        """Our raw tier of the re-encoded pictures: planes at 4:2:0."""
        return self._without_jpeg("yuv420")

    @cached_property
    def ffcv_raw(self) -> Path:
        """RGB pixels of the re-encoded pictures at the same side, for stock FFCV."""
        return self._without_jpeg("raw")

    def facts(self) -> dict[str, dict[str, Any]]:
        """What each set that was asked for is, for the JSON."""
        asked = vars(self)
        jpeg = {name: asked[name].facts() for name in ("reencoded", "pass_through") if name in asked}
        others = {"yuv420": "planes at 4:2:0", "ffcv_raw": "RGB pixels"}
        return jpeg | {
            name: _compiled_facts(asked[name], pixels) for name, pixels in others.items() if name in asked
        }

    @cached_property
    def _photographs(self) -> Path:
        """The sample set's folder where it has as many pictures, else one of their own."""
        folder = self._data / "photographs"
        options: tuple[object, ...] = ("--count", self._num)
        known = _read_json(folder / _PHOTOGRAPHS_MARKER)
        if self._num != (PHOTOGRAPHS if known is None else known.get("count")):
            folder, options = self._data / f"photographs-{self._num}", (*options, "--val", 0)
        if not (folder / _PHOTOGRAPHS_MARKER).is_file():
            self._progress(f"making {folder.name}")
            dataset_tools("photographs", folder, *options)
        return folder

    @cached_property
    def reencoded_folder(self) -> Path:
        """The photographs encoded anew, not compiled."""
        folder = self._photographs.with_name(f"{self._photographs.name}-q{QUALITY}")
        self._progress(f"encoding {folder.name}")
        return reencode(self._photographs, folder)

    def _sample_set(self, folder: Path, how: str) -> SampleSet:
        """A folder of pictures with its two compiled sets beside it."""
        beton, shards = (folder.with_name(folder.name + suffix) for suffix in (".beton", ".shards"))
        for path in (beton, shards):
            self._compile(path, folder, "jpeg")
        return SampleSet(folder / _SPLIT, beton, shards, how)

    def _without_jpeg(self, tier: str) -> Path:
        folder = self.reencoded_folder
        path = folder.with_name(f"{folder.name}-{tier}-{SHORT_SIDE_PX}.beton")
        self._compile(path, folder, tier, "--short-side", SHORT_SIDE_PX)
        return path

    def _compile(self, path: Path, pictures: Path, tier: str, *options: object) -> None:
        """Compile a folder unless a set of its size and this tier, newer than the folder, is there."""
        # Asked of a set that is not there, the manifest would be that of another one of the same stem.
        manifest = Manifest.read(path) if path.exists() else None
        fits = manifest is not None and (manifest.count, manifest.tier) == (self._num, tier)
        if fits and manifest_path(path).stat().st_mtime >= pictures.stat().st_mtime:
            return
        self._progress(f"compiling {path.name}")
        dataset_tools("convert", pictures / _SPLIT, path, "--tier", tier, *options, "--overwrite")


def reencode(source: Path, target: Path, *, workers: int | None = None) -> Path:
    """Encode the pictures of ``source/train`` anew into ``target/train``, unless they are there already.

    The folder appears under its name when it is complete; one made of other pictures or by other options is
    replaced. Returns ``target``.
    """
    made_of = _read_json(source / _PHOTOGRAPHS_MARKER)
    options = {"quality": QUALITY, "max_side_px": MAX_SIDE_PX, "source": made_of}
    marker = target / "reencoded.json"
    if _read_json(marker) == options:
        return target
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        listing = FolderListing(source / _SPLIT)
        names = [listing.path(i) for i in range(len(listing))]
        for folder in {Path(name).parent for name in names}:
            (partial / _SPLIT / folder).mkdir(parents=True)
        with ThreadPoolExecutor(workers) as pool:
            list(
                pool.map(lambda name: _reencode_file(source / _SPLIT / name, partial / _SPLIT / name), names)
            )
        (partial / marker.name).write_text(json.dumps(options) + "\n")
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def read_with_pil(file: str | Path) -> Image.Image:
    """The picture in RGB as torchvision's ImageFolder reads it, of the formats that pictures may have."""
    with Image.open(file, formats=FORMATS) as image:
        return image.convert("RGB")


def colourful(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """Draw (height, width, 3) smooth, saturated colours with some noise, hard for chroma subsampling."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)


def _reencode_file(source: Path, target: Path) -> None:
    picture = read_with_pil(source)
    picture.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    picture.save(target, "JPEG", quality=QUALITY, subsampling="4:2:0")


def dataset_tools(*words: object) -> None:
    """Run one of the programs of dataset_tools as a user would."""
    command = [sys.executable, "-m", "dataset_tools", *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"`python {' '.join(command[1:])}` ended with code {done.returncode}: {done.stderr.strip()}"
        )


def _compiled_facts(path: Path, pixels: str) -> dict[str, Any]:
    manifest = Manifest.read(path)
    assert manifest is not None
    size = path.stat().st_size
    return {
        "pictures": manifest.count,
        "mean_kb": round(size / manifest.count / 1e3, 1),
        "bytes": size,
        "how": f"{pixels}, shorter side {SHORT_SIDE_PX} px, of the re-encoded pictures",
    }


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return content if isinstance(content, dict) else None
