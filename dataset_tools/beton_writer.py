"""Writes FFCV's ``.beton`` files. Encoded images are stored unchanged, and no incomplete file is left.

FFCV's own writer encodes every JPEG again, and waits forever if one of its workers raises.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset_tools.disk import Lock, PartialFile, write_manifest
from pipelines.sets.beton import (
    FIELD_DTYPE,
    HEADER_DTYPE,
    MAX_PAGE_BYTES,
    MAX_SIDE_PX,
    METADATA_DTYPE,
    TABLE_DTYPE,
    TIER_MODES,
    TYPE_IMAGE,
    TYPE_INT,
    TYPE_PLANES,
    VERSION,
    open_beton,
    pixel_bytes,
)
from pipelines.sets.manifest import (
    HASH_BYTES,
    Manifest,
    Tier,
    manifest_path,
    paths_path,
    pending_path,
    skipped_path,
    source_path_line,
    valid_side_file,
)
from training.files import sync_folder

DEFAULT_PAGE_BYTES = 8 << 20


def finish_contents_hash(hasher: "hashlib._Hash", metadata: npt.NDArray[np.void]) -> str:
    """Add the columns mode, width, height and label to the hash of all payloads; return the hash of the set.

    Addresses are not hashed, so files of the same images have the same hash for any page size.
    """
    for column in (metadata["f0"]["mode"], metadata["f0"]["width"], metadata["f0"]["height"], metadata["f1"]):
        hasher.update(np.ascontiguousarray(column).data)
    return hasher.hexdigest()


def settle_side_files(path: Path) -> None:
    """Rename pending side files if they belong to the set at ``path``; remove them otherwise."""
    manifest = manifest_path(path)
    belong = valid_side_file(path, manifest) != manifest
    # The manifest comes last, because it identifies the set to which the other files belong.
    for side in (paths_path(path), skipped_path(path), manifest):
        pending = pending_path(side)
        if not pending.exists():
            continue
        if belong and pending.stat().st_size:
            pending.replace(side)
            continue
        if belong:
            side.unlink(missing_ok=True)
        pending.unlink()


class BetonWriter:
    """Writes images one after the other; the file gets its name in :meth:`commit`.

    A context manager: leaving it without ``commit``, by an error or Ctrl-C, removes what was written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        capacity: int,
        tier: Tier = "jpeg",
        page_bytes: int = DEFAULT_PAGE_BYTES,
        overwrite: bool = False,
    ) -> None:
        """Check the options and open the temporary files.

        Args:
            path: the set to write, with the suffix .beton.
            capacity: largest number of images; the tables of the file have space for all of them.
            tier: form in which images are stored.
            page_bytes: size of a page, a power of two from 4096 on; grows if an image is larger.
            overwrite: replace an existing set in ``commit``.

        Raises:
            ValueError: if an option is unusable.
            FileExistsError: if ``path`` exists and ``overwrite`` is off, or another process is writing it.
            FileNotFoundError: if its folder does not exist.
        """
        self.path = Path(path)
        if self.path.suffix != ".beton":
            raise ValueError(f"{self.path} does not end in .beton; name the compiled set so")
        if tier not in TIER_MODES:
            raise ValueError(f"tier is {tier!r}; known are {', '.join(TIER_MODES)}")
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a compiled set holds at least one image")
        if not 4096 <= page_bytes <= MAX_PAGE_BYTES or page_bytes & (page_bytes - 1):
            raise ValueError(f"page_bytes is {page_bytes}; choose a power of two in [4096, {MAX_PAGE_BYTES}]")
        if self.path.exists() and not overwrite:
            raise FileExistsError(f"{self.path} exists already; choose another name or add --overwrite")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"the folder {self.path.parent} does not exist; make it first")
        self.tier, self.page_bytes, self.count = tier, page_bytes, 0
        self._mode = TIER_MODES[tier]
        self._metadata = np.zeros(capacity, METADATA_DTYPE)
        self._sizes = np.zeros(capacity, np.uint64)
        self._hasher = hashlib.sha256()
        self._descriptors = self._field_descriptors()
        self._metadata_at = HEADER_DTYPE.itemsize + self._descriptors.nbytes
        self._end: int = self._metadata_at + self._metadata.nbytes
        with contextlib.ExitStack() as stack:
            stack.enter_context(Lock(self.path.with_name(f".{self.path.name}.lock"), self.path))
            settle_side_files(self.path)
            stack.callback(settle_side_files, self.path)
            self._out = stack.enter_context(PartialFile(self.path))
            self._out.skip_to(self._end)
            self._paths = stack.enter_context(PartialFile(paths_path(self.path)))
            self._skipped = stack.enter_context(PartialFile(skipped_path(self.path)))
            self._stack = stack.pop_all()

    def __enter__(self) -> "BetonWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def add(
        self,
        payload: bytes | npt.NDArray[np.uint8],
        *,
        label: int,
        width: int,
        height: int,
        source_path: str,
    ) -> int:
        """Append one image and return its index.

        Args:
            payload: a complete JPEG file; in the raw tier contiguous (height, width, 3) uint8 pixels; in the
                yuv420 tier the result of ``Planes.packed``.
            label: class number; −1 without classes.
            width: in px, 1 … 65,535.
            height: in px, 1 … 65,535.
            source_path: path within the source, for the list of paths.

        Raises:
            ValueError: if the payload is empty or of another size, or a side is out of range.
        """
        data = memoryview(payload if isinstance(payload, bytes) else payload.data).cast("B")
        index, size = self.count, data.nbytes
        if index == len(self._metadata):
            raise ValueError(f"the set was opened for {index} images and is full")
        if not (1 <= width <= MAX_SIDE_PX and 1 <= height <= MAX_SIDE_PX):
            raise ValueError(f"{source_path} is {width} × {height} px; sides must lie in 1 … {MAX_SIDE_PX}")
        if size == 0 or (self.tier != "jpeg" and size != pixel_bytes(self._mode, width, height)):
            raise ValueError(
                f"{source_path}: a {self.tier} payload of {size} bytes for {width} × {height} px"
            )
        if size > MAX_PAGE_BYTES:
            raise ValueError(f"{source_path} has {size} bytes; a page holds at most {MAX_PAGE_BYTES}")
        pointer = self._next_address(size)
        if pointer != self._end:  # a seek flushes the buffer, which is slow for small images
            self._out.file.seek(pointer)
        self._out.file.write(data)
        self._hasher.update(data)
        self._end = pointer + size
        image = self._metadata["f0"]
        image["mode"][index], image["width"][index] = self._mode, width
        image["height"][index], image["data_ptr"][index] = height, pointer
        self._metadata["f1"][index], self._sizes[index] = label, size
        self._paths.file.write(source_path_line(source_path))
        self.count += 1
        self._out.sync_behind(self._end)
        return index

    def skip(self, line: str) -> None:
        """Write the path of an image that is left out, and the reason, into the list at ``skipped_path``."""
        self._skipped.file.write(source_path_line(line))

    def commit(
        self,
        *,
        source: str,
        classes: Sequence[str] = (),
        replaced: Mapping[str, int] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Write tables and header, sync, check, and rename the set and its side files.

        An old set stays until the new one is complete on the disk, and is replaced in one step. If the
        process is killed, one of the two sets is valid, see ``valid_side_file``.

        Args:
            source: name of the source.
            classes: class names in label order.
            replaced: reason → number of images, as in the manifest.
            settings: options of the conversion.

        Raises:
            ValueError: if no image was added.
        """
        if self.count == 0:
            raise ValueError(f"there is no image to write to {self.path}")
        digest = finish_contents_hash(self._hasher, self._metadata[: self.count])
        self._write_tables(digest)
        manifest = Manifest(
            tier=self.tier,
            count=self.count,
            num_bytes=self._out.file.tell(),  # codespell:ignore tell
            sha256=digest,
            source=source,
            classes=tuple(classes),
            replaced=dict(replaced or {}),
            settings=dict(settings or {}),
        )
        self._out.sync()
        for side in (self._paths, self._skipped):
            side.sync()
            side.rename(pending_path(side.path))
        write_manifest(manifest, self.path, pending=True)
        written = open_beton(self._out.partial)
        assert (len(written), written.sha256) == (manifest.count, manifest.sha256), (
            "the file that was read back differs"
        )
        sync_folder(self.path.parent)
        self._out.rename()
        sync_folder(self.path.parent)
        settle_side_files(self.path)
        sync_folder(self.path.parent)
        self._stack.close()
        return manifest

    def discard(self) -> None:
        """Close and remove the temporary files; after ``commit`` do nothing."""
        self._stack.close()

    def _next_address(self, size: int) -> int:
        """Return the next address at which ``size`` bytes fit into one page.

        For a payload larger than a page, the page size of the whole file is doubled until it fits. Addresses
        already used stay valid, because every old page is within one new page.
        """
        while size > self.page_bytes:
            self.page_bytes *= 2
        room: int = self.page_bytes - self._end % self.page_bytes
        return self._end if size <= room else self._end + room

    def _write_tables(self, digest: str) -> None:
        table = np.zeros(self.count, TABLE_DTYPE)
        table["sample_id"] = np.arange(self.count)
        table["ptr"] = self._metadata["f0"]["data_ptr"][: self.count]
        table["size"] = self._sizes[: self.count]
        header = np.zeros(1, HEADER_DTYPE)
        header["version"], header["num_fields"] = VERSION, len(self._descriptors)
        header["page_size"], header["num_samples"] = self.page_bytes, self.count
        header["alloc_table_ptr"] = self._end
        # The hash is stored in the arguments of the label's field, which FFCV does not use.
        arguments = self._descriptors[1]["arguments"]
        arguments[:HASH_BYTES] = np.frombuffer(digest.encode("ascii"), np.uint8)
        file = self._out.file
        file.seek(0)
        file.write(header.tobytes() + self._descriptors.tobytes())
        file.write(self._metadata[: self.count].data.cast("B"))
        file.seek(self._end)
        file.write(table.data.cast("B"))

    def _field_descriptors(self) -> npt.NDArray[np.void]:
        fields = (("image", TYPE_PLANES if self.tier == "yuv420" else TYPE_IMAGE), ("label", TYPE_INT))
        descriptors = np.zeros(len(fields), FIELD_DTYPE)
        for descriptor, (name, type_id) in zip(descriptors, fields, strict=True):
            descriptor["type_id"] = type_id
            descriptor["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        return descriptors
