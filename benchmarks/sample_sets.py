"""The images that loaders are measured on, made once under data/ and used again.

The photographs of `python -m dataset_tools photographs` as they are, and the same encoded anew the way a
converter that reduces stores them; both as files in class folders and compiled, into one file and into
shards. A set appears under its name only when it is complete.
"""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.peers.contract import image_files
from benchmarks.programs import output_of
from pipelines.decode.pillow import FORMATS
from pipelines.sets.manifest import Manifest, manifest_path

QUALITY = 86
"""Gives these photographs about 55 KB at 500 px, as ImageNet's own have at quality 90: these are sharper."""
REENCODED_SIDE_PX = 500
SHORT_SIDE_PX = 256
"""Of the two sets that hold no JPEG: ours of planes, stock FFCV's of RGB pixels."""
PHOTOGRAPHS = 2000
"""Images of the sample set that `make samples` leaves in data/photographs."""
_SPLIT = "train"
_PHOTOGRAPHS_MARKER = "photographs.json"


@dataclass(frozen=True)
class SampleSet:
    """Images as files, and the same bytes compiled."""

    folder: Path  # class folders of JPEG files
    beton: Path  # one file, which stock FFCV reads too
    shards: Path  # a folder of shards
    how: str  # what they are, in a sentence

    def facts(self) -> dict[str, Any]:
        """Return number and mean size of the images, for the JSON."""
        sizes = [file.stat().st_size for file in image_files(self.folder)]
        return _facts(len(sizes), sum(sizes), self.beton, self.how)


class SampleSets:
    """Sets of ``num`` images in the folder ``data``; each is made at its first use, unless it is there.

    Making one calls ``progress`` with its name, and raises ValueError where a program fails.
    """

    def __init__(self, data: Path, num: int, progress: Callable[[str], None]) -> None:
        self._data, self._num, self._progress = data, num, progress

    @cached_property
    def pass_through(self) -> SampleSet:
        """The photographs as they are."""
        return self._sample_set(self._photographs, "made photographs, 4:2:0, bytes passed through")

    @cached_property
    def reencoded(self) -> SampleSet:
        """The photographs encoded anew; the main set."""
        how = f"longer side at most {REENCODED_SIDE_PX} px, encoded anew by PIL at quality {QUALITY}, 4:2:0"
        return self._sample_set(self.reencoded_folder, f"the photographs, {how}")

    @cached_property
    def yuv420(self) -> Path:
        """Our raw tier of the re-encoded images: planes at 4:2:0."""
        return self._compile(self.reencoded_folder, f"-yuv420-{SHORT_SIDE_PX}.beton", "yuv420")

    @cached_property
    def ffcv_raw(self) -> Path:
        """RGB pixels of the re-encoded images at the same side, for stock FFCV."""
        return self._compile(self.reencoded_folder, f"-raw-{SHORT_SIDE_PX}.beton", "raw")

    def facts(self) -> dict[str, dict[str, Any]]:
        """Return for the JSON what each set is that has been used."""
        found = {name: each.facts() for name, each in vars(self).items() if isinstance(each, SampleSet)}
        for name, pixels in {"yuv420": "planes at 4:2:0", "ffcv_raw": "RGB pixels"}.items():
            if path := vars(self).get(name):
                how = f"{pixels}, shorter side {SHORT_SIDE_PX} px, of the re-encoded pictures"
                found[name] = _facts(self._num, path.stat().st_size, path, how)
        return found

    @cached_property
    def reencoded_folder(self) -> Path:
        """The photographs encoded anew, not compiled."""
        folder = self._photographs.with_name(f"{self._photographs.name}-q{QUALITY}")
        self._progress(f"encoding {folder.name}")
        return reencode(self._photographs, folder)

    @cached_property
    def _photographs(self) -> Path:
        """The sample set's folder where it has as many images, else one of their own."""
        folder, val = self._data / "photographs", 200
        if _read_json(folder / _PHOTOGRAPHS_MARKER).get("count", PHOTOGRAPHS) != self._num:
            folder, val = self._data / f"photographs-{self._num}", 0
        if not (folder / _PHOTOGRAPHS_MARKER).is_file():
            self._progress(f"making {folder.name}")
            dataset_tools("photographs", folder, "--count", self._num, "--val", val)
        return folder

    def _sample_set(self, folder: Path, how: str) -> SampleSet:
        beton, shards = (self._compile(folder, suffix, "jpeg") for suffix in (".beton", ".shards"))
        return SampleSet(folder / _SPLIT, beton, shards, how)

    def _compile(self, images: Path, suffix: str, tier: str) -> Path:
        """Compile a folder unless a set of its size and this tier, newer than the folder, is there."""
        path = images.with_name(images.name + suffix)
        # A missing set's manifest could be that of another set with the same stem.
        manifest = Manifest.read(path) if path.exists() else None
        fits = manifest is not None and (manifest.count, manifest.tier) == (self._num, tier)
        if not (fits and manifest_path(path).stat().st_mtime >= images.stat().st_mtime):
            self._progress(f"compiling {path.name}")
            side = () if tier == "jpeg" else ("--short-side", SHORT_SIDE_PX)
            dataset_tools("convert", images / _SPLIT, path, "--tier", tier, *side, "--overwrite")
        return path


def _facts(count: int, num_bytes: int, compiled: Path, how: str) -> dict[str, Any]:
    mean_kb = round(num_bytes / count / 1e3, 1)
    return {"pictures": count, "mean_kb": mean_kb, "bytes": compiled.stat().st_size, "how": how}


def reencode(source: Path, target: Path) -> Path:
    """Encode the images of ``source/train`` anew into ``target/train``, unless they are there already.

    One made of other images or by other options is replaced. Returns ``target``.
    """
    photographs = _read_json(source / _PHOTOGRAPHS_MARKER)
    options = {"quality": QUALITY, "max_side_px": REENCODED_SIDE_PX, "source": photographs}
    marker = "reencoded.json"
    if _read_json(target / marker) == options:
        return target
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)

    def encode(original: Path) -> None:
        image = read_with_pil(original)
        image.thumbnail((REENCODED_SIDE_PX, REENCODED_SIDE_PX), Image.Resampling.LANCZOS)
        file = partial / original.relative_to(source)
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")

    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(encode, image_files(source / _SPLIT)))
        (partial / marker).write_text(json.dumps(options) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def read_with_pil(file: str | Path) -> Image.Image:
    """Return the image in RGB, as torchvision's ImageFolder reads it, if it has one of our formats."""
    with Image.open(file, formats=FORMATS) as image:
        return image.convert("RGB")


def colourful(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """Draw (height, width, 3) smooth, saturated colours with some noise, hard for chroma subsampling."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)


def dataset_tools(*words: object) -> None:
    """Run one of the programs of dataset_tools as a user does; raises ValueError if it fails."""
    output_of("-m", "dataset_tools", *words)


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content
