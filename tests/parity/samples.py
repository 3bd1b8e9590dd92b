"""The images that operations are compared on: photographs and special kinds of JPEG, as files and compiled.

Shape letters: N views, S side in pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import sample_sets
from pipelines.decode.pillow import FORMATS
from pipelines.sets.folder import FolderListing

_PHOTOGRAPHS = 19
"""One crop of each photograph of the sample set."""
_KINDS: Mapping[str, Mapping[str, Any]] = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "grey": {},
    "progressive": {"subsampling": "4:2:0", "progressive": True},
}
"""Kinds of JPEG, and Pillow's options for them."""
_SIZES_PX = ((97, 131), (128, 96), (255, 161))
"""Height, width; odd sizes included, where the last row or column of chroma covers one pixel only."""
_QUALITY = 90


@dataclass(frozen=True)
class Samples:
    """The images of a comparison."""

    folder: Path
    """Class folders: those of the photographs, and one for each special kind of JPEG."""
    beton: Path
    """The same bytes compiled."""
    names: tuple[str, ...]
    """Their paths in the folder, in the order of the set."""

    def kinds(self) -> dict[str, list[int]]:
        """Return the positions of the images of each kind. Photographs are stored at 4:2:0."""
        found: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            folder = Path(name).parent.name.removeprefix("corner-").replace("-", ":")
            found.setdefault(folder if folder in _KINDS else "4:2:0", []).append(index)
        return found

    def image(self, index: int) -> Image.Image:
        """Return the image as Pillow decodes it."""
        return _decoded(self.folder / self.names[index])

    def planes(self, index: int) -> Image.Image:
        """Return the image before colour conversion: Y, U and V in full size."""
        with Image.open(self.folder / self.names[index], formats=FORMATS) as image:
            image.draft("YCbCr", image.size)
            return image.convert("YCbCr")


_decoded = cache(sample_sets.read_with_pil)


def make_samples(folder: Path) -> Samples:
    """Write the images below ``folder`` and compile them.

    Raises:
        ValueError: with the message of the failed program, if the images cannot be made.
    """
    sample_sets.dataset_tools("photographs", folder, "--count", _PHOTOGRAPHS, "--val", 0)
    train, beton = folder / "train", folder / "samples.beton"
    for kind, options in _KINDS.items():
        target = train / f"corner-{kind.replace(':', '-')}"
        target.mkdir()
        for number, (height, width) in enumerate(_SIZES_PX):
            image = Image.fromarray(sample_sets.colourful(number, height, width))
            image = image.convert("L") if kind == "grey" else image
            image.save(target / f"{number}.jpg", quality=_QUALITY, **options)
    sample_sets.dataset_tools("convert", train, beton)
    listing = FolderListing(train)
    return Samples(train, beton, tuple(listing.path(i) for i in range(len(listing))))


def views_of(samples: Samples, side: int) -> Tensor:
    """Return (N, S, S, 3) uint8 views: the photographs' centres, an even grid of colours, a ramp of grey."""
    views = [
        np.asarray(image.crop((x, y, x + side, y + side)))
        for image in map(samples.image, samples.kinds()["4:2:0"])
        for x, y in [((image.width - side) // 2, (image.height - side) // 2)]
    ]
    steps = np.linspace(0, 255, 16).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(64, 64, 3)
    ramp = np.linspace(0, 255, side * side).round().astype(np.uint8).reshape(side, side, 1)
    views += [np.resize(cube, (side, side, 3)), np.repeat(ramp, 3, axis=2)]
    return torch.from_numpy(np.stack(views))
