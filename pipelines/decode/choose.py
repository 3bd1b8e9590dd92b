"""Choose the decoder of a set by how the set is stored, what is installed and what hardware there is."""

import contextlib
import ctypes
import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from pipelines.decode import Decoder
from pipelines.decode.dali import DALIDecoder, DALIDeviceDecoder
from pipelines.decode.dali_operators import INSTALL_DALI, DALIOptions
from pipelines.decode.pillow import PillowDecoder
from pipelines.decode.turbo import TurboDecoder
from pipelines.kernels import turbojpeg
from pipelines.sets import PictureSet
from pipelines.sets.manifest import Manifest
from pipelines.sets.stores import is_compiled

Backend = Literal["auto", "ffcv", "dali", "folder"]
"""ffcv: libturbojpeg and our kernels on the CPU. dali: NVIDIA's DALI. folder: Pillow, for image files."""
IMAGES_PER_CORE_S = 560
"""JPEGs per second that one CPU core decodes and crops to two views of 224 px, with the photometric stage on
the GPU. ``benchmarks/results/loader.json`` has 1,021 per core for JPEGs of 55 KB (500 × 375 px) and 687 for
JPEGs of 108 KB, measured on two cores. This constant is the lower figure minus a fifth, because more cores
share one memory and a training step runs at the same time."""
IMAGES_PER_GPU_S = 3_000
"""Images per second that training on one GPU can use. Published rates of ResNet-50, forward and
backward, are 3,000 to 4,000 images per second. MoCo adds the key encoder's forward pass, a third of that,
which makes 2,250 to 3,000. MixMask also encodes mixtures, forward and backward: 1,290 to 1,720."""


@dataclass(frozen=True)
class Choice:
    """A backend, and the reason for it."""

    backend: Backend
    reason: str

    def __str__(self) -> str:
        return f"backend {self.backend}: {self.reason}"


class JpegUnit(NamedTuple):
    """Whether a GPU has a hardware decoder for JPEGs."""

    present: bool
    reason: str = ""
    """Why the unit cannot be used, as a clause of a message; "" if it is present."""


@dataclass(frozen=True)
class Machine:
    """What the choice of a backend depends on: installed libraries, cores and the GPU's JPEG unit."""

    turbojpeg: bool
    """Whether libturbojpeg is installed, which the ``ffcv`` backend needs."""
    dali: bool
    """Whether DALI is installed."""
    cores: int = 1
    """CPU cores that decode for this process. A process trains on one device."""
    jpeg_unit: Callable[[], JpegUnit] | None = None
    """Returns whether the GPU decodes JPEGs in hardware; None if the training device is a CPU."""


def describe_machine(device: torch.device, cores: int) -> Machine:
    """Find out what is installed. Imports no large package and does not start CUDA.

    Args:
        device: the training device.
        cores: CPU cores that decode.

    Raises:
        ValueError: if the environment variable LIBTURBOJPEG does not name a libturbojpeg.
    """
    jpeg_unit = functools.partial(find_jpeg_unit, device) if device.type == "cuda" else None
    return Machine(turbojpeg.is_found(), _installed("nvidia.dali"), cores, jpeg_unit)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # the parent package is missing
        return False


def choose(path: str | Path, backend: Backend, machine: Machine) -> Choice:
    """Choose a backend for a set, or check that the given one can read it.

    ``auto`` decodes on the CPU, unless there are too few cores for the GPU and the GPU has a JPEG unit.

    Raises:
        FileNotFoundError: if there is no such set.
        ValueError: if the backend is unknown or cannot read the set.
        ImportError: if no installed backend reads the set.
    """
    path = Path(path)
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; known are {', '.join(get_args(Backend))}")
    if not is_compiled(path):
        _check_folder(path, backend)
        return Choice("folder", "the set is a folder of images")
    if backend == "folder":
        raise ValueError(
            f"backend folder reads folders of images, {path} is a compiled set; choose ffcv, dali or auto"
        )
    if backend != "auto":
        return Choice(backend, "as requested")
    manifest = Manifest.read(path)
    jpegs = manifest is None or manifest.tier == "jpeg"
    if machine.turbojpeg:
        if manifest is None:
            return Choice("ffcv", "it reads every tier, and the set has no manifest that names its tier")
        return (
            _choose_by_cores(machine) if jpegs else Choice("ffcv", f"only it reads the tier {manifest.tier}")
        )
    if machine.dali and jpegs:
        return Choice(
            "dali", f"libturbojpeg, which is faster on CPU cores, was not found; {turbojpeg.INSTALL}"
        )
    or_dali = f" Or DALI: {INSTALL_DALI}" if jpegs else ""
    raise ImportError(
        f"no installed backend reads {path}: libturbojpeg was not found; {turbojpeg.INSTALL}.{or_dali}"
    )


def _choose_by_cores(machine: Machine) -> Choice:
    """Choose between ffcv and dali for a set of JPEGs, which both can read."""
    if machine.jpeg_unit is None:
        return Choice("ffcv", "the fastest on CPU cores, and batches stay on the CPU")
    rate = machine.cores * IMAGES_PER_CORE_S
    cores = f"{machine.cores} CPU core{'s' if machine.cores > 1 else ''} decode about {rate:,} images/s"
    if rate >= IMAGES_PER_GPU_S:
        return Choice("ffcv", f"{cores}, and one GPU uses at most {IMAGES_PER_GPU_S:,}")
    few = f"{cores}, and one GPU can use up to {IMAGES_PER_GPU_S:,}"
    unit = machine.jpeg_unit()
    if not unit.present:
        return Choice("ffcv", f"{few}, but {unit.reason}")
    if not machine.dali:
        return Choice("ffcv", f"{few}, but DALI, which uses this GPU's JPEG unit, is missing: {INSTALL_DALI}")
    return Choice("dali", f"{few}; this GPU decodes JPEGs in hardware")


def _check_folder(path: Path, backend: Backend) -> None:
    """Raise ValueError if the backend needs a compiled set, or if the path is not a folder."""
    if backend in ("ffcv", "dali"):
        raise ValueError(
            f"backend {backend} reads .beton files and folders of indexed shards, {path} is neither; convert "
            f"it with `make convert DATA={path}` or choose backend folder"
        )
    if path.is_file():
        raise ValueError(
            f"backend folder reads folders of images, {path} is a file; compile it with "
            f"`make convert DATA={path}`"
        )


def open_decoder(
    backend: Backend,
    picture_set: PictureSet,
    device: torch.device,
    num_threads: int,
    options: DALIOptions | None = None,
) -> Decoder:
    """Open the decoder of a backend.

    Args:
        backend: any but "auto".
        picture_set: the set that will be decoded.
        device: the training device.
        num_threads: CPU threads of a DALI graph on a GPU. The other decoders run on the calling thread.
        options: of decoding by DALI on a GPU.

    Raises:
        ImportError: if a package of the backend is missing.
        ValueError: if the backend cannot decode the set, or would ignore the options.
    """
    if backend != "dali" and options not in (None, DALIOptions()):
        raise ValueError(f"{options} are given, but the backend is {backend}; choose backend dali")
    if backend == "folder":
        return PillowDecoder()
    if backend == "ffcv":
        return TurboDecoder()
    if device.type == "cuda":
        return DALIDeviceDecoder(picture_set, device, num_threads, options or DALIOptions())
    return DALIDecoder(picture_set)


# --------------------------------------------------------------------------------------- the GPU's JPEG unit

BACKEND_HARDWARE = 3
"""NVJPEG_BACKEND_HARDWARE of nvjpeg.h."""
SUCCESS, ARCH_MISMATCH = 0, 7
"""NVJPEG_STATUS_SUCCESS and NVJPEG_STATUS_ARCH_MISMATCH of nvjpeg.h."""
_SYSTEM_NAMES = ("libnvjpeg.so.13", "libnvjpeg.so.12")


def find_jpeg_unit(device: torch.device, load: Callable[[str], Any] = ctypes.CDLL) -> JpegUnit:
    """Find out whether a GPU has a JPEG unit: try to create a hardware decoder with nvJPEG.

    The compute capability of a GPU is not enough to know that.

    Args:
        device: a GPU. A CPU has no unit, and looking for one would start CUDA.
        load: opens a library by its path or name; raises OSError if there is none.
    """
    assert device.type == "cuda", f"only a GPU can have a JPEG unit, not {device}"
    statuses = []
    with torch.cuda.device(device):
        for name in nvjpeg_libraries():
            try:
                library = load(name)
            except OSError:
                continue
            status = _hardware_status(library)
            if status == SUCCESS:
                return JpegUnit(True)
            statuses.append(status)
    if not statuses:
        return JpegUnit(False, "nvJPEG's library was not found (pip install nvidia-nvjpeg)")
    if ARCH_MISMATCH in statuses:
        return JpegUnit(False, f"nvJPEG reports no JPEG unit (status {ARCH_MISMATCH})")
    return JpegUnit(False, f"nvJPEG could not look for a JPEG unit (status {statuses[0]})")


def nvjpeg_libraries() -> Iterator[str]:
    """Paths of nvJPEG in NVIDIA's wheels, newest first, then its names on the system."""
    with contextlib.suppress(ImportError):
        spec = importlib.util.find_spec("nvidia")
        folders = (spec.submodule_search_locations if spec else None) or ()
        found = [file for folder in folders for file in Path(folder).glob("**/lib/libnvjpeg.so.1*")]
        yield from sorted(map(str, found), key=lambda file: file.rpartition(".so.")[2], reverse=True)
    yield from _SYSTEM_NAMES


def _hardware_status(library: Any) -> int:
    """Try to create a handle that decodes in hardware; returns nvJPEG's status."""
    pointer = ctypes.c_void_p
    library.nvjpegCreateEx.argtypes = [ctypes.c_int, pointer, pointer, ctypes.c_uint, ctypes.POINTER(pointer)]
    library.nvjpegDestroy.argtypes = [pointer]
    handle = pointer()
    status = int(library.nvjpegCreateEx(BACKEND_HARDWARE, None, None, 0, ctypes.byref(handle)))
    if status == SUCCESS:
        library.nvjpegDestroy(handle)
    return status
