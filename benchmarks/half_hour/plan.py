"""What the rows of the half hour depend on: sizes, the device, and images, which are found or made."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from PIL import Image

from benchmarks.sample_sets import PHOTOGRAPHS, QUALITY, SampleSet, SampleSets, colourful, dataset_tools
from benchmarks.synthetic import write_synthetic
from pipelines.kernels import turbojpeg
from pipelines.sets.beton import open_beton
from pipelines.sets.manifest import Manifest
from training.cli import console

PartName = Literal["check", "ceilings", "loader", "nvjpeg", "step", "train", "dali"]
PARTS: tuple[PartName, ...] = get_args(PartName)
_SIZES_PX = ((375, 500), (500, 375), (333, 500), (500, 500))
"""Height, width of drawn images."""


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    arch: str
    crop_px: int
    batch_size: int
    queue_len: int
    num_images: int  # images to draw where there are no photographs
    num_entries: int
    """Entries of the long set, which repeats the images so that an epoch has hundreds of steps."""
    train_steps: int  # steps of a real run, including the stop and the resume
    log_every_s: float
    matrix_side: int
    copy_mib: int
    turns: int
    turn_s: float  # minimum length of a turn


FULL = Size("resnet50", 224, 256, 65536, 1024, 51200, 320, 1.0, 8192, 1024, 5, 1.0)
TINY = Size("resnet10w16", 32, 8, 64, 40, 800, 200, 0.1, 256, 1, 2, 0.05)


@dataclass(frozen=True)
class Setup:
    """What every row depends on."""

    device: str
    tiny: bool
    out: Path  # folder for logs and intermediate files
    images: SampleSet  # what could not be compiled is not there

    @property
    def size(self) -> Size:
        """How large everything is."""
        return TINY if self.tiny else FULL

    @property
    def on(self) -> torch.device:
        """The device to measure."""
        return torch.device("cuda", 0) if self.device == "cuda" else torch.device(self.device)

    @property
    def long_set(self) -> Path:
        """The compiled images, each repeated; not there without libturbojpeg."""
        return self.out / f"{self.images.beton.stem}-{self.size.num_entries}.beton"

    @property
    def reads(self) -> Path:
        """The set that our loader and real runs read."""
        return self.long_set if self.long_set.exists() else self.images.folder

    def settle(self) -> None:
        """Wait until the device has done everything that was queued."""
        if self.device == "cuda":
            torch.cuda.synchronize(self.on)


def published_name(method: str, precision: str = "bf16") -> str:
    """Return the row of the published formulation, which the method's other steps are compared with."""
    return f"{method}, published, {precision}"


def prepare_images(device: str, *, tiny: bool, data: Path, out: Path) -> Setup:
    """Find or make the images in ``data``, and compile them where libturbojpeg is found.

    Photographs are made where scikit-image and scikit-learn are installed, else images are drawn. A tiny run
    always draws its own. The set that repeats images goes to ``out``.

    Raises:
        ValueError: where the images cannot be compiled, or the only set that is there cannot be read.
    """
    num = (TINY if tiny else FULL).num_images
    base, how = data / f"photographs-q{QUALITY}", f"photographs encoded anew at quality {QUALITY}"
    there = base.is_dir() or base.with_name(f"{base.name}.beton").is_file()
    if not (tiny or there) and all(map(importlib.util.find_spec, ("skimage", "sklearn"))):
        try:
            there = SampleSets(data, PHOTOGRAPHS, console.print).reencoded_folder.is_dir()
        except ValueError as error:
            console.print(f"continuing without photographs: {error}")
    if tiny or not there:
        base = data / f"drawn-{num}{'-tiny' if tiny else ''}"
        how = f"drawn, smooth colours with noise, quality {QUALITY}: no photographs were at hand"
        _draw(base / "train", num, shrink=6 if tiny else 1)
    beton, shards = (base.with_name(f"{base.name}.{kind}") for kind in ("beton", "shards"))
    setup = Setup(device, tiny, out, SampleSet(base / "train", beton, shards, how))
    if turbojpeg.is_found():
        _compile(setup)
    if not setup.reads.exists():
        raise ValueError(f"{beton} cannot be read here: {turbojpeg.INSTALL}; or copy {base}/train here too")
    return setup


def _compile(setup: Setup) -> None:
    """Compile the images, and the set that repeats them."""
    images = setup.images
    for path in (images.beton, images.shards):
        if images.folder.is_dir() and not (path.exists() and Manifest.read(path)):
            console.print(f"compiling {path}")
            dataset_tools("convert", images.folder, path)
    if images.beton.exists() and not setup.long_set.exists():
        setup.out.mkdir(parents=True, exist_ok=True)
        source = open_beton(images.beton)
        write_synthetic(source, setup.long_set, count=setup.size.num_entries, payloads=len(source))


def _draw(folder: Path, num: int, shrink: int) -> None:
    """Draw those JPEG files that are missing, in two class folders."""
    console.print(f"drawing up to {num} images in {folder}")

    def draw(i: int) -> None:
        file = folder / f"class-{i % 2}" / f"{i:05}.jpg"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            height, width = _SIZES_PX[i % len(_SIZES_PX)]
            image = Image.fromarray(colourful(i, height // shrink, width // shrink))
            image.save(file, quality=QUALITY, subsampling="4:2:0")

    with ThreadPoolExecutor() as pool:
        list(pool.map(draw, range(num)))
