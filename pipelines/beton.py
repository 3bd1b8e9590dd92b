"""Opening a compiled set in FFCV's ``.beton`` format: header, metadata and allocation table, checked.

Only arrays are held, a few dozen bytes a picture. Shape letters: M pictures in the set.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.manifest import Manifest, read_source_path

INSTALL_FFCV = (
    "FFCV is not installed. `make setup` installs it; by hand: "
    "apt-get install libopencv-dev libturbojpeg0-dev pkg-config && pip install ffcv==1.0.2"
)


@dataclass(frozen=True)
class Beton:
    """An opened compiled set."""

    path: Path
    metadata_M: NDArray[Any]
    """(M,) FFCV's structured records; field f0 is the picture, f1 the label."""
    pointer_A: NDArray[np.uint64]
    """Sorted file positions of all allocations."""
    num_bytes_A: NDArray[np.uint64]
    """Their sizes, in the same order."""
    manifest: Manifest | None
    """What the converter noted down, None for a file made elsewhere."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, empty where unknown."""
        return tuple(self.manifest.classes) if self.manifest else ()

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where the set has none."""
        if "f1" not in (self.metadata_M.dtype.names or ()):
            return np.full(len(index_N), -1, np.int64)
        return self.metadata_M["f1"][index_N].astype(np.int64).reshape(len(index_N))

    def picture_name(self, index: int) -> str:
        """The source path of picture ``index`` where the converter kept it."""
        return read_source_path(self.path, index) or f"picture {index} of {self.path.name}"


def import_ffcv() -> None:
    """Import FFCV or say how to install it; keeps the thread count that importing it would change.

    Raises:
        ImportError: if FFCV is missing.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        import ffcv.reader  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{INSTALL_FFCV} ({error})") from error
    finally:
        torch.set_num_threads(threads)


def open_beton(path: Path) -> Beton:
    """Open and check a ``.beton`` file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a whole ``.beton`` of version 2, or holds no pictures.
        ImportError: if FFCV is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no compiled set {path}; make one with `make convert DATA=<folder> OUT={path}`"
        )
    import_ffcv()
    from ffcv.fields import RGBImageField
    from ffcv.reader import Reader
    from ffcv.types import HeaderType

    num_bytes = path.stat().st_size
    again = "convert it again"
    if num_bytes < HeaderType.itemsize:
        raise ValueError(f"{path} has {num_bytes} bytes, too few for a .beton header; {again}")
    try:
        reader = Reader(str(path))
    except (
        AssertionError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        UnicodeDecodeError,
        OSError,
    ) as error:
        raise ValueError(f"{path} is not a whole .beton file: {error}; {again}") from error

    table = reader.alloc_table
    end = int((table["ptr"] + table["size"]).max()) if len(table) else 0
    if len(reader.metadata) != reader.num_samples or reader.num_samples == 0 or end == 0 or end > num_bytes:
        raise ValueError(
            f"{path} is cut short: its header promises {reader.num_samples} pictures, "
            f"{len(reader.metadata)} records and data up to byte {end} of {num_bytes} are there; {again}"
        )
    first_field = next(iter(reader.handlers.values()))
    if not isinstance(first_field, RGBImageField):
        raise ValueError(f"the first field of {path} is {type(first_field).__name__}, not a picture")
    manifest = Manifest.read(path)
    if manifest is not None and (manifest.count, manifest.num_bytes) != (int(reader.num_samples), num_bytes):
        raise ValueError(
            f"{path} has {reader.num_samples} pictures in {num_bytes} bytes, its manifest promises "
            f"{manifest.count} in {manifest.num_bytes}: one of the two is of another conversion, or the file "
            f"is cut short; {again}"
        )
    order_A = np.argsort(table["ptr"])
    return Beton(path, reader.metadata, table["ptr"][order_A], table["size"][order_A], manifest)
