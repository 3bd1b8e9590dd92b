"""The ``ffcv`` backend: an FFCV operator that decodes each JPEG once and cuts every view out of it.

The operator is driven here and not by ``ffcv.Loader``, which keeps Python objects for every picture, draws
its own randomness and cannot resume in the middle of an epoch. What is FFCV's: the file format, the operator
interface, the memory reader and the compiler. Pixels come from libturbojpeg's accurate transform (FFCV's own
decoder asks for the fast one, off by up to 8 grey levels), so decoded pictures equal PIL's exactly.

Shape letters: N batch, V views, S side in pixels, H, W of the decoded picture.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.beton import MODE_JPEG, import_ffcv, matching_manifest, open_beton
from pipelines.cores import set_numba_threads
from pipelines.manifest import read_source_path
from pipelines.pictures import read_rgb
from pipelines.resample import resample_crop
from pipelines.turbojpeg import check_jpeg, library

import_ffcv()

from ffcv.fields.rgb_image import SimpleRGBImageDecoder  # noqa: E402
from ffcv.memory_managers.os_cache import OSCacheManager  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402


class MultiViewDecoder(SimpleRGBImageDecoder):
    """FFCV operator: one decode, V antialiased crops.

    Its memory is (views (V, S, S, 3) uint8, boxes (V, 4) int32, status int32) for each sample of a batch.
    Boxes are written by the caller before the operator runs; status is 0 for a sound picture and
    libturbojpeg's return code otherwise. Scratch memory is one decoded picture per thread.
    """

    def __init__(self, num_views: int = 2, crop_px: int = 224) -> None:
        super().__init__()
        self.num_views, self.crop_px = num_views, crop_px

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        """FFCV's declaration: the shape that comes out and the memory that is needed."""
        shape = (self.num_views, self.crop_px, self.crop_px, 3)
        uint8, int32 = np.dtype("<u1"), np.dtype("<i4")
        return (
            replace(previous_state, jit_mode=True, shape=shape, dtype=uint8),
            (
                AllocationQuery(shape, uint8),
                AllocationQuery((self.num_views, 4), int32),
                AllocationQuery((), int32),
            ),
        )

    def generate_code(self) -> Callable[..., Any]:
        """The function that FFCV's compiler turns into machine code."""
        memory_read = self.memory_read
        thread_range, num_threads = Compiler.get_iterator(), Compiler.num_threads
        turbojpeg = library()
        init, decompress, destroy = (
            turbojpeg.tjInitDecompress,
            turbojpeg.tjDecompress2,
            turbojpeg.tjDestroy,
        )

        def crop_views(batch_indices, memory, metadata, storage_state):  # type: ignore[no-untyped-def]
            views_NVSS3, boxes_NV4, status_N = memory
            num = len(batch_indices)
            max_pixels = np.int64(0)
            for n in range(num):
                record = metadata[batch_indices[n]]
                num_pixels = np.int64(record["height"]) * np.int64(record["width"])
                max_pixels = num_pixels if num_pixels > max_pixels else max_pixels
            for thread in thread_range(num_threads):
                pixels = np.empty(3 * max_pixels, np.uint8)
                handle = init()
                for n in range(thread * num // num_threads, (thread + 1) * num // num_threads):
                    record = metadata[batch_indices[n]]
                    data = memory_read(record["data_ptr"], storage_state)
                    height, width = np.int64(record["height"]), np.int64(record["width"])
                    status_N[n] = 0
                    if record["mode"] == MODE_JPEG:
                        picture_HW3 = pixels[: 3 * height * width].reshape((height, width, 3))
                        status_N[n] = decompress(
                            handle, data.ctypes.data, data.size, pixels.ctypes.data, width, 0, height, 0, 0
                        )
                    else:
                        picture_HW3 = data[: 3 * height * width].reshape((height, width, 3))
                    if status_N[n] == 0:
                        for v in range(views_NVSS3.shape[1]):
                            top, left, box_height, box_width = boxes_NV4[n, v]
                            resample_crop(picture_HW3, top, left, box_height, box_width, views_NVSS3[n, v])
                destroy(handle)
            return views_NVSS3[:num]

        crop_views.is_parallel = True  # type: ignore[attr-defined]
        return crop_views


class _Reader(OSCacheManager):
    """FFCV's mapped-file reader without its table of Python objects for every picture."""

    def __init__(self) -> None:
        pass


@lru_cache
def _compile(num_threads: int) -> Callable[..., Any]:
    """The operator's machine code; one for all sets, views and sizes."""
    Compiler.num_threads = num_threads
    decoder = MultiViewDecoder()
    decoder.accept_globals(None, _Reader().compile_reader())
    code: Callable[..., Any] = Compiler.compile(decoder.generate_code())
    return code


class FFCVEngine:
    """Views from a ``.beton`` file through :class:`MultiViewDecoder`."""

    name = "ffcv"

    def __init__(self, path: Path, num_threads: int) -> None:
        """Open the set. Compiling the operator takes some seconds, at the first batch.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a whole ``.beton`` file.
            ImportError: if FFCV or libturbojpeg is missing.
        """
        self._beton = open_beton(path)
        manifest = matching_manifest(self._beton)
        self.count = len(self._beton)
        self.classes = manifest.classes if manifest else ()
        self._metadata = self._beton.metadata["f0"]
        self._num_threads = num_threads
        # FFCV's reader looks sizes up by address.
        order = np.argsort(self._metadata["data_ptr"])
        addresses = self._metadata["data_ptr"][order], self._beton.sizes[order]
        self._storage_state = (self._beton.data, *addresses)

    def labels(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) labels, −1 where the set has none."""
        labels_N: NDArray[np.int64] = self._beton.labels[index_N].reshape(len(index_N))
        return labels_N

    def picture_name(self, index: int) -> str:
        """The source path of picture ``index``."""
        name = read_source_path(self._beton.path, index)
        return name or f"picture {index} of {self._beton.path.name}"

    def sizes(self, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N, 2) heights and widths in pixels."""
        records = self._metadata[index_N]
        return np.stack([records["height"], records["width"]], axis=1).astype(np.int64)

    def crop(
        self, index_N: NDArray[np.int64], boxes_NV4: NDArray[np.int32], out_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Decode each picture once and write its crops; see :class:`pipelines.engines.Engine`."""
        code = _compile(self._num_threads)
        set_numba_threads(self._num_threads)
        status_N = np.empty(len(index_N), np.int32)
        memory = (out_NVSS3, boxes_NV4, status_N)
        code(index_N.astype(np.uint64), memory, self._metadata, self._storage_state)
        ok_N: NDArray[np.bool_] = status_N == 0
        for n in np.flatnonzero(~ok_N):
            ok_N[n] = self._second_opinion(int(index_N[n]), boxes_NV4[n], out_NVSS3[n])
        return ok_N

    def _second_opinion(self, index: int, boxes_V4: NDArray[np.int32], out_VSS3: NDArray[np.uint8]) -> bool:
        """A picture that libturbojpeg complained of: sound if no pixel was lost, and PIL reads it too."""
        damaged = check_jpeg(self._beton.payload(index)).state == "damaged"
        picture = None if damaged else self.picture(index)
        if picture is None or picture.shape[:2] != tuple(self.sizes(np.array([index]))[0]):
            return False
        for box, out_SS3 in zip(boxes_V4, out_VSS3, strict=True):
            resample_crop(picture, *(int(x) for x in box), out_SS3)
        return True

    def picture(self, index: int) -> NDArray[np.uint8] | None:
        """(H, W, 3) the whole picture by PIL; None where it cannot be decoded."""
        record, data = self._metadata[index], self._beton.payload(index)
        if record["mode"] != MODE_JPEG:
            return np.array(data).reshape(int(record["height"]), int(record["width"]), 3)
        image = read_rgb(BytesIO(data.tobytes()))
        return None if image is None else np.asarray(image)
