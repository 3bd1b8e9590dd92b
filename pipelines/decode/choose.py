"""Which backend reads a set best here: by what the set offers, what is installed and what the machine has."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from pipelines.decode.dali_operators import INSTALL_DALI
from pipelines.decode.nvjpeg import JpegUnit, find_jpeg_unit
from pipelines.kernels import turbojpeg
from pipelines.sets.manifest import Manifest
from pipelines.sets.shards import is_shard_set

Backend = Literal["auto", "ffcv", "dali", "folder"]
PICTURES_PER_CORE_S = 560
"""JPEGs a second that one CPU core decodes and cuts into two views of 224 px; the photometric stage is the
GPU's. For the crops of this loader ``benchmarks/results/loader.json`` has, with two cores at work, 1,021 a
core of JPEGs of 55 KB (500 × 375 px) and 687 of JPEGs of 108 KB. This is the lower figure less a fifth, a
margin for many cores that share their memory and for a training step beside them."""
PICTURES_PER_GPU_S = 3_000
"""Pictures a second that a training step on one GPU can use. Published rates of ResNet-50, forward and
backward, are 3,000 to 4,000 images a second. MoCo adds the key encoder's forward pass, a third of that, which
makes 2,250 to 3,000; MixMask also encodes mixtures, forward and backward, which makes 1,290 to 1,720."""


@dataclass(frozen=True)
class Choice:
    """A backend, and why it was taken."""

    backend: Backend
    why: str

    def __str__(self) -> str:
        return f"backend {self.backend}: {self.why}"


@dataclass(frozen=True)
class Machine:
    """What there is to choose from."""

    turbojpeg: bool
    """Whether libturbojpeg is found, which the ``ffcv`` backend decodes with."""
    dali: bool
    """Whether DALI is installed."""
    cores: int = 1
    """CPU cores that decode for this process, which trains on one device."""
    jpeg_unit: Callable[[], JpegUnit] | None = None
    """Asks whether the GPU decodes JPEGs in hardware; None on a CPU."""


def look_around(device: torch.device, cores: int) -> Machine:
    """What is installed, and what the device has; ``cores`` decode. Imports nothing heavy.

    Raises:
        ValueError: if LIBTURBOJPEG names something else.
    """
    ask = functools.partial(find_jpeg_unit, device) if device.type == "cuda" else None
    return Machine(turbojpeg.is_found(), _installed("nvidia.dali"), cores, ask)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # its parent is missing
        return False


def choose(path: str | Path, backend: Backend, machine: Machine) -> Choice:
    """Choose a backend for a set, or see whether the one asked for can read it.

    ``auto`` decodes on the CPU, unless its cores are too few for the GPU and the GPU has a unit for JPEGs.

    Raises:
        FileNotFoundError: if there is no such set.
        ValueError: if the backend is unknown or reads other sets.
        ImportError: if nothing that is installed reads the set.
    """
    path = Path(path)
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; known are {', '.join(get_args(Backend))}")
    compiled = path.suffix == ".beton" or is_shard_set(path)
    if not compiled:
        _check_folder(path, backend)
        return Choice("folder", "these are pictures that are not compiled")
    if backend == "folder":
        raise ValueError(
            f"backend folder reads folders of pictures, {path} is a compiled set; choose ffcv, dali or auto"
        )
    if backend != "auto":
        return Choice(backend, "asked for")
    manifest = Manifest.read(path)
    jpegs = manifest is None or manifest.tier == "jpeg"
    if machine.turbojpeg:
        if manifest is None:
            return Choice("ffcv", "it reads every tier, and the set has no manifest that names its own")
        return _by_the_cores(machine) if jpegs else Choice("ffcv", f"only it reads the tier {manifest.tier}")
    if machine.dali and jpegs:
        return Choice(
            "dali", f"libturbojpeg, with which CPU cores are faster, was not found; {turbojpeg.INSTALL}"
        )
    or_dali = f" Or DALI: {INSTALL_DALI}" if jpegs else ""
    raise ImportError(
        f"nothing that is installed here reads {path}, for libturbojpeg was not found: {turbojpeg.INSTALL}."
        f"{or_dali}"
    )


def _by_the_cores(machine: Machine) -> Choice:
    """For a set of JPEGs that both backends read."""
    if machine.jpeg_unit is None:
        return Choice("ffcv", "the fastest on CPU cores, and batches stay on the CPU")
    rate = machine.cores * PICTURES_PER_CORE_S
    cores = f"{machine.cores} CPU core{'s' if machine.cores > 1 else ''} decode about {rate:,} pictures/s"
    if rate >= PICTURES_PER_GPU_S:
        return Choice("ffcv", f"{cores}, and one GPU uses at most {PICTURES_PER_GPU_S:,}")
    few = f"{cores}, and one GPU can use up to {PICTURES_PER_GPU_S:,}"
    unit = machine.jpeg_unit()
    if not unit.present:
        return Choice("ffcv", f"{few}, but {unit.why_not}")
    if not machine.dali:
        return Choice("ffcv", f"{few}, but DALI, which uses this GPU's JPEG unit, is missing: {INSTALL_DALI}")
    return Choice("dali", f"{few}; this GPU decodes JPEGs in hardware")


def _check_folder(path: Path, backend: Backend) -> None:
    """Refuse a path that only looks like a folder of pictures, or a backend that wants a compiled set."""
    if backend in ("ffcv", "dali"):
        raise ValueError(
            f"backend {backend} reads .beton files and folders of indexed shards, {path} is neither; convert "
            f"it with `make convert DATA={path}` or choose backend folder"
        )
    if path.is_file():
        raise ValueError(
            f"backend folder reads folders of pictures, {path} is a file; compile it with "
            f"`make convert DATA={path}`"
        )
