"""Sets of any size without the images for it: a full index over the payloads of a few real photographs."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.sets.beton import FIELD_DTYPE, HEADER_DTYPE, TABLE_DTYPE, BetonFile, matching_manifest
from pipelines.sets.manifest import blocks, manifest_path
from training.files import write_json


def write_synthetic(source: BetonFile, path: Path, *, count: int, payloads: int) -> int:
    """Write a ``.beton`` of ``count`` entries over the first images of ``source``, and its manifest.

    Entry i is image ⌊i · payloads / count⌋, so addresses rise as in a converted set, with each payload
    stored once. The index is written in blocks, so memory does not grow with ``count``.

    Returns:
        The size of the index, metadata and allocation table, in bytes.

    Raises:
        ValueError: if ``payloads`` is not in [1, images of ``source``], or ``source`` has no manifest.
    """
    if not 1 <= payloads <= len(source):
        raise ValueError(
            f"payloads is {payloads}; it must be in 1 … {len(source)}, the images of {source.path}"
        )
    manifest = matching_manifest(source)
    if manifest is None:
        raise ValueError(f"{source.path} has no manifest; make the photographs again: make samples")
    first = HEADER_DTYPE.itemsize
    # The fields and their descriptors are the source's, except for the hash of its contents.
    header = source.data[:first].copy().view(HEADER_DTYPE)
    metadata_at = first + int(header["num_fields"][0]) * FIELD_DTYPE.itemsize
    descriptors = source.data[first:metadata_at].copy()
    descriptors.view(FIELD_DTYPE)["arguments"] = 0
    records = np.array(source.metadata[:payloads])
    sizes = source.sizes[:payloads].astype(np.int64)
    payloads_at = metadata_at + count * records.itemsize
    addresses, table_at = _addresses(sizes, payloads_at, source.page_bytes)
    records["f0"]["data_ptr"] = addresses
    entries = np.zeros(payloads, TABLE_DTYPE)
    entries["ptr"], entries["size"] = addresses, sizes
    header["num_samples"], header["alloc_table_ptr"] = count, table_at
    with path.open("wb") as file:
        file.write(header.tobytes() + descriptors.tobytes())
        for block in blocks(count):
            file.write(records[np.arange(block.start, block.stop) * payloads // count].tobytes())
        for n, address in enumerate(addresses):
            file.seek(int(address))
            file.write(source.payload(n).tobytes())
        file.seek(table_at)
        for block in blocks(count):
            number_N = np.arange(block.start, block.stop)
            table = entries[number_N * payloads // count]
            table["sample_id"] = number_N
            file.write(table.tobytes())
    num_bytes = path.stat().st_size
    # Hashing every entry's payload would read a terabyte, and no measurement needs the hash.
    ours = replace(manifest, count=count, num_bytes=num_bytes, sha256="", source="synthetic")
    write_json(manifest_path(path), asdict(ours))
    return int(payloads_at - metadata_at + num_bytes - table_at)


def _addresses(sizes: NDArray[np.int64], start: int, page_bytes: int) -> tuple[NDArray[np.int64], int]:
    """Return where payloads lie from byte ``start`` on, none across a page, and where they end."""
    addresses = np.empty(len(sizes), np.int64)
    for n, size in enumerate(sizes):
        room = page_bytes - start % page_bytes
        addresses[n] = start if size <= room else start + room
        start = int(addresses[n] + size)
    return addresses, start
