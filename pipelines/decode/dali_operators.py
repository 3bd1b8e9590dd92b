"""DALI's graphs: encoded pictures in, pixels or crops out; and the pool that keeps them between calls.

Shape letters: N pictures, V views, S side in pixels.
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
    """How DALI decodes on a GPU; on a CPU none of it means anything."""

    region_decode: bool = False
    """Decode only the rectangle around a picture's crops instead of all of it. Saves most with small crops
    and baseline JPEGs on GPUs without a JPEG unit; which way is faster has not been measured here."""
    hw_decoder_load: float = 0.65
    """Share of the pictures for the GPU's JPEG unit where it has one, the rest goes to its cores. DALI's own
    default, and its advice is to try: the best share depends on the threads beside it."""
    hybrid_huffman_threshold: int = 1_000_000
    """Pictures of more pixels than this have their entropy decoding done by the GPU's cores too. DALI's own
    default."""

    def __post_init__(self) -> None:
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load is {self.hw_decoder_load}; it must lie in [0, 1]")
        if self.hybrid_huffman_threshold < 0:
            raise ValueError(
                f"hybrid_huffman_threshold is {self.hybrid_huffman_threshold} pixels; it must be at least 0"
            )


def import_dali() -> ModuleType:
    """Return ``nvidia.dali``. Raises ImportError, with the command that installs it, where it is missing."""
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.types
    except ImportError as error:
        raise ImportError(f"DALI is not installed ({error}). {INSTALL_DALI}") from error
    module: ModuleType = nvidia.dali
    return module


def decoding_graph(max_batch: int) -> Any:
    """A graph for one thread: encoded pictures → (H, W, 3) uint8 pixels, on the host.

    The accurate inverse transform, and upright by the EXIF tag: equal to PIL's pixels bit for bit.
    """
    dali = import_dali()
    fn, types = dali.fn, dali.types

    @dali.pipeline_def(  # type: ignore[untyped-decorator, unused-ignore]
        batch_size=max_batch, num_threads=1, device_id=None, exec_dynamic=True, prefetch_queue_depth=1
    )
    def graph() -> Any:
        encoded = fn.external_source(name=ENCODED, no_copy=True, dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)

    return _built(graph())


def cropping_graph(
    max_batch: int,
    num_views: int,
    crop_px: int,
    num_threads: int,
    device_id: int | None,
    options: DALIOptions,
) -> Any:
    """A graph that does all of it: encoded pictures and boxes → (N, 3) sizes, V lists of (N, S, S, 3) crops.

    On a GPU (``device_id``) decoding is mixed, as DALI calls it, and all that follows stays on the device;
    with None the same operators run on the host. Cut first, then resized: DALI's own region of interest in
    the resize lets pixels from outside of the box into its edges, up to 63 grey levels off.
    """
    dali = import_dali()
    fn, types = dali.fn, dali.types
    decode: dict[str, Any] = {"device": "cpu", "output_type": types.RGB}
    if device_id is not None:
        decode |= {
            "device": "mixed",
            # As the decoders on the host do it, so that both give the same pixels as far as they can.
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
            picture = fn.decoders.image_slice(
                encoded, start=window[:2], shape=window[2:], axes=[0, 1], **decode
            )
        else:
            picture = fn.decoders.image(encoded, **decode)
        views = (_view(fn, types, picture, boxes[v], mirrored[v], crop_px) for v in range(num_views))
        return fn.peek_image_shape(encoded), *views

    return _built(graph())


def _view(fn: Any, types: Any, picture: Any, box: Any, mirrored: Any, crop_px: int) -> Any:
    cut = fn.slice(picture, box[:2], box[2:4], axes=[0, 1])
    crop = fn.resize(cut, size=[crop_px, crop_px], antialias=True, interp_type=types.INTERP_LINEAR)
    return fn.flip(crop, horizontal=mirrored)


def _built(pipeline: Any) -> Any:
    pipeline.build()
    return pipeline


class Graphs:
    """Built graphs that wait for work; each is used by one thread at a time.

    A graph that has raised is not used again: DALI says of it that it is no longer valid.
    """

    def __init__(self, build: Callable[[int], Any]) -> None:
        """``build`` takes the largest batch that a graph must accept."""
        self._build, self._largest = build, 1
        self._waiting: list[tuple[int, Any]] = []
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._of_parent: list[tuple[int, Any]] = []

    @contextlib.contextmanager
    def one(self, batch: int) -> Iterator[Any]:
        """Lend a graph that takes a batch of this size, building it where none waits."""
        if os.getpid() != self._process:
            # The threads of the parent's graphs are not here; even their end would wait for them.
            self._lock, self._process = threading.Lock(), os.getpid()
            self._of_parent, self._waiting = self._waiting, []
        with self._lock:
            self._largest = max(self._largest, batch)
            small = [each for each in self._waiting if each[0] < self._largest]
            self._waiting = [each for each in self._waiting if each[0] >= self._largest]
            size, graph = self._waiting.pop() if self._waiting else (self._largest, None)
        del small  # outside of the lock: taking a graph down takes a while
        if graph is None:
            graph = self._build(size)
        yield graph
        with self._lock:
            self._waiting.append((size, graph))
