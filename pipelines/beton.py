"""The layout of FFCV's ``.beton`` files, version 2, and a reader that distrusts them.

A file is: header, one descriptor per field, the metadata of all samples, payloads, and at the very end
the allocation table (sample, address, size). Addresses are absolute. FFCV's process cache reads whole pages,
page p being the bytes [p · page_size, (p + 1) · page_size) of the file, so no payload straddles two pages.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.manifest import Manifest

INSTALL_FFCV = (
    "FFCV is not installed. `make setup` installs it; by hand: "
    "apt-get install libopencv-dev libturbojpeg0-dev pkg-config && pip install ffcv==1.0.2"
)
MODE_JPEG, MODE_RAW = 0, 1
"""Values of an image's ``mode``, as in ffcv.fields.rgb_image.IMAGE_MODES."""
TYPE_INT, TYPE_IMAGE = 1, 2
"""Field type numbers, as in ffcv.types.TYPE_ID_HANDLER."""
MAX_SIDE_PX = 65_535
"""Width and height are stored in 16 bits."""
_AGAIN = "convert it again"
MAX_PAGE_BYTES = 1 << 31
"""The page size is a power of two stored in 32 bits."""


def import_ffcv() -> None:
    """Import FFCV or say how to install it; keeps the thread count that importing it would change.

    Raises:
        ImportError: if FFCV is missing.
    """
    import torch

    # Importing FFCV starts numba's threads, whose kind must be chosen before.
    import pipelines.cores  # noqa: F401

    threads = torch.get_num_threads()
    try:
        import ffcv.reader  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{INSTALL_FFCV} ({error})") from error
    finally:
        torch.set_num_threads(threads)


def ffcv_types() -> ModuleType:
    """Return ``ffcv.types``; a missing FFCV is an ImportError that says how to install it."""
    import_ffcv()
    import ffcv.types

    types: ModuleType = ffcv.types
    return types


def metadata_dtype() -> np.dtype[Any]:
    """Return the record of one sample: f0 = (mode, width, height, data_ptr), f1 = label."""
    types = ffcv_types()
    dtype: np.dtype[Any] = types.get_metadata_type([types.RGBImageField(), types.IntField()])
    return dtype


@dataclass(frozen=True)
class BetonFile:
    """An opened set of the fields ``image`` and ``label``; N samples."""

    path: Path
    data: npt.NDArray[np.uint8]
    """The whole file, mapped."""
    page_bytes: int
    metadata: npt.NDArray[np.void]
    """(N,) records, see metadata_dtype."""
    sizes: npt.NDArray[np.uint64]
    """(N,) payload sizes in bytes."""

    def __len__(self) -> int:
        return len(self.metadata)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """(N,) labels, −1 where there is none."""
        return self.metadata["f1"]

    def payload(self, index: int) -> npt.NDArray[np.uint8]:
        """Return the stored bytes of one picture, without a copy."""
        start = int(self.metadata["f0"]["data_ptr"][index])
        return self.data[start : start + int(self.sizes[index])]


def open_beton(path: str | Path) -> BetonFile:
    """Map a compiled set and check everything but the pictures.

    Raises FileNotFoundError where there is no file, and ValueError naming the file and what is wrong with it:
    too short, another version, other fields, a table or an address outside the file, a payload across a page.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no compiled set {path}; make one with `make convert DATA=<folder> OUT={path}`"
        )
    types = ffcv_types()
    size = path.stat().st_size
    if size < types.HeaderType.itemsize:
        raise ValueError(
            f"{path} has {size} bytes, a header alone has {types.HeaderType.itemsize}: it is cut short; "
            f"{_AGAIN}"
        )
    data = np.memmap(path, np.uint8, mode="r")
    header = data[: types.HeaderType.itemsize].view(types.HeaderType)[0]
    _check_header(path, header, size, types)
    metadata, table_at = _metadata(path, data, header, types), int(header["alloc_table_ptr"])
    table = data[table_at:].view(types.ALLOC_TABLE_TYPE)
    sizes = _sizes(path, metadata, table, int(header["page_size"]), table_at)
    return BetonFile(path, data, int(header["page_size"]), metadata, sizes)


def _check_header(path: Path, header: Any, size: int, types: ModuleType) -> None:
    if header["version"] != types.CURRENT_VERSION:
        raise ValueError(
            f"{path} is not a .beton file of version {types.CURRENT_VERSION} (says {header['version']}); "
            f"{_AGAIN}"
        )
    page = int(header["page_size"])
    if page == 0 or page & (page - 1):
        raise ValueError(f"{path}: page size {page} is not a power of two, the header is damaged; {_AGAIN}")
    table_at = int(header["alloc_table_ptr"])
    if table_at == 0 or table_at > size:
        raise ValueError(
            f"{path}: the allocation table should start at byte {table_at}, the file has {size}: "
            f"it is cut short; {_AGAIN}"
        )
    if (size - table_at) % types.ALLOC_TABLE_TYPE.itemsize:
        raise ValueError(
            f"{path}: the allocation table of {size - table_at} bytes ends inside an entry: "
            f"it is cut short; {_AGAIN}"
        )


def _metadata(path: Path, data: Any, header: Any, types: ModuleType) -> npt.NDArray[np.void]:
    start = types.HeaderType.itemsize
    num_fields, count = int(header["num_fields"]), int(header["num_samples"])
    stop = start + num_fields * types.FieldDescType.itemsize
    dtype = metadata_dtype()
    if stop + count * dtype.itemsize > int(header["alloc_table_ptr"]):
        raise ValueError(
            f"{path}: metadata of {count} samples does not fit before the allocation table; {_AGAIN}"
        )
    fields = data[start:stop].view(types.FieldDescType)
    found = [(bytes(f["name"]).split(b"\0")[0].decode("ascii", "replace"), int(f["type_id"])) for f in fields]
    if found != [("image", TYPE_IMAGE), ("label", TYPE_INT)]:
        raise ValueError(
            f"{path} has the fields {found}; expected image (type {TYPE_IMAGE}), label (type {TYPE_INT})"
        )
    metadata: npt.NDArray[np.void] = data[stop : stop + count * dtype.itemsize].view(dtype)
    return metadata


def _sizes(
    path: Path, metadata: npt.NDArray[np.void], table: Any, page: int, table_at: int
) -> npt.NDArray[np.uint64]:
    """Return the payload size of each sample after checking the table against the metadata."""
    pointers = metadata["f0"]["data_ptr"]
    order = np.argsort(table["ptr"], kind="stable")
    starts, sizes = table["ptr"][order], table["size"][order]
    found = np.searchsorted(starts, pointers)
    known = (
        np.append(starts, np.uint64(0))[found] == pointers if len(starts) else np.zeros(len(pointers), bool)
    )
    if not known.all():
        index = int(np.argmin(known))
        raise ValueError(
            f"{path}: picture {index} at byte {pointers[index]} is not in the allocation table; {_AGAIN}"
        )
    size: npt.NDArray[np.uint64] = sizes[found] if len(sizes) else np.zeros(0, np.uint64)
    stop = pointers + size
    image = metadata["f0"]
    raw = image["mode"] == MODE_RAW
    pixels = image["width"].astype(np.uint64) * image["height"]
    misfit = (raw & (size != 3 * pixels)) | (pixels == 0) | ~(raw | (image["mode"] == MODE_JPEG))
    if misfit.any():
        index = int(np.argmax(misfit))
        raise ValueError(
            f"{path}: picture {index} of {image['width'][index]} × {image['height'][index]} px, mode "
            f"{image['mode'][index]}, cannot have {size[index]} bytes; {_AGAIN}"
        )
    bad = (size == 0) | (stop > table_at) | (stop < pointers) | (pointers // page != (stop - 1) // page)
    if bad.any():
        index = int(np.argmax(bad))
        raise ValueError(
            f"{path}: picture {index} lies at bytes {pointers[index]} … {stop[index]}, outside the payloads "
            f"(end at {table_at}) or across a page of {page} bytes; {_AGAIN}"
        )
    return size


def matching_manifest(beton: BetonFile) -> Manifest | None:
    """Return the manifest beside an opened set, None for a file made elsewhere.

    Raises ValueError where it promises another number of pictures or bytes than the file has.
    """
    manifest = Manifest.read(beton.path)
    if manifest is not None and (manifest.count, manifest.num_bytes) != (len(beton), len(beton.data)):
        raise ValueError(
            f"{beton.path} has {len(beton)} pictures in {len(beton.data)} bytes, its manifest promises "
            f"{manifest.count} in {manifest.num_bytes}: one of the two is of another conversion; {_AGAIN}"
        )
    return manifest
