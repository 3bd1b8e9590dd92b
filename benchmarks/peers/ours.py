"""Our own loader, as any program of the house uses it."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.contract import OURS, FixedCrops, Job, Peer, Work
from pipelines import ViewLoader, build_loader
from pipelines.recipe import moco_v2

# A generous count of what may wait: too many only lengthens the drain before a turn.
_BATCHES_AHEAD = 5


def _build(job: Job) -> ViewLoader:
    return build_loader(job.beton, job.recipe, batch_size=job.batch_size, num_threads=job.num_threads)


def open_crops(job: Job) -> Iterator[object]:
    """Crops: (N, V, S, S, 3) uint8 on the host; one epoch after the other."""
    loader = _build(job)
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader.crops()
        epoch += 1


def open_recipe(job: Job) -> Iterator[object]:
    """Batches as a training loop gets them; one epoch after the other."""
    loader = _build(job)
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def fixed_crops(asked: FixedCrops) -> NDArray[np.uint8]:
    """Crops by our engine; see :class:`FixedCrops`."""
    crops_NVSS3 = asked.empty()
    num, num_views = crops_NVSS3.shape[:2]
    recipe = replace(moco_v2(asked.crop_px), num_views=num_views)
    engine = build_loader(asked.beton, recipe, batch_size=num, num_threads=1).engine
    unflipped_NV5 = np.pad(asked.boxes_NV4, ((0, 0), (0, 0), (0, 1)))
    ok_N = engine.crop(engine.fetch(asked.index_N), unflipped_NV5, crops_NVSS3)
    if not ok_N.all():
        raise ValueError(
            f"{asked.beton}: picture {asked.index_N[~ok_N][0]} cannot be decoded; convert it again"
        )
    return crops_NVSS3


_SENTENCE = "pipelines.build_loader on the compiled set, its epochs one after the other"
CROPS = Work(
    open_crops, f"{_SENTENCE}; the views of crops(), which are flipped as they are cut", queued=_BATCHES_AHEAD
)
PEER = Peer(
    OURS,
    crops=CROPS,
    recipe=Work(open_recipe, _SENTENCE, queued=_BATCHES_AHEAD),
    fixed_crops=fixed_crops,
    antialiased=True,
)
