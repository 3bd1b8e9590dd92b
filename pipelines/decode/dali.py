"""The ``dali`` backend: DALI decodes, under our own order and boxes, so that its crops are everybody's.

On the host DALI's decoder is as fast as any and equal to PIL's bit for bit, but its resize takes several
times as long as ours (see ``benchmarks/NOTES.md``): so pictures come out of DALI, and views are cut by the
kernels of :mod:`pipelines.kernels.resample`. On a GPU decoding, cutting, resizing and flipping are DALI's,
and crops never see the host.

Each call runs one graph over the pictures it is given, fed by batch-mode external sources, on the thread
that calls; the loader's workers are the prefetching. Nothing is drawn in DALI: views do not depend on
threads, batch size or where a run was resumed.

Shape letters: N pictures, V views, S side in pixels.
"""

import threading
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
    Graphs,
    cropping_graph,
    decoding_graph,
    import_dali,
)
from pipelines.decode.payloads import Payloads
from pipelines.kernels.jpeg_crops import missing_table
from pipelines.kernels.resample import crop_picture
from pipelines.sets.beton import MODE_JPEG
from pipelines.sets.stores import Store, StoreEngine

# DALI's errors name the operator that raised.
_DECODER = "fn.decoders.image"


class DALIEngine(StoreEngine):
    """Views from JPEG files, and other encoded pictures, by DALI."""

    name = "dali"

    def __init__(
        self,
        store: Store,
        *,
        device: torch.device | None = None,
        num_threads: int = 1,
        options: DALIOptions | None = None,
    ) -> None:
        """Find DALI; graphs are built at the first call.

        Args:
            store: the compiled set.
            device: where crops are wanted by ``crop_on_device``; a GPU with its number.
            num_threads: of a graph whose crops stay on the device.
            options: of decoding on a GPU.

        Raises:
            ImportError: if DALI is missing.
            ValueError: if the set holds pixels or planes instead of encoded pictures.
        """
        super().__init__(store)
        import_dali()
        if (modes := store.modes()) != (MODE_JPEG,):
            raise ValueError(
                f"{store.path} holds pictures of the modes {modes}, DALI decodes only the tier jpeg (mode "
                f"{MODE_JPEG}); choose backend ffcv, or convert with --tier jpeg"
            )
        self._options, self._num_threads = options or DALIOptions(), num_threads
        self._device = device or torch.device("cpu")
        self._decoders = Graphs(decoding_graph)
        self._streams = threading.local()
        self._croppers: dict[tuple[int, int], Graphs] = {}

    def crop(
        self, fetched: Payloads, boxes_NV5: NDArray[np.int32], out_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Decode each picture once and write its crops; see :class:`pipelines.decode.decoder.Engine`.

        A JPEG damaged inside its coded data gives pixels and a line of DALI's on stderr, no error; converting
        and verifying find it. What is cut short, or no picture, is found here.
        """
        ok_N = np.zeros(len(fetched.index_N), np.bool_)
        encoded = list(fetched)
        if len(some_M := _with_own_tables(encoded)):
            self._crop_some(some_M, encoded, fetched, boxes_NV5, out_NVSS3, ok_N)
        return ok_N

    def _crop_some(
        self,
        some_M: NDArray[np.int64],
        encoded: list[NDArray[np.uint8]],
        fetched: Payloads,
        boxes_NV5: NDArray[np.int32],
        out_NVSS3: NDArray[np.uint8],
        ok_N: NDArray[np.bool_],
    ) -> None:
        """Crop the pictures ``some_M``. Where DALI refuses, halves of them, down to the ones it means."""
        try:
            with self._decoders.one(len(some_M)) as graph:
                graph.feed_input(ENCODED, [encoded[n] for n in some_M])
                (pictures,) = graph.run()
                for place, n in enumerate(some_M):
                    picture_HW3 = np.asarray(pictures[place])
                    if picture_HW3.shape[:2] == tuple(fetched.size_N2[n]):
                        crop_picture(picture_HW3, boxes_NV5[n], out_NVSS3[n])
                        ok_N[n] = True
        except RuntimeError as error:
            if _DECODER not in str(error):
                raise
            if len(some_M) > 1:
                for half_M in np.array_split(some_M, 2):
                    self._crop_some(half_M, encoded, fetched, boxes_NV5, out_NVSS3, ok_N)

    def crop_on_device(
        self, fetched: Payloads, boxes_NV5: NDArray[np.int32], out_NVSS3: Tensor
    ) -> NDArray[np.bool_]:
        """Like ``crop``, by DALI's operators alone, into a tensor on the device.

        Returns when the crops are written, whatever stream is used next. Where DALI refuses, the decoder on
        the host tells which pictures are to blame, and the others are done again without them.
        """
        num_pictures, encoded = len(fetched.index_N), list(fetched)
        try:
            if len(every_N := _with_own_tables(encoded)) == num_pictures:
                return self._run(every_N, fetched, encoded, boxes_NV5, out_NVSS3)
            ok_N = np.isin(np.arange(num_pictures), every_N)
        except RuntimeError as error:
            ok_N = self.crop(fetched, boxes_NV5, np.empty(out_NVSS3.shape, np.uint8))
            if ok_N.all():
                raise RuntimeError(
                    f"DALI cannot crop {len(ok_N)} pictures of {self.store.path} on {self._device}, all of "
                    f"which the host decodes (the first is picture {fetched.index_N[0]}); try "
                    f"--dali.hw-decoder-load 0, smaller batches or --backend ffcv; {error}"
                ) from error
        if ok_N.any():
            ok_N[ok_N] = self._run(np.flatnonzero(ok_N), fetched, encoded, boxes_NV5, out_NVSS3)
        return ok_N

    def _run(
        self,
        some_M: NDArray[np.int64],
        fetched: Payloads,
        encoded: list[NDArray[np.uint8]],
        boxes_NV5: NDArray[np.int32],
        out_NVSS3: Tensor,
    ) -> NDArray[np.bool_]:
        """Crop the pictures ``some_M`` by one graph; (M,) which of them have the size that the index says."""
        num_views, crop_px = out_NVSS3.shape[1:3]
        boxes_MV5 = boxes_NV5[some_M]
        with self._cropper(num_views, crop_px).one(len(some_M)) as graph:
            graph.feed_input(ENCODED, [encoded[n] for n in some_M])
            if self._options.region_decode:
                window_M4 = _windows(boxes_MV5)
                graph.feed_input(WINDOW, window_M4)
                boxes_MV5 = boxes_MV5 - np.pad(window_M4[:, None, :2], ((0, 0), (0, 0), (0, 3)))
            graph.feed_input(BOXES, np.ascontiguousarray(boxes_MV5[:, :, :4]))
            graph.feed_input(MIRRORED, np.ascontiguousarray(boxes_MV5[:, :, 4]))
            shapes = self._hand_over(graph, some_M, out_NVSS3)
        right_M: NDArray[np.bool_] = (shapes[:, :2] == fetched.size_N2[some_M]).all(axis=1)
        return right_M

    def _hand_over(self, graph: Any, some_M: NDArray[np.int64], out_NVSS3: Tensor) -> NDArray[np.int64]:
        """Run a graph and take its crops over, by DLPack: no copy through the host. Returns the sizes."""
        stream = self._stream_of_thread()
        with torch.cuda.stream(stream):
            shapes, *views = graph.run(stream)
            whole = len(some_M) == len(out_NVSS3)
            rows = slice(None) if whole else torch.from_numpy(some_M).to(out_NVSS3.device)
            for v, crops in enumerate(views):
                out_NVSS3[rows, v] = torch.utils.dlpack.from_dlpack(crops.as_tensor())
        if stream is not None:
            stream.synchronize()
        sizes: NDArray[np.int64] = np.asarray(shapes.as_tensor())
        return sizes

    def _stream_of_thread(self) -> torch.cuda.Stream | None:
        """One for each thread: torch gives out 32 in turn, so a new one is soon another's."""
        if self._device.type == "cuda" and not hasattr(self._streams, "one"):
            self._streams.one = torch.cuda.Stream(self._device)
        return getattr(self._streams, "one", None)

    def _cropper(self, num_views: int, crop_px: int) -> Graphs:
        device_id = self._device.index if self._device.type == "cuda" else None
        return self._croppers.setdefault(
            (num_views, crop_px),
            Graphs(
                lambda largest: cropping_graph(
                    largest, num_views, crop_px, self._num_threads, device_id, self._options
                )
            ),
        )


def _with_own_tables(encoded: list[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """Which pictures are not JPEGs that lack a table; DALI would decode such a one with standard tables."""
    return np.flatnonzero([missing_table(picture_C) == 0 for picture_C in encoded])


def _windows(boxes_MV5: NDArray[np.int32]) -> NDArray[np.int32]:
    """(M, 4) top, left, height, width of the smallest rectangle around all boxes of a picture."""
    first_M2 = boxes_MV5[:, :, :2].min(axis=1)
    stop_M2 = (boxes_MV5[:, :, :2] + boxes_MV5[:, :, 2:4]).max(axis=1)
    return np.concatenate([first_M2, stop_M2 - first_M2], axis=1).astype(np.int32)
