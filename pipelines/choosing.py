"""Which backend reads a set best here: by what the set offers, what is installed and what the machine has."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from pipelines.beton import INSTALL_FFCV
from pipelines.dali_operators import INSTALL_DALI
from pipelines.manifest import Manifest
from pipelines.shards import is_shard_set

Backend = Literal["auto", "ffcv", "dali", "folder"]
# Compute capabilities of the data-centre GPUs with a JPEG unit: A30 and A100; H100 and H200; B200 and B300.
_WITH_JPEG_UNIT = ((8, 0), (9, 0), (10, 0), (10, 3))


@dataclass(frozen=True)
class Choice:
    """A backend, and why it was taken."""

    backend: Backend
    why: str

    def __str__(self) -> str:
        return f"backend {self.backend}: {self.why}"


@dataclass(frozen=True)
class Here:
    """What there is to choose from."""

    ffcv: bool
    """Whether FFCV is installed."""
    dali: bool
    """Whether DALI is installed."""
    jpeg_unit: bool
    """Whether the device is a GPU that decodes JPEGs in hardware."""


def look_around(device: torch.device) -> Here:
    """What is installed, and what the device has; imports nothing heavy."""
    unit = device.type == "cuda" and torch.cuda.get_device_capability(device) in _WITH_JPEG_UNIT
    return Here(_installed("ffcv"), _installed("nvidia") and _installed("nvidia.dali"), unit)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def choose(path: str | Path, backend: Backend, here: Here) -> Choice:
    """Choose a backend for a set, or see whether the one asked for can read it.

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
    manifest, shards = Manifest.read(path), is_shard_set(path)
    # FFCV's types tell the layout of a .beton file, whoever decodes what is in it.
    dali = here.dali and (shards or here.ffcv) and (manifest is None or manifest.tier == "jpeg")
    if here.jpeg_unit and dali and manifest is not None:
        return Choice("dali", "this GPU decodes JPEGs in hardware")
    if here.ffcv:
        return Choice("ffcv", _why_ffcv(here, manifest))
    if dali:
        return Choice("dali", "FFCV, which would be faster on CPU cores, is not installed")
    or_dali = f" Or DALI, which reads shards alone: {INSTALL_DALI}" if shards else ""
    raise ImportError(f"nothing that is installed here reads {path}. {INSTALL_FFCV}.{or_dali}")


def _why_ffcv(here: Here, manifest: Manifest | None) -> str:
    if manifest is None:
        return "it reads every tier, and the set has no manifest to tell its own"
    if manifest.tier != "jpeg":
        return f"only it reads pictures of the tier {manifest.tier}"
    if here.jpeg_unit:
        return f"the fastest that is installed; for this GPU's JPEG unit DALI is missing, {INSTALL_DALI}"
    return "the fastest on CPU cores, and this device has no unit that decodes JPEGs"


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
