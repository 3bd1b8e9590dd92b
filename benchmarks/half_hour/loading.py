"""Batches on the device: our loader by threads, torchvision with nvJPEG, and DALI with our loader and alone.

Our loader by threads decodes on the host, from a set that repeats the images, so that an epoch is as long as
in training. The rows with DALI read the images once an epoch and need the set of shards. At the start of each
epoch our loader opens its workers again; DALI's own reader is endless and does not have to.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any, cast

import torch
from torchvision import io

from benchmarks.half_hour.plan import Setup
from benchmarks.half_hour.worker import rates
from benchmarks.peers import ALL_GPU_PEERS, load_gpu_peers
from benchmarks.peers.contract import Job, PeerWork, WorkName, image_files
from benchmarks.peers.ours import crops_on_device, epochs
from benchmarks.pixel_error import choose_crops, pixel_error, reference_crops
from pipelines import build_loader
from pipelines.decode.choose import describe_machine
from pipelines.decode.dali_operators import INSTALL_DALI
from pipelines.recipe import moco_v2
from training.precision import Precision

_WARM_UP_BATCHES = 8
_QUEUED = 4
_ERROR_IMAGES = 32


def nvjpeg(setup: Setup) -> dict[str, Any]:
    """torchvision's decoder on the GPU, by itself."""
    if not setup.images.folder.is_dir():
        raise ImportError(f"{setup.images.beton} is there without its folder of JPEG files; copy that too")
    num = setup.size.batch_size
    encoded = [io.read_file(str(file)) for file in image_files(setup.images.folder)[: 4 * num]]
    lists = itertools.cycle([encoded[first : first + num] for first in range(0, len(encoded) - num + 1, num)])

    def decode() -> None:
        io.decode_jpeg(next(lists), mode=io.ImageReadMode.RGB, device=setup.on)

    return rates(decode, num, setup, "images/s")


def ours(setup: Setup, threads: int, way: str) -> dict[str, Any]:
    """Our loader: the crops alone, or the whole recipe, eager or compiled."""

    def open_batches() -> Iterator[object]:
        loader = build_loader(
            setup.reads,
            moco_v2(setup.size.crop_px),
            "ffcv" if setup.reads == setup.long_set else "folder",
            batch_size=setup.size.batch_size,
            num_threads=threads,
            device=setup.on,
            dtype=Precision.choose("auto", setup.on).dtype,
            compiled="compiled" in way,
        )
        return epochs(loader, crops_on_device if way == "crops" else iter)

    return _rates_of(setup, open_batches)


def peer(setup: Setup, name: str, kind: WorkName, threads: int) -> dict[str, Any]:
    """A loader of benchmarks.peers; its crops are compared with PIL's, pixel by pixel."""
    images, size = setup.images, setup.size
    (source,) = (source for source in ALL_GPU_PEERS if name.lower().startswith(source))
    if source != "torchvision" and not describe_machine(setup.on, threads).dali:
        raise ImportError(f"DALI is not installed; {INSTALL_DALI}")
    (found,) = (peer for peer in load_gpu_peers([source], setup.on) if peer.name == name)
    if not (images.folder.is_dir() and (images.shards.is_dir() or source == "torchvision")):
        raise ImportError("the set of shards that this reads was not compiled, for libturbojpeg is missing")
    job = Job(images.folder, images.beton, images.shards, moco_v2(size.crop_px), size.batch_size, threads)
    work = cast(PeerWork, found.work(kind))
    figures = _rates_of(setup, partial(work.open, job)) | {"configured": work.configured}
    if kind == "crops":
        fixed = choose_crops(job, _ERROR_IMAGES)
        figures |= pixel_error(found, fixed, reference_crops(fixed))
    return figures


def _rates_of(setup: Setup, open_batches: Callable[[], Iterator[object]]) -> dict[str, Any]:
    """Measure samples per second of endless batches, and all memory that they take on the GPU."""
    on_gpu = setup.device == "cuda"
    before = torch.cuda.mem_get_info(setup.on)[0] if on_gpu else 0
    with closing(cast(Any, open_batches())) as batches:
        num = setup.size.batch_size
        figures = rates(lambda: next(batches), num, setup, warm_up=_WARM_UP_BATCHES, queued=_QUEUED)
        if on_gpu:
            figures["gpu_mib"] = round((before - torch.cuda.mem_get_info(setup.on)[0]) / 2**20, 1)
    return figures
