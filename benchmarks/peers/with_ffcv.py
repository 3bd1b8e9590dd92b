"""Stock FFCV the way FFCV-SSL takes two views: a second pipeline on the image field, a decode per view.

Shape letters: N batch, V views, S side in pixels, H, W of the decoded picture.
"""

from collections.abc import Iterator

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.peers.contract import FFCV, FixedCrops, Job, Peer, Work, hush_numba
from pipelines.sets.beton import open_beton

# Importing FFCV sets torch to one thread.
_num_threads = torch.get_num_threads()
from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder  # noqa: E402
from ffcv.libffcv import imdecode, resize_crop  # noqa: E402
from ffcv.loader import Loader, OrderOption  # noqa: E402
from ffcv.pipeline import PipelineSpec  # noqa: E402
from ffcv.transforms import ToTensor  # noqa: E402

torch.set_num_threads(_num_threads)

_BATCHES_AHEAD = 3
# The set is listed so often that the turns hold no start of an epoch, where FFCV allocates its memory anew.
_LISTED_SAMPLES = 1_000_000


# Held from here on, because numba keeps its types by weak reference: the one object of this name.
_BYTES = numba.uint8[::1]


def _mend_numba() -> None:
    """Make the type of byte arrays writable again, for every other function compiled in this process.

    FFCV's ``OSCacheManager.state_type`` sets ``mutable = False`` on it, but numba has one object for all who
    name that type: its hash changes inside every dictionary that holds it, so that functions compiled before
    can no longer be listed, compiled anew or finalised (``KeyError``).
    """
    _BYTES.mutable = True


def open_crops(job: Job) -> Iterator[object]:
    """Two (N, S, S, 3) uint8 views by ``ffcv.Loader``; compiling takes some seconds."""
    hush_numba()
    num = len(open_beton(job.beton))

    def decoder() -> RandomResizedCropRGBImageDecoder:
        size = (job.recipe.crop_px, job.recipe.crop_px)
        return RandomResizedCropRGBImageDecoder(size, job.recipe.crop_scale, job.recipe.crop_ratio)

    loader = Loader(
        str(job.beton),
        batch_size=job.batch_size,
        num_workers=job.num_threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.tile(np.arange(num, dtype=np.uint64), -(-_LISTED_SAMPLES // num)),
        batches_ahead=_BATCHES_AHEAD,
        pipelines={
            "image": [decoder(), ToTensor()],
            "second": PipelineSpec("image", decoder=decoder(), transforms=[ToTensor()]),
            "label": None,
        },
    )
    while True:
        epoch = iter(loader)
        try:
            first = next(epoch)
            _mend_numba()
            yield first
            yield from epoch
        finally:
            # Its thread would otherwise wait for a reader until the process ends.
            epoch.terminate_event.set()
            epoch.join()
            epoch.close()


def fixed_crops(asked: FixedCrops) -> NDArray[np.uint8]:
    """Crops by the two functions that FFCV's decoder calls; see :class:`FixedCrops`."""
    crops_NVSS3 = asked.empty()
    beton = open_beton(asked.beton)
    for index, boxes_V4, crops_VSS3 in zip(asked.index_N, asked.boxes_NV4, crops_NVSS3, strict=True):
        record, payload = beton.metadata["f0"][index], beton.payload(int(index))
        height, width = int(record["height"]), int(record["width"])
        picture_HW3 = np.empty((height, width, 3), np.uint8)
        code = imdecode(payload, picture_HW3, height, width, height, width)
        if code != 0:
            raise ValueError(f"FFCV's decoder returned {code} for picture {index} of {asked.beton}")
        for (top, left, box_height, box_width), crop_SS3 in zip(boxes_V4.tolist(), crops_VSS3, strict=True):
            resize_crop(picture_HW3, top, top + box_height, left, left + box_width, crop_SS3)
    return crops_NVSS3


_SENTENCE = (
    "stock ffcv.Loader on the compiled set, two pipelines on the image field with "
    "RandomResizedCropRGBImageDecoder, order RANDOM, os_cache=True; decodes with the fast transform and "
    "resizes with INTER_AREA"
)
PEERS = [
    Peer(
        FFCV,
        # The loader's queue and the batch that waits for a place in it.
        crops=Work(open_crops, _SENTENCE, queued=_BATCHES_AHEAD + 1),
        recipe="stock FFCV has no hue, greyscale and blur operators (those of FFCV-SSL are not in it)",
        fixed_crops=fixed_crops,
        antialiased=True,
    )
]
