"""The layout of FFCV's ``.beton`` files, version 2, and a reader that checks them.

A file consists of a header, one descriptor per field, the metadata of all samples, the payloads (the bytes of
the images), and the allocation table (sample, address, size) at the end. Addresses count from the start of
the file. Page p has the bytes [p · page_size, (p + 1) · page_size) of the file. No payload crosses the border
of two pages, because FFCV's process cache reads whole pages. Two samples may share one payload. Files of our
writer contain the hash of their contents, in the arguments of the field ``label``, which FFCV does not use
(see :mod:`pipelines.sets.manifest`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pipelines.sets.manifest import HASH_AT, HASH_BYTES, Manifest, Tier, blocks

VERSION = 2
"""Version of the layout; the first number of every file."""
HEADER_DTYPE = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
"""The first 24 bytes of a file. This dtype and the next three have the layout of those in ``ffcv.types``."""
FIELD_DTYPE = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", (1024,))], align=True)
"""The descriptor of a field: type, name padded with zeros, and arguments of that type."""
# A separate dtype, because align=True would align a nested one too.
_IMAGE_DTYPE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA_DTYPE = np.dtype([("f0", _IMAGE_DTYPE), ("f1", "<i8")], align=True)
"""The record of one sample: f0, the image, packed to 13 bytes; f1, the label, at byte 16."""
TABLE_DTYPE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
"""An entry of the allocation table."""
MODE_JPEG, MODE_RAW = 0, 1
"""Values of an image's ``mode``, as in ffcv.fields.rgb_image.IMAGE_MODES."""
MODE_YUV420 = 2
"""A mode that FFCV does not have: planes Y (H × W), U, V (each ceil(H/2) × ceil(W/2)) one after the other,
uint8, rows without padding; JFIF's full-range BT.601, chroma sited as in JPEG."""
TIER_MODES: dict[Tier, int] = {"jpeg": MODE_JPEG, "yuv420": MODE_YUV420, "raw": MODE_RAW}
"""The mode of all images of a tier."""
TYPE_INT, TYPE_IMAGE = 1, 2
"""Field type numbers, as in ffcv.types.TYPE_ID_HANDLER."""
TYPE_PLANES = 255
"""Field type of images stored in MODE_YUV420. In FFCV this number is a custom field, which FFCV's reader
refuses without a handler. With TYPE_IMAGE, FFCV would read the planes as pixels, and past their end."""
MAX_SIDE_PX = 65_535
"""Width and height are stored in 16 bits."""
_AGAIN = "convert it again"
MAX_PAGE_BYTES = 1 << 31
"""The page size is a power of two stored in 32 bits."""
_MODES_OF_TYPE = {TYPE_IMAGE: (MODE_JPEG, MODE_RAW), TYPE_PLANES: (MODE_YUV420,)}
_Integers = TypeVar("_Integers", int, npt.NDArray[np.uint64])


@dataclass(frozen=True)
class BetonFile:
    """An opened file with the fields ``image`` and ``label``; N samples."""

    path: Path
    data: npt.NDArray[np.uint8]
    """The whole file, mapped."""
    page_bytes: int
    metadata: npt.NDArray[np.void]
    """(N,) records of METADATA_DTYPE."""
    pointers: npt.NDArray[np.uint64]
    """(N,) addresses of the payloads in ``data``; a strided, unaligned view of ``metadata``."""
    sizes: npt.NDArray[np.uint64]
    """(N,) payload sizes in bytes; a strided view of the file if its table is in sample order."""
    sha256: str
    """The hash of the contents that the file contains, see Manifest; "" if it contains none."""

    def __len__(self) -> int:
        return len(self.metadata)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """(N,) labels, −1 where there is none."""
        return self.metadata["f1"]

    def payload(self, index: int) -> npt.NDArray[np.uint8]:
        """The stored bytes of one image, without a copy."""
        start = int(self.pointers[index])
        return self.data[start : start + int(self.sizes[index])]


def pixel_bytes(mode: int, width: _Integers, height: _Integers) -> _Integers:
    """The payload size of an image stored as pixels (MODE_RAW) or as planes (MODE_YUV420)."""
    if mode == MODE_RAW:
        return 3 * width * height
    return width * height + 2 * ((width + 1) // 2) * ((height + 1) // 2)


def open_beton(path: str | Path) -> BetonFile:
    """Map a compiled set and check everything but the images.

    This takes time linear in the number of samples, and almost no memory besides the mapped index. Files of
    other writers may have an allocation table in another order, which is sorted in memory.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is too short, has another version or other fields, a table or an address
            outside the file, or a payload that crosses pages.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no compiled set {path}; make one with `make convert DATA=<folder> OUT={path}`"
        )
    size = path.stat().st_size
    if size < HEADER_DTYPE.itemsize:
        raise ValueError(
            f"{path} has {size} bytes, a header alone has {HEADER_DTYPE.itemsize}: it is cut short; {_AGAIN}"
        )
    data = np.memmap(path, np.uint8, mode="r")
    header = data[: HEADER_DTYPE.itemsize].view(HEADER_DTYPE)[0]
    _check_header(path, header, size)
    metadata, modes = _metadata(path, data, header)
    table_at, page = int(header["alloc_table_ptr"]), int(header["page_size"])
    table = data[table_at:].view(TABLE_DTYPE)
    pointers = metadata["f0"]["data_ptr"]
    sizes = table["size"] if _in_sample_order(pointers, table) else _sizes_by_address(path, pointers, table)
    for rows in blocks(len(metadata)):
        _check_sizes(path, rows.start, metadata["f0"][rows], sizes[rows], modes)
        _check_places(path, rows.start, pointers[rows], sizes[rows], page, table_at)
    recorded = bytes(data[HASH_AT : HASH_AT + HASH_BYTES]).strip(b"\0").decode("ascii", "replace")
    return BetonFile(path, data, page, metadata, pointers, sizes, recorded)


def _check_header(path: Path, header: Any, size: int) -> None:
    if header["version"] != VERSION:
        raise ValueError(
            f"{path} is not a .beton file of version {VERSION} (says {header['version']}); {_AGAIN}"
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
    if (size - table_at) % TABLE_DTYPE.itemsize:
        raise ValueError(
            f"{path}: the allocation table of {size - table_at} bytes ends inside an entry: "
            f"it is cut short; {_AGAIN}"
        )


def _metadata(path: Path, data: Any, header: Any) -> tuple[npt.NDArray[np.void], tuple[int, ...]]:
    """The metadata records, and the modes that the type of the field ``image`` allows."""
    start = HEADER_DTYPE.itemsize
    num_fields, count = int(header["num_fields"]), int(header["num_samples"])
    stop = start + num_fields * FIELD_DTYPE.itemsize
    if stop + count * METADATA_DTYPE.itemsize > int(header["alloc_table_ptr"]):
        raise ValueError(
            f"{path}: metadata of {count} samples does not fit before the allocation table; {_AGAIN}"
        )
    fields = data[start:stop].view(FIELD_DTYPE)
    found = [(bytes(f["name"]).split(b"\0")[0].decode("ascii", "replace"), int(f["type_id"])) for f in fields]
    for image_type, modes in _MODES_OF_TYPE.items():
        if found == [("image", image_type), ("label", TYPE_INT)]:
            metadata: npt.NDArray[np.void] = data[stop : stop + count * METADATA_DTYPE.itemsize].view(
                METADATA_DTYPE
            )
            return metadata, modes
    raise ValueError(
        f"{path} has the fields {found}; expected image (type {TYPE_IMAGE}, or {TYPE_PLANES} for planes), "
        f"label (type {TYPE_INT})"
    )


def _in_sample_order(pointers: npt.NDArray[np.uint64], table: npt.NDArray[np.void]) -> bool:
    """Whether entry i of the table belongs to sample i, as in files of our writer."""
    return len(table) == len(pointers) and all(
        np.array_equal(table["sample_id"][rows], np.arange(rows.start, rows.stop, dtype=np.uint64))
        and np.array_equal(table["ptr"][rows], pointers[rows])
        for rows in blocks(len(table))
    )


def _sizes_by_address(
    path: Path, pointers: npt.NDArray[np.uint64], table: npt.NDArray[np.void]
) -> npt.NDArray[np.uint64]:
    """(N,) payload sizes from a table in any order. Raises ValueError if it lacks an address."""
    order = np.argsort(table["ptr"], kind="stable")
    starts, sizes = table["ptr"][order], table["size"][order]
    found = np.searchsorted(starts, pointers)
    known = (
        np.append(starts, np.uint64(0))[found] == pointers if len(starts) else np.zeros(len(pointers), bool)
    )
    if not known.all():
        index = int(np.argmin(known))
        raise ValueError(
            f"{path}: image {index} at byte {pointers[index]} is not in the allocation table; {_AGAIN}"
        )
    size: npt.NDArray[np.uint64] = sizes[found] if len(sizes) else np.zeros(0, np.uint64)
    return size


def _check_sizes(path: Path, first: int, image: Any, size: Any, modes: tuple[int, ...]) -> None:
    """Raise ValueError if the mode of an image is not in ``modes``, or its size does not fit the mode."""
    width, height = image["width"].astype(np.uint64), image["height"].astype(np.uint64)
    fits = np.zeros(len(size), bool)
    for mode in modes:
        sized = size > 0 if mode == MODE_JPEG else size == pixel_bytes(mode, width, height)
        fits |= (image["mode"] == mode) & sized
    fits &= (width > 0) & (height > 0)
    if not fits.all():
        index = int(np.argmin(fits))
        raise ValueError(
            f"{path}: image {first + index} of {width[index]} × {height[index]} px, mode "
            f"{image['mode'][index]}, cannot have {size[index]} bytes; {_AGAIN}"
        )


def _check_places(path: Path, first: int, pointers: Any, size: Any, page: int, table_at: int) -> None:
    """Raise ValueError if a payload lies outside the file's payloads or crosses pages."""
    stop = pointers + size
    bad = (stop > table_at) | (stop < pointers) | (pointers // page != (stop - 1) // page)
    if bad.any():
        index = int(np.argmax(bad))
        raise ValueError(
            f"{path}: image {first + index} lies at bytes {pointers[index]} … {stop[index]}, outside the "
            f"payloads (end at {table_at}) or across a page of {page} bytes; {_AGAIN}"
        )


def matching_manifest(beton: BetonFile) -> Manifest | None:
    """Read the manifest of an opened set; None if there is none.

    Raises:
        ValueError: if the manifest has another number of images or bytes than the file, or another hash.
    """
    manifest = Manifest.read(beton.path)
    if manifest is None:
        return None
    if (manifest.count, manifest.num_bytes) != (len(beton), len(beton.data)):
        raise ValueError(
            f"{beton.path} has {len(beton)} images in {len(beton.data)} bytes, its manifest says "
            f"{manifest.count} in {manifest.num_bytes}: one of the two is from another conversion; {_AGAIN}"
        )
    if beton.sha256 not in ("", manifest.sha256):
        raise ValueError(
            f"{beton.path} has contents of the hash {beton.sha256[:16]}…, its manifest says "
            f"{manifest.sha256[:16]}…: one of the two is from another conversion; {_AGAIN}"
        )
    return manifest
