"""DALI's graphs (pipelines), from encoded images to pixels or crops, and a pool that keeps them for reuse.

Shape letters: N images, V views, S side in pixels.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

INSTALL_DALI = "`make setup` installs it; by hand: pip install -e '.[dali]' --constraint constraints.txt"

ENCODED, WINDOW, BOXES, MIRRORED = "encoded", "window", "boxes", "mirrored"
"""Names of the graphs' inputs."""


@dataclass(frozen=True)
class DALIOptions:
    """How DALI decodes on a GPU. The options have no effect on a CPU."""

    region_decode: bool = False
    """Decode only the rectangle around the crops of an image. This may be faster with small crops and
    baseline JPEGs on GPUs without a JPEG unit. It has not been measured here."""
    hw_decoder_load: float = 0.65
    """Share of the images that the GPU's JPEG unit decodes, if it has one; its cores decode the rest. 0.65 is
    DALI's default. Its documentation recommends tuning it, because the best value depends on the number of
    threads."""
    hybrid_huffman_threshold: int = 1_000_000
    """For images with more pixels than this, the GPU's cores do the entropy decoding too. 1,000,000 is DALI's
    default."""

    def __post_init__(self) -> None:
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load is {self.hw_decoder_load}; it must lie in [0, 1]")
        if self.hybrid_huffman_threshold < 0:
            raise ValueError(
                f"hybrid_huffman_threshold is {self.hybrid_huffman_threshold} pixels; it must be at least 0"
            )


def import_dali() -> ModuleType:
    """Import ``nvidia.dali``. If it is missing, raises ImportError with the command that installs it."""
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.types
    except ImportError as error:
        raise ImportError(f"DALI is not installed ({error}). {INSTALL_DALI}") from error
    module: ModuleType = nvidia.dali
    return module


def decoding_graph(max_batch: int) -> Any:
    """Build a graph with one thread: encoded images → (H, W, 3) uint8 pixels, on the CPU.

    Images are rotated by their EXIF tag. They equal PIL's bit for bit.

    Args:
        max_batch: largest number of images of a call.
    """
    dali = import_dali()
    fn, types = dali.fn, dali.types

    @dali.pipeline_def(  # type: ignore[untyped-decorator, unused-ignore]
        batch_size=max_batch, num_threads=1, device_id=None, exec_dynamic=True, prefetch_queue_depth=1
    )
    def graph() -> Any:
        encoded = fn.external_source(name=ENCODED, no_copy=True, dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)

    return _build_pipeline(graph())


def cropping_graph(
    max_batch: int,
    num_views: int,
    crop_px: int,
    num_threads: int,
    device_id: int | None,
    options: DALIOptions,
) -> Any:
    """Build a graph of all steps: encoded images and boxes → (N, 3) sizes, V lists of (N, S, S, 3) crops.

    The graph crops first and then resizes. DALI's resize with a region of interest would also use pixels from
    outside the box, which changes the edges of a view by up to 63 grey levels.

    Args:
        max_batch: largest number of images of a call.
        num_views: V.
        crop_px: S.
        num_threads: CPU threads of the graph.
        device_id: number of a GPU; None runs the same operators on the CPU.
        options: of decoding on a GPU.
    """
    dali = import_dali()
    fn, types = dali.fn, dali.types
    decode: dict[str, Any] = {"device": "cpu", "output_type": types.RGB}
    if device_id is not None:
        decode |= {
            "device": "mixed",
            # As on the CPU, so that the pixels differ as little as possible.
            "jpeg_fancy_upsampling": True,
            "hw_decoder_load": options.hw_decoder_load,
            "hybrid_huffman_threshold": options.hybrid_huffman_threshold,
        }

    @dali.pipeline_def(  # type: ignore[untyped-decorator, unused-ignore]
        batch_size=max_batch,
        num_threads=num_threads,
        device_id=device_id,
        exec_dynamic=True,
        prefetch_queue_depth=1,
    )
    def graph() -> tuple[Any, ...]:
        encoded = fn.external_source(name=ENCODED, no_copy=True, dtype=types.UINT8, ndim=1)
        boxes = fn.external_source(name=BOXES, dtype=types.INT32, ndim=2)
        mirrored = fn.external_source(name=MIRRORED, dtype=types.INT32, ndim=1)
        if options.region_decode:
            window = fn.external_source(name=WINDOW, dtype=types.INT32, ndim=1)
            image = fn.decoders.image_slice(
                encoded, start=window[:2], shape=window[2:], axes=[0, 1], **decode
            )
        else:
            image = fn.decoders.image(encoded, **decode)
        views = (_view(fn, types, image, boxes[v], mirrored[v], crop_px) for v in range(num_views))
        return fn.peek_image_shape(encoded), *views

    return _build_pipeline(graph())


def _view(fn: Any, types: Any, image: Any, box: Any, mirrored: Any, crop_px: int) -> Any:
    cut = fn.slice(image, box[:2], box[2:4], axes=[0, 1])
    crop = fn.resize(cut, size=[crop_px, crop_px], antialias=True, interp_type=types.INTERP_LINEAR)
    return fn.flip(crop, horizontal=mirrored)


def _build_pipeline(pipeline: Any) -> Any:
    pipeline.build()
    return pipeline


class GraphPool:
    """Built graphs that are not in use. A graph is used by one thread at a time.

    A graph that has raised an error is dropped, because DALI does not allow using it again.
    """

    def __init__(self, build: Callable[[int], Any]) -> None:
        """Start empty; ``build`` builds a graph for batches of up to a given size."""
        self._build, self._largest = build, 1
        self._idle: list[tuple[int, Any]] = []
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._inherited: list[tuple[int, Any]] = []

    @contextlib.contextmanager
    def take(self, batch: int) -> Iterator[Any]:
        """Yield a graph for a batch of this size; a new one is built if none is idle."""
        if os.getpid() != self._process:
            # The process was forked, and the threads of these graphs exist only in the parent. Deleting a
            # graph would wait for its threads, so the graphs are kept but not used.
            self._lock, self._process = threading.Lock(), os.getpid()
            self._inherited, self._idle = self._idle, []
        with self._lock:
            self._largest = max(self._largest, batch)
            small = [each for each in self._idle if each[0] < self._largest]
            self._idle = [each for each in self._idle if each[0] >= self._largest]
            size, graph = self._idle.pop() if self._idle else (self._largest, None)
        del small  # outside the lock, because destroying a graph takes a while
        if graph is None:
            graph = self._build(size)
        yield graph
        with self._lock:
            self._idle.append((size, graph))
