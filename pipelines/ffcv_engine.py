"""The ``ffcv`` backend: ``.beton`` files, each picture decoded once and every view cut out of that.

What is FFCV's here is the file format, which its own loader reads too (jpeg and raw tiers). Its loader keeps
Python objects for every picture, decodes once for each view, draws its own randomness and cannot resume in
the middle of an epoch; so pictures are decoded and cropped by :mod:`pipelines.jpeg_crops`. libturbojpeg is
asked for its accurate transform (FFCV's own decoder takes the fast one, off by up to 8 grey levels).

Shape letters: N pictures, V views, S side in pixels.
"""

import contextlib
import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.beton import MODE_JPEG, MODE_RAW, matching_manifest, open_beton
from pipelines.engines import Reading
from pipelines.jpeg_crops import NO_DECODER, crop_pictures, functions, pread_address, read_pieces
from pipelines.manifest import read_source_path
from pipelines.pictures import planes_to_rgb, read_rgb
from pipelines.resample import SLACK, crop_rgb, make_scratch
from pipelines.turbojpeg import check_jpeg


@dataclass(frozen=True)
class _Payloads:
    """Some pictures of the file; see :class:`pipelines.engines.Fetched`."""

    index_N: NDArray[np.int64]
    size_N2: NDArray[np.int64]
    mode_N: NDArray[np.uint8]
    data_C: NDArray[np.uint8]
    start_N: NDArray[np.int64]
    num_bytes_N: NDArray[np.int64]


class FFCVEngine:
    """Views from a ``.beton`` file."""

    name = "ffcv"

    def __init__(self, path: Path, reading: Reading = "auto") -> None:
        """Open the set.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a whole ``.beton`` file.
            ImportError: if FFCV or libturbojpeg is missing.
        """
        self._beton = open_beton(path)
        manifest = matching_manifest(self._beton)
        self.count = len(self._beton)
        self.classes = manifest.classes if manifest else ()
        self.fingerprint = manifest.sha256 if manifest else f"{self._beton.data.size} bytes"
        self._metadata = self._beton.metadata["f0"]
        if reading == "auto":
            reading = "read" if self._beton.data.size > 0.75 * _memory_bytes() else "map"
        self.reads_ahead = reading == "read"
        self._file = os.open(path, os.O_RDONLY) if self.reads_ahead else -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where the set has none."""
        labels_N: NDArray[np.int64] = self._beton.labels[index_N].reshape(len(index_N))
        return labels_N

    def picture_name(self, index: int) -> str:
        """The source path of picture ``index``."""
        name = read_source_path(self._beton.path, index)
        return name or f"picture {index} of {self._beton.path.name}"

    def fetch(self, index_N: NDArray[np.int64]) -> _Payloads:
        """Find the pictures in the mapped file, or read them.

        Raises:
            OSError: if the file cannot be read.
        """
        records = self._metadata[index_N]
        size_N2 = np.stack([records["height"], records["width"]], axis=1).astype(np.int64)
        address_N = records["data_ptr"].astype(np.int64)
        num_bytes_N = self._beton.sizes[index_N].astype(np.int64)
        mode_N = np.ascontiguousarray(records["mode"])
        if not self.reads_ahead:
            return _Payloads(index_N, size_N2, mode_N, self._beton.data, address_N, num_bytes_N)
        start_N = np.concatenate([[0], num_bytes_N.cumsum()[:-1]])
        data_C = np.empty(int(num_bytes_N.sum()) + SLACK, np.uint8)
        failed = read_pieces(pread_address(), self._file, address_N, num_bytes_N, start_N, data_C)
        if failed >= 0:
            self._explain(int(index_N[failed]), int(address_N[failed]), int(num_bytes_N[failed]))
        return _Payloads(index_N, size_N2, mode_N, data_C, start_N, num_bytes_N)

    def _explain(self, index: int, address: int, num_bytes: int) -> None:
        """Read a picture that could not be read once more, for the system's own reason."""
        got = len(os.pread(self._file, num_bytes, address))
        what = (
            "was cut short while it was read" if got < num_bytes else "could be read only at the second try"
        )
        raise OSError(
            f"{self._beton.path} {what}: picture {index}, {num_bytes} bytes at {address}; "
            "see to the disk, verify the set, and resume"
        )

    def crop(
        self, fetched: _Payloads, boxes_NV5: NDArray[np.int32], out_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Decode each picture once and write its crops; see :class:`pipelines.engines.Engine`."""
        status_N = np.empty(len(fetched.index_N), np.int64)
        crop_pictures(
            functions(),
            fetched.data_C,
            fetched.start_N,
            fetched.num_bytes_N,
            fetched.mode_N,
            fetched.size_N2,
            boxes_NV5,
            out_NVSS3,
            status_N,
        )
        if (status_N == NO_DECODER).any():
            raise MemoryError("TurboJPEG gave no decoder")
        ok_N: NDArray[np.bool_] = status_N == 0
        for n in np.flatnonzero(~ok_N):
            ok_N[n] = self._second_opinion(int(fetched.index_N[n]), boxes_NV5[n], out_NVSS3[n])
        return ok_N

    def _second_opinion(self, index: int, boxes_V5: NDArray[np.int32], out_VSS3: NDArray[np.uint8]) -> bool:
        """A picture that libturbojpeg complained of: sound if no pixel was lost, and PIL reads it too."""
        damaged = check_jpeg(self._beton.payload(index)).state == "damaged"
        picture = None if damaged else self.picture(index)
        record = self._metadata[index]
        if picture is None or picture.shape[:2] != (record["height"], record["width"]):
            return False
        pixels_C = np.concatenate([picture.reshape(-1), np.zeros(SLACK, np.uint8)])
        scratch = make_scratch(out_VSS3.shape[1], max(picture.shape))
        for box, out_SS3 in zip(boxes_V5, out_VSS3, strict=True):
            top, left, height, width, mirrored = (int(x) for x in box)
            whole = (top, left, height, width, mirrored)
            crop_rgb(pixels_C, picture.shape[1], whole, out_SS3.reshape(-1), scratch)
        return True

    def picture(self, index: int) -> NDArray[np.uint8] | None:
        """(H, W, 3) the whole picture, a JPEG by PIL; None where it cannot be decoded."""
        record, data = self._metadata[index], self._beton.payload(index)
        height, width = int(record["height"]), int(record["width"])
        if record["mode"] == MODE_JPEG:
            image = read_rgb(BytesIO(data.tobytes()))
            return None if image is None else np.asarray(image)
        if record["mode"] == MODE_RAW:
            return np.array(data).reshape(height, width, 3)
        return planes_to_rgb(data, height, width)


def _memory_bytes() -> int:
    """What this machine has, or this container may use where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
