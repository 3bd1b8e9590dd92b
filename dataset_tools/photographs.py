"""The sample set: ImageNet-like JPEGs made of the photographs inside scikit-image and scikit-learn.

Nothing is downloaded. Image i of a split is a function of (seed, split, i): a crop of one source, resized
to one of ImageNet's common sizes, recoloured, with sensor noise, stored as a 4:2:0 JPEG.
"""

import contextlib
import importlib.util
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dataset_tools.work import Progress, ordered_map
from pipelines.decode.pillow import FORMATS

RECIPE_VERSION = 1
"""Increased when the same seed would give other images."""
SPLITS = ("train", "val")
# Drawings, texts, logos, masks and images under 300 px are left out.
_SKIMAGE_FILES = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
_SKLEARN_FILES = ("china.jpg", "flower.jpg")
_SIZES_PX = ((500, 375), (375, 500), (500, 333), (333, 500), (500, 500), (500, 400), (640, 480), (400, 300))
_SIZE_SHARES = (0.46, 0.14, 0.16, 0.06, 0.06, 0.04, 0.05, 0.03)
_QUALITIES = (93, 98)
"""Range of the JPEG quality, both ends included; chosen for a mean of about 110 KB per image."""
_MARKER = "photographs.json"


@dataclass(frozen=True)
class Made:
    """A sample set on the disk."""

    root: Path
    counts: tuple[int, int]
    """Numbers of images in train and val."""
    num_bytes: int
    """Total size of the JPEG files."""
    already_there: bool
    """True if a complete set with the same options existed and nothing was written."""


def source_files() -> dict[str, Path]:
    """Return name → file of the source photographs.

    Raises:
        ImportError: if one of the two packages is missing.
    """
    found = {}
    for package, folder, files in (
        ("skimage", "data", _SKIMAGE_FILES),
        ("sklearn", "datasets/images", _SKLEARN_FILES),
    ):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(
                "the sample photographs are part of scikit-image and scikit-learn; run `make setup` or "
                "`pip install scikit-image scikit-learn`"
            )
        root = Path(spec.submodule_search_locations[0]) / folder
        found.update({file.split(".")[0]: root / file for file in files if (root / file).is_file()})
    if len(found) < 10:
        raise ImportError(
            f"only {len(found)} of {len(_SKIMAGE_FILES) + len(_SKLEARN_FILES)} photographs are in the "
            "installed packages; run `pip install --force-reinstall scikit-image scikit-learn`"
        )
    return found


def make_photographs(
    out: str | Path,
    *,
    count: int = 2000,
    val: int = 200,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Made:
    """Make the tree ``out/{train,val}/<source>/<nnnn>.JPEG``; the source is the class.

    The tree has a temporary name until it is complete. A complete tree with the same options is kept.

    Args:
        out: root of the tree.
        count: number of images in train.
        val: number of images in val.
        seed: determines the images.
        workers: number of threads; None takes all cores.
        overwrite: replace a tree made with other options.
        progress: called once per image.

    Raises:
        ValueError: if ``count`` or ``val`` is too small.
        FileExistsError: if ``out`` holds anything else, or a tree with other options and ``overwrite`` is
            off.
        ImportError: if the source packages are missing.
    """
    if count < 1 or val < 0:
        raise ValueError(f"count is {count} and val is {val}; at least 1 and at least 0 are needed")
    out = Path(out)
    options = {"version": RECIPE_VERSION, "seed": seed, "count": count, "val": val}
    existing = _read_marker(out)
    if existing is not None and {key: existing.get(key) for key in options} == options:
        return Made(out, (count, val), int(existing["num_bytes"]), already_there=True)
    if existing is not None and not overwrite:
        raise FileExistsError(
            f"{out} holds a sample set with other options, {existing}; choose another folder "
            "or add --overwrite"
        )
    if existing is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not a sample set; choose another folder")

    sources = {name: _open_source(file) for name, file in sorted(source_files().items())}
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        num_bytes = _write_tree(partial, sources, (count, val), seed, workers, progress)
        (partial / _MARKER).write_text(json.dumps({**options, "num_bytes": num_bytes}) + "\n")
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Made(out, (count, val), num_bytes, already_there=False)


def _read_marker(root: Path) -> dict[str, Any] | None:
    """Return the options of the sample set at ``root``, or None."""
    try:
        content = json.loads((root / _MARKER).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) and "num_bytes" in content else None


def _write_tree(
    root: Path,
    sources: dict[str, Image.Image],
    counts: tuple[int, int],
    seed: int,
    workers: int | None,
    progress: Progress | None,
) -> int:
    """Write all images of both splits; return their total size."""
    names = list(sources)
    for split, count in zip(SPLITS, counts, strict=True):
        for name in names[:count]:
            (root / split / name).mkdir(parents=True)

    def make(position: int) -> int:
        split = 0 if position < counts[0] else 1
        index = position - split * counts[0]
        name = names[index % len(names)]
        image = draw_photograph(sources[name], np.random.default_rng((seed, split, index)))
        return (root / SPLITS[split] / name / f"{index:04d}.JPEG").write_bytes(image)

    sizes = ordered_map(make, sum(counts), workers=workers, progress=progress, chunk=4)
    with contextlib.closing(sizes):
        return sum(sizes)


def _open_source(file: Path) -> Image.Image:
    """Read a source photograph, "RGB" or "L"."""
    with Image.open(file, formats=FORMATS) as image:
        return image.convert("L" if image.mode == "L" else "RGB")


# -----------------------------------------------------------------------------------------------------------
# One image


def draw_photograph(source: Image.Image, rng: np.random.Generator) -> bytes:
    """Return one JPEG made from ``source`` ("RGB" or "L"): crop, flip, recolour, noise, 4:2:0 encoding."""
    size = _SIZES_PX[rng.choice(len(_SIZES_PX), p=_SIZE_SHARES)]
    image = source.resize(size, Image.Resampling.BICUBIC, box=_crop_box(source.size, size, rng))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = _recolour(image, rng)
    buffer = io.BytesIO()
    pixels = _add_noise(np.asarray(image), rng)
    quality = int(rng.integers(*_QUALITIES, endpoint=True))
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _crop_box(
    source: tuple[int, int], target: tuple[int, int], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of a random crop with the target's aspect ratio.

    Its sides are at least a third as long as in the largest such crop.
    """
    largest = min(source[0] / target[0], source[1] / target[1])
    scale = largest * rng.uniform(0.33, 1.0)
    width, height = target[0] * scale, target[1] * scale
    left, top = rng.uniform(0, source[0] - width), rng.uniform(0, source[1] - height)
    return left, top, min(left + width, source[0]), min(top + height, source[1])


def _recolour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change gains, gamma and hue slightly; a grey image is first coloured with a ramp of three colours."""
    if image.mode == "L":
        dark, light = rng.integers(0, 60, 3), rng.integers(170, 256, 3)
        middle = (dark + light) / 2 + rng.uniform(-45, 45, 3)
        levels = [
            np.interp(np.arange(256), [0, 127, 255], knots) for knots in zip(dark, middle, light, strict=True)
        ]
        ramp = np.stack(levels)
        image = Image.merge("RGB", [image] * 3).point(ramp.astype(np.uint8).ravel().tolist())
    # A small rotation about the grey axis, so grey stays grey.
    angle = rng.normal(0, 0.18)
    third, cosine, sine = (1 - np.cos(angle)) / 3, np.cos(angle), np.sin(angle) / np.sqrt(3)
    rotation = (
        np.full((3, 3), third) + np.eye(3) * cosine + sine * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    )
    matrix = np.concatenate([rotation, np.zeros((3, 1))], axis=1).ravel()
    image = image.convert("RGB", tuple(float(m) for m in matrix))
    gains, gamma = rng.uniform(0.85, 1.15, 3), np.exp(rng.normal(0, 0.18))
    levels = np.linspace(0, 1, 256) ** gamma
    table = np.clip(255 * gains[:, None] * levels[None, :] + 0.5, 0, 255).astype(np.uint8)
    return image.point(table.ravel().tolist())


def _add_noise(pixels_HWC: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Add sensor noise: constant read noise, and shot noise that grows with the light.

    As after demosaicing, the noise of neighbouring pixels is slightly correlated, and the three channels have
    the same noise.
    """
    read, shot = rng.uniform(3.0, 6.5), rng.uniform(0.0, 0.5)
    white_HW = rng.standard_normal(pixels_HWC.shape[:2], dtype=np.float32)
    white_HW[:, 1:] += 0.35 * white_HW[:, :-1].copy()
    white_HW[1:] += 0.35 * white_HW[:-1].copy()
    deviation = np.sqrt(read**2 + shot * np.arange(256)).astype(np.float32)
    noise_HWC = np.take(deviation, pixels_HWC)
    noise_HWC *= white_HW[:, :, None]
    noise_HWC += pixels_HWC
    np.clip(noise_HWC + 0.5, 0, 255, out=noise_HWC)
    return noise_HWC.astype(np.uint8)
