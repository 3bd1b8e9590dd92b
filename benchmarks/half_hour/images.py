"""The images of the half hour: those that are in ``--data`` already, else photographs, else drawn ones."""

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.half_hour.plan import Images, Size
from benchmarks.sample_sets import PHOTOGRAPHS, QUALITY, SampleSets, colourful, dataset_tools
from benchmarks.synthetic import write_synthetic
from pipelines.kernels import turbojpeg
from pipelines.sets.beton import open_beton
from pipelines.sets.manifest import Manifest

_SIZES_PX = ((375, 500), (500, 375), (333, 500), (500, 500))
"""Height, width of drawn images."""
_Note = Callable[[str], None]


def find_images(data: Path, out: Path, size: Size, *, tiny: bool, note: _Note) -> Images:
    """Find or make the images, and compile them where libturbojpeg is found.

    Photographs are made where scikit-image and scikit-learn are installed. A tiny run always draws its own.

    Args:
        data: folder of the sample sets.
        out: folder for the set that repeats images.
        size: how many images to draw, and how many entries the repeating set has.
        tiny: draw small images.
        note: called with what is being done, and with what could not be done.

    Raises:
        ValueError: where the only set that is there cannot be read.
    """
    base, how = data / f"photographs-q{QUALITY}", f"photographs encoded anew at quality {QUALITY}"
    there = base.is_dir() or base.with_name(f"{base.name}.beton").is_file()
    if not (tiny or there) and all(importlib.util.find_spec(name) for name in ("skimage", "sklearn")):
        with _optional(f"making {base}", note):
            there = SampleSets(data, PHOTOGRAPHS, note).reencoded_folder.is_dir()
    if tiny or not there:
        base = data / f"drawn-{size.num_images}{'-tiny' if tiny else ''}"
        how = f"drawn, smooth colours with noise, quality {QUALITY}: no photographs were at hand"
        _draw(base / "train", size.num_images, tiny=tiny, note=note)
    paths, can_decode = {"folder": base / "train"}, turbojpeg.is_found()
    for kind in ("beton", "shards"):
        paths[kind] = base.with_name(f"{base.name}.{kind}")
        if can_decode and base.is_dir() and not (paths[kind].exists() and Manifest.read(paths[kind])):
            with _optional(f"compiling {paths[kind]}", note):
                dataset_tools("convert", base / "train", paths[kind])
    if can_decode and paths["beton"].exists():
        paths["long"] = out / f"{base.name}-{size.num_entries}.beton"
        if not paths["long"].exists():
            note(f"writing {paths['long']}")
            out.mkdir(parents=True, exist_ok=True)
            source = open_beton(paths["beton"])
            write_synthetic(source, paths["long"], count=size.num_entries, payloads=len(source))
    found = {kind: str(path) for kind, path in paths.items() if path.exists()}
    if not found.keys() & {"folder", "long"}:
        raise ValueError(
            f"{base}.beton cannot be read here: {turbojpeg.INSTALL}; or copy {base}/train here too"
        )
    return Images(how, **found)


def facts(images: Images) -> dict[str, Any]:
    """Describe the images for the JSON."""
    paths = {kind: Path(path).name for kind, path in asdict(images).items() if kind != "how" and path}
    reads = "a compiled file that repeats them" if images.long else "a folder of JPEG files, by Pillow"
    return {"how": images.how, "read_from": reads, "sets": paths}


@contextmanager
def _optional(what: str, note: _Note) -> Iterator[None]:
    """Note what is being done; if it fails, note that too, and continue without it."""
    note(what)
    try:
        yield
    except ValueError as error:
        note(f"continuing without it: {error}")


def _draw(folder: Path, num: int, *, tiny: bool, note: _Note) -> None:
    """Draw JPEG files in two class folders, unless all are there."""
    files = [folder / f"class-{i % 2}" / f"{i:05}.jpg" for i in range(num)]
    if all(file.is_file() for file in files):
        return
    note(f"drawing {num} images in {folder}")
    for parent in {file.parent for file in files}:
        parent.mkdir(parents=True, exist_ok=True)

    def save(i: int) -> None:
        height, width = (side // 6 if tiny else side for side in _SIZES_PX[i % len(_SIZES_PX)])
        Image.fromarray(colourful(i, height, width)).save(
            files[i], "JPEG", quality=QUALITY, subsampling="4:2:0"
        )

    with ThreadPoolExecutor() as pool:
        list(pool.map(save, range(num)))
