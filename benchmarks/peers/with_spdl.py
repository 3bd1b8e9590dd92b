"""SPDL's pipeline of threads, with its own FFmpeg filters and with torchvision's operators.

Shape letters: N batch, V views, S side in pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import spdl.io
import torch
from numpy.typing import NDArray
from spdl.pipeline import PipelineBuilder
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2

from benchmarks.peers import contract
from benchmarks.peers.contract import FixedCrops, Job, Peer, PeerWork, shuffled_batches
from benchmarks.peers.with_torchvision import decode_file, fixed_crops, v2_crop, v2_recipe
from pipelines.recipe import Recipe

_BATCHES_AHEAD = 3
_Load = Callable[[list[Path]], Tensor]

try:
    # SPDL looks for FFmpeg's libraries at its first use, which would be in the middle of a pipeline.
    spdl.io.utils.get_ffmpeg_versions()
except RuntimeError as error:
    raise ImportError(f"SPDL finds no FFmpeg libraries; `apt-get install ffmpeg`; {error}") from error


def _run(make_load: Callable[[Recipe], _Load], job: Job) -> Iterator[object]:
    """Run a pipeline in which each thread loads whole batches, as SPDL's documentation does."""
    # Torch's operators must not start threads of their own inside the pipeline's threads.
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


def _cut(packets: Any, boxes: Sequence[Sequence[int]], crop_px: int) -> Any:
    """Decode, and in one filter graph crop the planes at the V boxes, resize, stack and convert to RGB."""
    num = len(boxes)
    cuts = ";".join(
        f"[in{v}]crop={width}:{height}:{left}:{top}:exact=1,scale={crop_px}:{crop_px}:flags=bilinear[out{v}]"
        for v, (top, left, height, width) in enumerate(boxes)
    )
    inputs, outputs = ("".join(f"[{end}{v}]" for v in range(num)) for end in ("in", "out"))
    graph = f"split={num}{inputs};{cuts};{outputs}vstack=inputs={num},format=pix_fmts=rgb24"
    return spdl.io.decode_packets(packets, filter_desc=graph)


def _by_ffmpeg(recipe: Recipe) -> _Load:
    scale, ratio = list(recipe.crop_scale), list(recipe.crop_ratio)

    def cut(file: Path) -> object:
        packets = spdl.io.demux_image(str(file))
        # get_params reads only the size of the image.
        image = torch.empty((3, packets.codec.height, packets.codec.width), device="meta")
        boxes = [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(recipe.num_views)]
        return _cut(packets, boxes, recipe.crop_px)

    def load(files: list[Path]) -> Tensor:
        crops: Tensor = spdl.io.to_torch(spdl.io.convert_frames([cut(file) for file in files]))
        return crops.view(len(files), recipe.num_views, recipe.crop_px, recipe.crop_px, 3)

    return load


def _ffmpeg_fixed_crops(fixed: FixedCrops) -> NDArray[np.uint8]:
    crops = []
    for file, boxes_V4 in zip(fixed.files, fixed.boxes_NV4.tolist(), strict=True):
        frame = _cut(spdl.io.demux_image(str(file)), boxes_V4, fixed.crop_px)
        crops.append(np.array(spdl.io.to_numpy(spdl.io.convert_frames(frame))))
    side = fixed.crop_px
    return np.stack(crops).reshape(*fixed.boxes_NV4.shape[:2], side, side, 3)


def _by_torchvision(make: Callable[[Recipe], v2.Transform], dtype: torch.dtype, recipe: Recipe) -> _Load:
    transform = make(recipe)

    def load(files: list[Path]) -> Tensor:
        shape = (len(files), recipe.num_views, 3, recipe.crop_px, recipe.crop_px)
        views_NV3SS = torch.empty(shape, dtype=dtype)
        for views_V3SS, image in zip(views_NV3SS, map(decode_file, files), strict=True):
            for view_3SS in views_V3SS:
                view_3SS[:] = transform(image)
        return views_NV3SS

    return load


def _work(make_load: Callable[[Recipe], _Load], how: str) -> PeerWork:
    how = f"spdl.pipeline.PipelineBuilder, each of its threads loads whole batches with {how}"
    # The sink, the queues before it, and one finished batch in each thread: as counted on a full pipeline.
    return PeerWork(partial(_run, make_load), how, queued=_BATCHES_AHEAD + 3, queued_per_thread=1)


_FFMPEG = (
    "spdl.io: demux, one decode by FFmpeg, one filter graph that crops both views out of the planes with the "
    "bilinear scaler and converts them to RGB"
)
_NO_RECIPE = (
    f"spdl.io has no photometric operators; SPDL's recipe is measured as {contract.SPDL_TORCHVISION!r}"
)
_V2 = "torchvision.io.decode_jpeg once for both views and torchvision.transforms.v2"
PEERS = [
    Peer(contract.SPDL_FFMPEG, _work(_by_ffmpeg, _FFMPEG), _NO_RECIPE, _ffmpeg_fixed_crops),
    Peer(
        contract.SPDL_TORCHVISION,
        _work(partial(_by_torchvision, v2_crop, torch.uint8), _V2),
        _work(partial(_by_torchvision, v2_recipe, torch.float32), _V2),
        partial(fixed_crops, decode_file),
    ),
]
