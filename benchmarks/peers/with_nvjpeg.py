"""torchvision on a GPU: nvJPEG decodes whole batches, v2 transforms the pictures where they are.

Shape letters: N batch, V views, S side in pixels.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import io
from torchvision.transforms import v2

from benchmarks.peers.contract import TORCHVISION_GPU, FixedCrops, Job, Peer, Work, settle
from benchmarks.peers.shuffled import shuffled_batches
from benchmarks.peers.with_torchvision import cut_pictures, v2_crop, v2_recipe
from pipelines.recipe import Recipe

_BATCHES_AHEAD = 2


def _decode(encoded: list[Tensor], device: torch.device) -> list[Tensor]:
    """(3, H, W) uint8 pictures; as a list, which torchvision documents as faster than one at a time."""
    pictures: list[Tensor] = io.decode_jpeg(encoded, mode=io.ImageReadMode.RGB, device=device)
    return pictures


def _read_ahead(job: Job) -> Iterator[list[Tensor]]:
    """Encoded batches, read by threads while others are decoded."""

    def read(files: list[Path]) -> list[Future[Tensor]]:
        return [pool.submit(io.read_file, str(file)) for file in files]

    with ThreadPoolExecutor(job.num_threads) as pool:
        batches = shuffled_batches(job.folder, job.batch_size)
        ahead = deque(read(files) for files in islice(batches, _BATCHES_AHEAD))
        for files in batches:
            ahead.append(read(files))
            yield [encoded.result() for encoded in ahead.popleft()]


def _run(
    make_transform: Callable[[Recipe], v2.Transform], device: torch.device, job: Job
) -> Iterator[object]:
    """(N, V, 3, S, S) views on the device."""
    transform = make_transform(job.recipe)
    for encoded in _read_ahead(job):
        views = [
            transform(picture) for picture in _decode(encoded, device) for _ in range(job.recipe.num_views)
        ]
        yield torch.stack(views).unflatten(0, (len(encoded), job.recipe.num_views))


def _fixed_crops(device: torch.device, asked: FixedCrops) -> NDArray[np.uint8]:
    return cut_pictures(_decode([io.read_file(str(file)) for file in asked.files], device), asked)


_SENTENCE = (
    "torchvision.io.decode_jpeg of a whole batch as a list, by nvJPEG on the GPU, once for both views; files "
    "read ahead by threads; torchvision.transforms.v2 on the GPU, a view at a time, since v2 draws once for "
    "all pictures of a call"
)


def gpu_peers(device: torch.device) -> list[Peer]:
    """The one way; on the device ``cpu`` the same code runs there."""
    return [
        Peer(
            TORCHVISION_GPU,
            crops=Work(partial(_run, v2_crop, device), _SENTENCE, settle=settle(device)),
            recipe=Work(partial(_run, v2_recipe, device), _SENTENCE, settle=settle(device)),
            fixed_crops=partial(_fixed_crops, device),
            antialiased=True,
        )
    ]
