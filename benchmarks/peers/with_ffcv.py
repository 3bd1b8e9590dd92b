"""Stock FFCV with two views as FFCV-SSL makes them: a second pipeline on the image field, a decode per view.

Shape letters: N batch, V views, S side in pixels, H, W of the decoded image.
"""

from collections.abc import Iterator

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.peers.contract import FFCV, FixedCrops, Job, Peer, PeerWork, hush_numba
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
# The set is listed so often that no epoch, for which FFCV allocates memory, starts within a turn.
_LISTED_SAMPLES = 1_000_000
# FFCV's ``OSCacheManager.state_type`` sets ``mutable = False`` on numba's one type of byte arrays. Its hash
# changes, and functions compiled before can no longer be listed, compiled anew or finalised. So it is made
# mutable again after each start of FFCV. It is held here because numba keeps its types by weak reference.
_BYTES = numba.uint8[::1]


def _crops(job: Job) -> Iterator[object]:
    """Yield two (N, S, S, 3) uint8 views; compiling takes some seconds."""
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
            _BYTES.mutable = True
            yield first
            yield from epoch
        finally:
            # Without this its thread waits for a reader until the process ends.
            epoch.terminate_event.set()
            epoch.join()
            epoch.close()


def _fixed_crops(fixed: FixedCrops) -> NDArray[np.uint8]:
    """Crop with the two functions that FFCV's decoder calls."""
    beton = open_beton(fixed.beton)

    def decode(index: int) -> NDArray[np.uint8]:
        record = beton.metadata["f0"][index]
        height, width = int(record["height"]), int(record["width"])
        image_HW3 = np.empty((height, width, 3), np.uint8)
        code = imdecode(beton.payload(index), image_HW3, height, width, height, width)
        if code != 0:
            raise ValueError(f"FFCV's decoder returned {code} for image {index} of {fixed.beton}")
        return image_HW3

    def cut(image_HW3: NDArray[np.uint8], top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        crop_SS3 = np.empty((fixed.crop_px, fixed.crop_px, 3), np.uint8)
        resize_crop(image_HW3, top, top + height, left, left + width, crop_SS3)
        return crop_SS3

    return fixed.cut(map(decode, fixed.index_N.tolist()), cut)


_SETUP = (
    "stock ffcv.Loader on the compiled set, two pipelines on the image field with "
    "RandomResizedCropRGBImageDecoder, order RANDOM, os_cache=True; decodes with the fast transform and "
    "resizes with INTER_AREA"
)
_NO_RECIPE = "stock FFCV has no hue, greyscale and blur operators (those of FFCV-SSL are not in it)"
# The loader's queue, and the batch that waits for a place in it.
PEERS = [Peer(FFCV, PeerWork(_crops, _SETUP, queued=_BATCHES_AHEAD + 1), _NO_RECIPE, _fixed_crops)]
