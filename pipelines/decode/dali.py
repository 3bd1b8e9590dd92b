"""The ``dali`` backend: NVIDIA's DALI decodes, with the same order and crop boxes as the other backends.

On a CPU, DALI's decoder is as fast as others and equals PIL's bit for bit, but its resize takes several times
as long as ours (see ``benchmarks/NOTES.md``). So DALI decodes whole images, and
:mod:`pipelines.kernels.resample` crops them. On a GPU, DALI decodes, crops, resizes and flips, and the crops
stay on the device.

Each call runs one DALI pipeline, here called a graph, on the calling thread. External sources feed it with
the images and boxes. DALI does not prefetch; the loader's workers do. DALI draws no random numbers, so views
do not depend on threads, batch size or where a run was resumed.

Shape letters: N images of a call, M some of them, V views, S side in pixels.
"""

import threading
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from torch import Tensor

from pipelines.decode.dali_operators import (
    BOXES,
    ENCODED,
    MIRRORED,
    WINDOW,
    DALIOptions,
    GraphPool,
    cropping_graph,
    decoding_graph,
    import_dali,
)
from pipelines.kernels.jpeg_crops import missing_table
from pipelines.kernels.resample import crop_image
from pipelines.sets import Encoded, PictureSet
from pipelines.sets.beton import MODE_JPEG

_DECODER = "fn.decoders.image"
"""The operator's name, which DALI's messages contain if decoding failed."""


class DALIDecoder:
    """Decodes with DALI on the CPU, crops with our own kernels; see :class:`pipelines.decode.Decoder`."""

    name = "dali"

    def __init__(self, picture_set: PictureSet) -> None:
        """Find DALI; graphs are built at the first call.

        Raises:
            ImportError: if DALI is missing.
            ValueError: if the set holds pixels or planes instead of encoded images.
        """
        import_dali()
        self._path = picture_set.path
        if (modes := picture_set.modes()) != (MODE_JPEG,):
            raise ValueError(
                f"{self._path} holds images of the modes {modes}, DALI decodes only the tier jpeg (mode "
                f"{MODE_JPEG}); choose backend ffcv, or convert with --tier jpeg"
            )
        self._decoders = GraphPool(decoding_graph)

    def crop(
        self, encoded: Encoded, boxes_NV5: NDArray[np.int32], out_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Decode each image once and write its crops; returns which images could be decoded.

        Truncated files and files that are not images are found here. If a JPEG is damaged inside its coded
        data, DALI prints a line on stderr but returns pixels; conversion and ``verify`` find such files.
        """
        ok_N = np.zeros(len(encoded.index_N), np.bool_)
        if len(row_M := _rows_with_own_tables(encoded)):
            self._crop_rows(row_M, encoded, boxes_NV5, out_NVSS3, ok_N)
        return ok_N

    def _crop_rows(
        self,
        row_M: NDArray[np.int64],
        encoded: Encoded,
        boxes_NV5: NDArray[np.int32],
        out_NVSS3: NDArray[np.uint8],
        ok_N: NDArray[np.bool_],
    ) -> None:
        """Crop some images. If DALI fails, retry with each half of them, down to single images."""
        contents = list(encoded)
        try:
            with self._decoders.take(len(row_M)) as graph:
                graph.feed_input(ENCODED, [contents[n] for n in row_M])
                (images,) = graph.run()
                for m, n in enumerate(row_M):
                    pixels_HW3 = np.asarray(images[m])
                    if pixels_HW3.shape[:2] == tuple(encoded.size_N2[n]):
                        crop_image(pixels_HW3, boxes_NV5[n], out_NVSS3[n])
                        ok_N[n] = True
        except RuntimeError as error:
            if _DECODER not in str(error):
                raise
            if len(row_M) > 1:
                for half_M in np.array_split(row_M, 2):
                    self._crop_rows(half_M, encoded, boxes_NV5, out_NVSS3, ok_N)


class DALIDeviceDecoder(DALIDecoder):
    """Decodes and crops with DALI on a GPU; see :class:`pipelines.decode.DeviceDecoder`."""

    def __init__(
        self, picture_set: PictureSet, device: torch.device, num_threads: int, options: DALIOptions
    ) -> None:
        """Find DALI; graphs are built at the first call.

        Args:
            picture_set: the set that will be decoded.
            device: a GPU with its number. With a CPU, the same operators run on the CPU.
            num_threads: CPU threads of each graph.
            options: of decoding on a GPU.

        Raises:
            ImportError: if DALI is missing.
            ValueError: if the set holds pixels or planes instead of encoded images.
        """
        super().__init__(picture_set)
        self._device, self._num_threads, self._options = device, num_threads, options
        self._streams = threading.local()
        self._croppers: dict[tuple[int, int], GraphPool] = {}

    def crop_on_device(
        self, encoded: Encoded, boxes_NV5: NDArray[np.int32], out_NVSS3: Tensor
    ) -> NDArray[np.bool_]:
        """Like ``crop``, but writes to a tensor on the device.

        Returns after the crops are written, so any stream may read them. If DALI fails, all images are
        decoded on the CPU to find the bad ones, and the good ones are cropped again on the device.
        """
        num_images = len(encoded.index_N)
        try:
            if len(row_M := _rows_with_own_tables(encoded)) == num_images:
                return self._crop_by_graph(row_M, encoded, boxes_NV5, out_NVSS3)
            ok_N = np.isin(np.arange(num_images), row_M)
        except RuntimeError as error:
            ok_N = self.crop(encoded, boxes_NV5, np.empty(out_NVSS3.shape, np.uint8))
            if ok_N.all():
                raise RuntimeError(
                    f"DALI cannot crop {len(ok_N)} images of {self._path} on {self._device}, but decodes all "
                    f"of them on the host (the first is image {encoded.index_N[0]}); try "
                    f"--dali.hw-decoder-load 0, smaller batches or --backend ffcv; {error}"
                ) from error
        if ok_N.any():
            ok_N[ok_N] = self._crop_by_graph(np.flatnonzero(ok_N), encoded, boxes_NV5, out_NVSS3)
        return ok_N

    def _crop_by_graph(
        self,
        row_M: NDArray[np.int64],
        encoded: Encoded,
        boxes_NV5: NDArray[np.int32],
        out_NVSS3: Tensor,
    ) -> NDArray[np.bool_]:
        """Crop some images with one graph; returns (M,) True where the size is that of the set's index."""
        num_views, crop_px = out_NVSS3.shape[1:3]
        contents, boxes_MV5 = list(encoded), boxes_NV5[row_M]
        with self._graphs(num_views, crop_px).take(len(row_M)) as graph:
            graph.feed_input(ENCODED, [contents[n] for n in row_M])
            if self._options.region_decode:
                window_M4 = _windows(boxes_MV5)
                graph.feed_input(WINDOW, window_M4)
                boxes_MV5 = boxes_MV5 - np.pad(window_M4[:, None, :2], ((0, 0), (0, 0), (0, 3)))
            graph.feed_input(BOXES, np.ascontiguousarray(boxes_MV5[:, :, :4]))
            graph.feed_input(MIRRORED, np.ascontiguousarray(boxes_MV5[:, :, 4]))
            size_M3 = self._run(graph, row_M, out_NVSS3)
        same_M: NDArray[np.bool_] = (size_M3[:, :2] == encoded.size_N2[row_M]).all(axis=1)
        return same_M

    def _run(self, graph: Any, row_M: NDArray[np.int64], out_NVSS3: Tensor) -> NDArray[np.int64]:
        """Run a graph and copy its crops on the device, by DLPack; returns (M, 3) sizes of the images."""
        stream = self._stream_of_thread()
        with torch.cuda.stream(stream):
            sizes, *views = graph.run(stream)
            every = len(row_M) == len(out_NVSS3)
            rows = slice(None) if every else torch.from_numpy(row_M).to(out_NVSS3.device)
            for v, crops in enumerate(views):
                out_NVSS3[rows, v] = torch.utils.dlpack.from_dlpack(crops.as_tensor())
        if stream is not None:
            stream.synchronize()
        size_M3: NDArray[np.int64] = np.asarray(sizes.as_tensor())
        return size_M3

    def _stream_of_thread(self) -> torch.cuda.Stream | None:
        """The CUDA stream of this thread. It is kept, because torch reuses its 32 streams in turn."""
        if self._device.type == "cuda" and not hasattr(self._streams, "stream"):
            self._streams.stream = torch.cuda.Stream(self._device)
        return getattr(self._streams, "stream", None)

    def _graphs(self, num_views: int, crop_px: int) -> GraphPool:
        device_id = self._device.index if self._device.type == "cuda" else None
        build = partial(
            cropping_graph,
            num_views=num_views,
            crop_px=crop_px,
            num_threads=self._num_threads,
            device_id=device_id,
            options=self._options,
        )
        return self._croppers.setdefault((num_views, crop_px), GraphPool(build))


def _rows_with_own_tables(encoded: Encoded) -> NDArray[np.int64]:
    """(M,) rows without JPEGs that lack a table, which DALI would decode with standard tables."""
    return np.flatnonzero([missing_table(content_C) == 0 for content_C in encoded])


def _windows(boxes_MV5: NDArray[np.int32]) -> NDArray[np.int32]:
    """(M, 4) top, left, height and width of the smallest rectangle around all boxes of an image."""
    first_M2 = boxes_MV5[:, :, :2].min(axis=1)
    stop_M2 = (boxes_MV5[:, :, :2] + boxes_MV5[:, :, 2:4]).max(axis=1)
    return np.concatenate([first_M2, stop_M2 - first_M2], axis=1).astype(np.int32)
