"""Our own loader, as any program of the house uses it: by each engine, on each kind of compiled set.

Shape letters: N pictures, V views, S side in pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.peers.contract import (
    OURS,
    OURS_DALI,
    OURS_GPU_DECODES,
    OURS_ON_SHARDS,
    OURS_STREAM,
    FixedCrops,
    Job,
    Peer,
    Work,
    settle,
)
from pipelines import Backend, DALIOptions, PictureSet, Reading, ViewLoader, build_loader
from pipelines.decode import Decoder, DeviceDecoder
from pipelines.decode.dali import DALIDeviceDecoder
from pipelines.recipe import Recipe, moco_v2
from pipelines.sets.stream import BUFFER

# A generous count of what may wait: too many only lengthens the drain before a turn.
_BATCHES_AHEAD = 5
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Way:
    """How our loader is opened."""

    backend: Backend
    on_shards: bool
    """Whether it reads the folder of shards, else the .beton file."""
    reading: Reading = "auto"
    device: torch.device = _CPU
    operators: bool = False
    """Whether DALI's operators make the crops, as they do on a GPU, and not our kernels."""
    options: DALIOptions | None = None

    def open(self, asked: Job | FixedCrops, recipe: Recipe, *, batch_size: int, threads: int) -> ViewLoader:
        """A loader over the pictures of a job."""
        path = asked.shards if self.on_shards else asked.beton
        return build_loader(
            path,
            recipe,
            self.backend,
            batch_size=batch_size,
            num_threads=threads,
            reading=self.reading,
            device=self.device,
            dali=self.options,
        )


def _epochs(way: _Way, batches: Callable[[ViewLoader], Iterator[object]], job: Job) -> Iterator[object]:
    """One epoch after the other."""
    loader = way.open(job, job.recipe, batch_size=job.batch_size, threads=job.num_threads)
    for epoch in count():
        loader.set_epoch(epoch)
        yield from batches(loader)


def crops_on_device(loader: ViewLoader) -> Iterator[Tensor]:
    """The views of crops() on the loader's device; what is copied is held until its copy is over."""
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
    """(N, V, S, S, 3) crops of the boxes, and (N,) which images could be decoded.

    With a device, the decoder must be a :class:`pipelines.decode.DeviceDecoder`, and crops there.
    """
    crops_NVSS3 = np.zeros((*boxes_NV5.shape[:2], crop_px, crop_px, 3), np.uint8)
    encoded = images.fetch(index_N)
    if device is None:
        return crops_NVSS3, decoder.crop(encoded, boxes_NV5, crops_NVSS3)
    assert isinstance(decoder, DeviceDecoder)
    on_device = torch.from_numpy(crops_NVSS3).to(device)
    ok_N = decoder.crop_on_device(encoded, boxes_NV5, on_device)
    return on_device.cpu().numpy(), ok_N


def _fixed_crops(way: _Way, asked: FixedCrops) -> NDArray[np.uint8]:
    """Crops by the loader's decoder; see :class:`FixedCrops`."""
    num, num_views = asked.boxes_NV4.shape[:2]
    recipe = replace(moco_v2(asked.crop_px), num_views=num_views)
    loader = way.open(asked, recipe, batch_size=num, threads=1)
    unflipped_NV5 = np.pad(asked.boxes_NV4, ((0, 0), (0, 0), (0, 1)))
    decoder, device = loader.decoder, None
    if way.operators:
        device = way.device
        decoder = DALIDeviceDecoder(loader.set, device, 1, way.options or DALIOptions())
    crops_NVSS3, ok_N = decoder_crops(
        loader.set, decoder, asked.index_N, unflipped_NV5, asked.crop_px, device
    )
    if not ok_N.all():
        path = asked.shards if way.on_shards else asked.beton
        raise ValueError(f"{path}: picture {asked.index_N[~ok_N][0]} cannot be decoded; convert it again")
    return crops_NVSS3


def _peer(name: str, way: _Way, sentence: str) -> Peer:
    sentence = f"pipelines.build_loader, backend {way.backend} {sentence}, its epochs one after the other"
    return Peer(
        name,
        crops=Work(
            partial(_epochs, way, crops_on_device),
            f"{sentence}; the views of crops(), which are flipped as they are cut",
            queued=_BATCHES_AHEAD,
            settle=settle(way.device),
        ),
        recipe=Work(partial(_epochs, way, iter), sentence, queued=_BATCHES_AHEAD, settle=settle(way.device)),
        fixed_crops=partial(_fixed_crops, way),
        antialiased=True,
    )


PEER = _peer(OURS, _Way("ffcv", on_shards=False), "on the .beton file")
assert isinstance(PEER.crops, Work)
CROPS: Work = PEER.crops

_READ_AHEAD = "on shards, every picture read into memory ahead of its turn"
DALI_PEERS = [
    _peer(OURS_ON_SHARDS, _Way("ffcv", on_shards=True, reading="read"), _READ_AHEAD),
    _peer(
        OURS_DALI,
        _Way("dali", on_shards=True, reading="read"),
        f"{_READ_AHEAD}; DALI's decoder on the CPU under our order and boxes, our kernels for the rest",
    ),
    _peer(
        OURS_STREAM,
        _Way("dali", on_shards=True, reading="stream"),
        "on shards, which DALI's own reader goes through and shuffles within a buffer of "
        f"{BUFFER:,} pictures, filled anew in each epoch; decoded and cut like {OURS_DALI!r}",
    ),
]

_USUAL = DALIOptions()
GPU_VARIANTS = {"": _USUAL, ", region decode": DALIOptions(region_decode=True)} | {
    f", JPEG unit load {load:g}": DALIOptions(hw_decoder_load=load)
    for load in (0.0, 0.65, 1.0)
    if load != _USUAL.hw_decoder_load
}
"""What is added to a name → how the ``dali`` backend decodes on a GPU."""


def gpu_peers(device: torch.device) -> list[Peer]:
    """Our loader with DALI on a GPU, by each choice of options; ``cpu`` runs the same code there."""
    peers = []
    for name, options in GPU_VARIANTS.items():
        way = _Way("dali", True, "read", device, operators=True, options=options)
        how = f"region_decode {options.region_decode}, hw_decoder_load {options.hw_decoder_load:g}"
        peers.append(
            _peer(
                OURS_GPU_DECODES + name,
                way,
                f"{_READ_AHEAD}; DALI's mixed decoding ({how}) and its operators for the crops under our "
                "order and boxes, our photometric stage on the GPU",
            )
        )
    return peers
