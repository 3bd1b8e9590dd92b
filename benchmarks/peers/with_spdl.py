"""SPDL's pipeline of threads, with its own FFmpeg filters and with torchvision's operators.

Shape letters: N batch, V views, S side in pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import spdl.io
import torch
from numpy.typing import NDArray
from spdl.pipeline import PipelineBuilder
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2

from benchmarks.peers.contract import SPDL_FFMPEG, SPDL_TORCHVISION, FixedCrops, Job, Peer, Work
from benchmarks.peers.shuffled import shuffled_batches
from benchmarks.peers.with_torchvision import decode_file, v2_crop, v2_fixed_crops, v2_recipe
from pipelines.recipe import Recipe

_BATCHES_AHEAD = 3
Box = Sequence[int]
"""Top, left, height, width in pixels."""
_Load = Callable[[list[Path]], Tensor]

try:
    # SPDL finds FFmpeg's libraries at its first use, which would be in the middle of a pipeline.
    spdl.io.utils.get_ffmpeg_versions()
except RuntimeError as error:
    raise ImportError(
        f"SPDL finds no FFmpeg libraries, `apt-get install ffmpeg` brings them; {error}"
    ) from error


def _run(make_load: Callable[[Recipe], _Load], job: Job) -> Iterator[object]:
    """Batches by a pipeline whose threads each load a whole batch, as SPDL's documentation does."""
    # Operators of torch must not start threads of their own inside the pipeline's threads.
    executor = ThreadPoolExecutor(job.num_threads, initializer=torch.set_num_threads, initargs=(1,))
    pipeline = (
        PipelineBuilder()
        .add_source(shuffled_batches(job.folder, job.batch_size))
        .pipe(make_load(job.recipe), concurrency=job.num_threads, executor=executor)
        .add_sink(_BATCHES_AHEAD)
        .build(num_threads=job.num_threads, max_failures=0)
    )
    with executor, pipeline.auto_stop():
        yield from pipeline.get_iterator()


def _filters(boxes: Sequence[Box], crop_px: int) -> str:
    """A filter graph of FFmpeg: the decoded planes are cut V times, reduced, stacked and made RGB."""
    cuts = ";".join(
        f"[in{v}]crop={width}:{height}:{left}:{top}:exact=1,scale={crop_px}:{crop_px}:flags=bilinear[out{v}]"
        for v, (top, left, height, width) in enumerate(boxes)
    )
    inputs = "".join(f"[in{v}]" for v in range(len(boxes)))
    outputs = "".join(f"[out{v}]" for v in range(len(boxes)))
    num = len(boxes)
    return f"split={num}{inputs};{cuts};{outputs}vstack=inputs={num},format=pix_fmts=rgb24"


def _ffmpeg_crops(recipe: Recipe) -> _Load:
    scale, ratio = list(recipe.crop_scale), list(recipe.crop_ratio)

    def cut(file: Path) -> object:
        packets = spdl.io.demux_image(str(file))
        # Of the picture only the size is looked at.
        picture = torch.empty((3, packets.codec.height, packets.codec.width), device="meta")
        boxes = [RandomResizedCrop.get_params(picture, scale, ratio) for _ in range(recipe.num_views)]
        return spdl.io.decode_packets(packets, filter_desc=_filters(boxes, recipe.crop_px))

    def load(files: list[Path]) -> Tensor:
        crops: Tensor = spdl.io.to_torch(spdl.io.convert_frames([cut(file) for file in files]))
        return crops.view(len(files), recipe.num_views, recipe.crop_px, recipe.crop_px, 3)

    return load


def _by_torchvision(
    make_transform: Callable[[Recipe], v2.Transform], dtype: torch.dtype, recipe: Recipe
) -> _Load:
    transform = make_transform(recipe)

    def load(files: list[Path]) -> Tensor:
        shape = (len(files), recipe.num_views, 3, recipe.crop_px, recipe.crop_px)
        views_NV3SS = torch.empty(shape, dtype=dtype)
        for n, file in enumerate(files):
            picture = decode_file(file)
            for v in range(recipe.num_views):
                views_NV3SS[n, v] = transform(picture)
        return views_NV3SS

    return load


def ffmpeg_fixed_crops(asked: FixedCrops) -> NDArray[np.uint8]:
    """Crops by the filter graph; see :class:`FixedCrops`."""
    crops_NVSS3 = asked.empty()
    for n, file in enumerate(asked.files):
        filters = _filters(asked.boxes_NV4[n].tolist(), asked.crop_px)
        frame = spdl.io.decode_packets(spdl.io.demux_image(str(file)), filter_desc=filters)
        crops_NVSS3[n] = spdl.io.to_numpy(spdl.io.convert_frames(frame)).reshape(crops_NVSS3[n].shape)
    return crops_NVSS3


# The sink, the queues before it, and what each thread has finished and holds: as counted on a full pipeline.
_QUEUED, _QUEUED_PER_THREAD = _BATCHES_AHEAD + 3, 1
_SETUP = "spdl.pipeline.PipelineBuilder, each of its threads loads whole batches"
_TORCHVISION = f"{_SETUP} with torchvision.io.decode_jpeg once for both views and torchvision.transforms.v2"
PEERS = [
    Peer(
        SPDL_FFMPEG,
        crops=Work(
            partial(_run, _ffmpeg_crops),
            f"{_SETUP} with spdl.io: demux, one decode by FFmpeg, one filter graph that cuts both views out "
            "of the planes with the bilinear scaler and makes them RGB",
            queued=_QUEUED,
            queued_per_thread=_QUEUED_PER_THREAD,
        ),
        recipe=f"spdl.io has no photometric operators; SPDL's recipe is measured as {SPDL_TORCHVISION!r}",
        fixed_crops=ffmpeg_fixed_crops,
        antialiased=True,
    ),
    Peer(
        SPDL_TORCHVISION,
        crops=Work(
            partial(_run, partial(_by_torchvision, v2_crop, torch.uint8)),
            _TORCHVISION,
            queued=_QUEUED,
            queued_per_thread=_QUEUED_PER_THREAD,
        ),
        recipe=Work(
            partial(_run, partial(_by_torchvision, v2_recipe, torch.float32)),
            _TORCHVISION,
            queued=_QUEUED,
            queued_per_thread=_QUEUED_PER_THREAD,
        ),
        fixed_crops=v2_fixed_crops,
        antialiased=True,
    ),
]
