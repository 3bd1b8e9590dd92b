"""Our own loader, opened as any program does: with each backend, on each kind of compiled set.

Shape letters: N images, V views, S side in pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.peers import contract
from benchmarks.peers.contract import FixedCrops, Job, Peer, PeerWork, synchronizer
from pipelines import Backend, DALIOptions, PictureSet, Reading, ViewLoader, build_loader
from pipelines.decode import Decoder, DeviceDecoder
from pipelines.decode.dali import DALIDeviceDecoder
from pipelines.recipe import moco_v2
from pipelines.sets.stream import BUFFER

# An upper bound: too large a number only lengthens the drain before a turn.
_BATCHES_AHEAD = 5


def epochs(loader: ViewLoader, of: Callable[[ViewLoader], Iterator[object]]) -> Iterator[object]:
    """Yield the batches that ``of`` makes of the loader, one epoch after the other."""
    for epoch in count():
        loader.set_epoch(epoch)
        yield from of(loader)


def crops_on_device(loader: ViewLoader) -> Iterator[Tensor]:
    """Yield the views of crops() on the loader's device; host memory is held until its copy is over."""
    held: tuple[torch.cuda.Event, Tensor] | None = None
    for batch in loader.crops():
        views = batch.views.to(loader.config.device, non_blocking=True)
        if views.device != batch.views.device:
            copied = torch.cuda.Event()
            copied.record()
            if held:
                held[0].synchronize()
            held = copied, batch.views
        yield views
    if held:
        held[0].synchronize()


def decoder_crops(
    images: PictureSet,
    decoder: Decoder,
    index_N: NDArray[np.int64],
    boxes_NV5: NDArray[np.int32],
    crop_px: int,
    device: torch.device | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Crop images with a decoder, which must be a :class:`pipelines.decode.DeviceDecoder` if given a device.

    Returns:
        (N, V, S, S, 3) crops, and (N,) whether each image could be decoded.
    """
    crops_NVSS3 = np.zeros((*boxes_NV5.shape[:2], crop_px, crop_px, 3), np.uint8)
    encoded = images.fetch(index_N)
    if device is None:
        return crops_NVSS3, decoder.crop(encoded, boxes_NV5, crops_NVSS3)
    assert isinstance(decoder, DeviceDecoder)
    on_device = torch.from_numpy(crops_NVSS3).to(device)
    ok_N = decoder.crop_on_device(encoded, boxes_NV5, on_device)
    return on_device.cpu().numpy(), ok_N


def _peer(
    name: str,
    backend: Backend,
    how: str,
    reading: Reading | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008 – it is immutable
    options: DALIOptions | None = None,
) -> Peer:
    """Describe one way to open our loader: on shards if ``reading`` is given, else on the .beton file.

    With ``options`` DALI's operators make the crops, as on a GPU, and not our kernels.
    """
    opened = partial(build_loader, backend=backend, reading=reading or "auto", device=device, dali=options)

    def run(of: Callable[[ViewLoader], Iterator[object]], job: Job) -> Iterator[object]:
        path = job.shards if reading else job.beton
        loader = opened(path, job.recipe, batch_size=job.batch_size, num_threads=job.num_threads)
        yield from epochs(loader, of)

    def fixed_crops(fixed: FixedCrops) -> NDArray[np.uint8]:
        num, num_views = fixed.boxes_NV4.shape[:2]
        path = fixed.shards if reading else fixed.beton
        recipe = replace(moco_v2(fixed.crop_px), num_views=num_views)
        loader = opened(path, recipe, batch_size=num, num_threads=1)
        boxes_NV5 = np.pad(fixed.boxes_NV4, ((0, 0), (0, 0), (0, 1)))  # without flips
        decoder = DALIDeviceDecoder(loader.set, device, 1, options) if options else loader.decoder
        crops_NVSS3, ok_N = decoder_crops(
            loader.set, decoder, fixed.index_N, boxes_NV5, fixed.crop_px, device if options else None
        )
        if not ok_N.all():
            raise ValueError(f"{path}: image {fixed.index_N[~ok_N][0]} cannot be decoded; convert it again")
        return crops_NVSS3

    how = f"pipelines.build_loader, backend {backend} {how}, one epoch after the other"
    work = partial(PeerWork, queued=_BATCHES_AHEAD, settle=synchronizer(device))
    crops = work(partial(run, crops_on_device), f"{how}; the views of crops(), which are flipped too")
    return Peer(name, crops, work(partial(run, iter), how), fixed_crops)


PEER = _peer(contract.OURS, "ffcv", "on the .beton file")
assert isinstance(PEER.crops, PeerWork)
CROPS: PeerWork = PEER.crops

_READ_AHEAD = "on shards, every image read into memory ahead of its turn"
DALI_PEERS = [
    _peer(contract.OURS_ON_SHARDS, "ffcv", _READ_AHEAD, "read"),
    _peer(
        contract.OURS_DALI,
        "dali",
        f"{_READ_AHEAD}; DALI decodes on the CPU, with our order and boxes; our kernels do the rest",
        "read",
    ),
    _peer(
        contract.OURS_STREAM,
        "dali",
        f"on shards, which DALI's own reader streams and shuffles in a buffer of {BUFFER:,} images, filled "
        f"anew in each epoch; decoded and cropped like {contract.OURS_DALI!r}",
        "stream",
    ),
]

_USUAL = DALIOptions()
GPU_VARIANTS = {"": _USUAL, ", region decode": DALIOptions(region_decode=True)} | {
    f", JPEG unit load {load:g}": DALIOptions(hw_decoder_load=load)
    for load in (0.0, 0.65, 1.0)
    if load != _USUAL.hw_decoder_load
}
"""Suffix of the name → how the ``dali`` backend decodes on a GPU."""


def gpu_peers(device: torch.device) -> list[Peer]:
    """Return our loader with DALI on a GPU, by each choice of options; ``cpu`` runs the same code there."""
    return [
        _peer(
            contract.OURS_GPU_DECODES + name,
            "dali",
            f"{_READ_AHEAD}; DALI's mixed decoding (region_decode {options.region_decode}, hw_decoder_load "
            f"{options.hw_decoder_load:g}) and its operators for the crops, with our order and boxes; our "
            "photometric stage on the GPU",
            "read",
            device,
            options,
        )
        for name, options in GPU_VARIANTS.items()
    ]
