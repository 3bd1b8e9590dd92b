"""What operations are compared on: photographs and corner cases of JPEG, as files and compiled.

Shape letters: N views, S side in pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks import sample_sets
from pipelines.decode.pillow import FORMATS
from pipelines.sets.folder import FolderListing

PHOTOGRAPHS = 19
"""One from each photograph of the sample set."""
_CORNER_CASES: Mapping[str, Mapping[str, Any]] = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "grey": {},
    "progressive": {"subsampling": "4:2:0", "progressive": True},
}
"""What a JPEG of its own is made for, and Pillow's options for it."""
_CORNER_SIZES_PX = ((97, 131), (128, 96), (255, 161))
"""Height, width; odd ones too, where the chroma's last row or column stands for one pixel only."""
_CORNER_QUALITY = 90


@dataclass(frozen=True)
class Samples:
    """The pictures of a comparison."""

    folder: Path
    """Class folders: those of the photographs, and one for each kind of corner case."""
    beton: Path
    """The same bytes compiled."""
    names: tuple[str, ...]
    """Their paths in the folder, in the order of the set."""

    def kinds(self) -> dict[str, list[int]]:
        """Kind of JPEG → positions of its pictures. Photographs are stored at 4:2:0."""
        found: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            folder = Path(name).parent.name.removeprefix("corner-").replace("-", ":")
            found.setdefault(folder if folder in _CORNER_CASES else "4:2:0", []).append(index)
        return found

    def picture(self, index: int) -> Image.Image:
        """The picture as Pillow decodes it."""
        return _decoded(self.folder / self.names[index])

    def planes(self, index: int) -> Image.Image:
        """The same with its colours not yet converted: Y, U and V in full size."""
        with Image.open(self.folder / self.names[index], formats=FORMATS) as image:
            image.draft("YCbCr", image.size)
            return image.convert("YCbCr")


@cache
def _decoded(file: Path) -> Image.Image:
    """Kept, because each picture is asked for many times and there are few."""
    return sample_sets.read_with_pil(file)


def make_samples(folder: Path) -> Samples:
    """Write the pictures below ``folder`` and compile them.

    Raises:
        ValueError: with the words of the program that makes sets, where that fails.
    """
    sample_sets.dataset_tools("photographs", folder, "--count", PHOTOGRAPHS, "--val", 0)
    train, beton = folder / "train", folder / "samples.beton"
    for case, options in _CORNER_CASES.items():
        target = train / f"corner-{case.replace(':', '-')}"
        target.mkdir()
        for number, (height, width) in enumerate(_CORNER_SIZES_PX):
            picture = Image.fromarray(colourful(number, height, width))
            picture = picture.convert("L") if case == "grey" else picture
            picture.save(target / f"{number}.jpg", quality=_CORNER_QUALITY, **options)
    sample_sets.dataset_tools("convert", train, beton)
    listing = FolderListing(train)
    return Samples(train, beton, tuple(listing.path(i) for i in range(len(listing))))


def colourful(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3) smooth and strongly coloured, with some noise: hard for chroma, fair to JPEG."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)


def views_of(samples: Samples, side: int) -> Tensor:
    """(N, S, S, 3) uint8: the photographs' middles, colours in even steps, a ramp of grey."""
    box = (side, side)
    views = [
        np.asarray(picture.crop((x, y, x + side, y + side)))
        for picture in map(samples.picture, samples.kinds()["4:2:0"])
        for x, y in [((picture.width - side) // 2, (picture.height - side) // 2)]
    ]
    steps = np.linspace(0, 255, 16).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(64, 64, 3)
    ramp = np.linspace(0, 255, side * side).round().astype(np.uint8).reshape(side, side, 1)
    views += [np.resize(cube, (*box, 3)), np.repeat(ramp, 3, axis=2)]
    return torch.from_numpy(np.stack(views))
