"""The photometric stage alone: our fused kernel, the batched torch code compiled, and the same not compiled.

Shape letters: N views, S side in pixels, P parameters.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.ratios import COMPILED, EAGER, FUSED
from benchmarks.timing import Runner
from pipelines.augment.draws import draw_parameters
from pipelines.augment.photometric import augment
from pipelines.augment.photometric_cpu import augment_on_cpu
from pipelines.randomness import Draw
from pipelines.recipe import Recipe

CONFIGURED = {
    FUSED: "pipelines.augment.photometric_cpu: one view at a time, what does not fire costs nothing",
    COMPILED: "torch.compile(pipelines.augment.photometric.augment, fullgraph=True) on the whole batch",
    EAGER: "pipelines.augment.photometric.augment on the whole batch",
}


def runners(views: NDArray[np.uint8], recipe: Recipe, num_threads: int) -> dict[str, Runner]:
    """The three ways over the same batch.

    Args:
        views: (N, S, S, 3) crops.
        recipe: what is done to them.
        num_threads: of our kernel and of torch.
    """
    params_VNP = draw_parameters(recipe, Draw(0, 0, np.arange(len(views))))
    on_torch = torch.from_numpy(views), torch.from_numpy(params_VNP[0]), recipe
    compiled = torch.compile(augment, fullgraph=True)
    ways = {
        FUSED: partial(_fused, views, params_VNP[:1], recipe, num_threads),
        COMPILED: partial(_by_torch, partial(compiled, *on_torch), num_threads),
        EAGER: partial(_by_torch, partial(augment, *on_torch), num_threads),
    }
    return {name: Runner(way, len(views)) for name, way in ways.items()}


def _fused(
    views_NSS3: NDArray[np.uint8], params_VNP: NDArray[np.float32], recipe: Recipe, num_threads: int
) -> Iterator[object]:
    """Our kernel; the threads share the batch as the loader's do."""
    num, side = views_NSS3.shape[:2]
    out_VNSS3 = np.empty((1, num, side, side, 3), np.float32)
    edges = np.linspace(0, num, num_threads + 1).astype(int).tolist()

    def work(thread: int) -> None:
        start, stop = edges[thread : thread + 2]
        views_nVSS3 = views_NSS3[start:stop, None]
        augment_on_cpu(views_nVSS3, params_VNP[:, start:stop], recipe, out_VNSS3, start)

    with ThreadPoolExecutor(num_threads) as pool:
        while True:
            list(pool.map(work, range(num_threads)))
            yield out_VNSS3


def _by_torch(way: Callable[[], object], num_threads: int) -> Iterator[object]:
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(num_threads)
        while True:
            with torch.inference_mode():
                batch = way()
            yield batch
