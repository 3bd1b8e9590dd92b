"""Two parts that make batches on the device: our loader by threads, and DALI under it and by itself.

    python -m benchmarks.half_hour loader dali

Ours decodes on the host here, from a set that repeats the images, so that an epoch is long, as in training.
The rows with DALI read the images once an epoch; at the start of each our loader opens its workers again,
which DALI's own reader, one without end, does not have to. They need the set of shards. Crops of all but the
first rows are compared with PIL's, pixel by pixel.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.half_hour.plan import Row, Setup, peak_mib, rates, row
from benchmarks.peers import load_gpu_peers
from benchmarks.peers.contract import (
    DALI_GPU_ONCE,
    DALI_GPU_TWICE,
    OURS_GPU_DECODES,
    WORKS,
    Job,
    Work,
    WorkName,
    works,
)
from benchmarks.peers.ours import GPU_VARIANTS, crops_on_device
from benchmarks.pixel_error import choose_crops, pixel_error, reference_crops
from benchmarks.timing import Closing
from pipelines import ViewLoader, build_loader
from pipelines.decode.choose import describe_machine
from pipelines.decode.dali_operators import INSTALL_DALI
from pipelines.recipe import moco_v2
from pipelines.workers import usable_cores
from training.precision import Precision

_THREADS = (4, 8, 16)
_LEAST_BATCHES = 8
_QUEUED = 4
"""A batch that waits ready takes no time to fetch, so its time says nothing about how many to queue."""
_ERROR_IMAGES = 32


def loader(setup: Setup) -> dict[str, Row]:
    """Our loader with 4, 8 and 16 threads, as far as there are cores, and torchvision with nvJPEG."""
    most = usable_cores(0)
    threads = [num for num in _THREADS if num <= most] or [most]
    ways: dict[str, tuple[float, Callable[[ViewLoader], Iterator[object]], bool]] = {
        "crops": (12, crops_on_device, False),
        "recipe, eager": (12, iter, False),
        "recipe, compiled": (30, iter, True),
    }
    ours = {
        f"ours, {name}, {num} threads": row(setup, cost_s, _ours, num, batches, compiled, needs_gpu=compiled)
        for num in reversed(threads)
        for name, (cost_s, batches, compiled) in ways.items()
    }
    peers = {
        f"torchvision v2 with nvJPEG, {work}, {threads[-1]} threads": row(
            setup, 20, _peer, "torchvision", None, work, threads[-1]
        )
        for work in WORKS
    }
    return ours | peers


def dali(setup: Setup) -> dict[str, Row]:
    """Our loader with DALI on the device, its variants for crops alone, and stock DALI."""
    names = [OURS_GPU_DECODES, DALI_GPU_ONCE, DALI_GPU_TWICE]
    rows = [(name, work) for work in WORKS for name in names]
    rows += [(OURS_GPU_DECODES + variant, "crops") for variant in GPU_VARIANTS if variant]
    threads = usable_cores(0)
    return {
        f"{name}, {work}": row(
            setup,
            25,
            _peer,
            "ours" if name.startswith("ours") else "dali",
            name,
            work,
            threads,
            alone=setup.device == "cuda",
        )
        for name, work in rows
    }


def _ours(
    setup: Setup, threads: int, batches: Callable[[ViewLoader], Iterator[object]], compiled: bool
) -> dict[str, Any]:
    images, size = setup.images, setup.size
    opened = build_loader(
        images.path(),
        moco_v2(size.crop_px),
        "ffcv" if images.long else "folder",
        batch_size=size.batch_size,
        num_threads=threads,
        device=setup.on,
        dtype=Precision.choose("auto", setup.on).dtype,
        compiled=compiled,
    )

    def epochs() -> Iterator[object]:
        for epoch in itertools.count():
            opened.set_epoch(epoch)
            yield from batches(opened)

    return _rates_of(setup, epochs)


def _peer(setup: Setup, source: Any, name: str | None, work: WorkName, threads: int) -> dict[str, Any]:
    """A loader of `benchmarks.peers`; of several from one source the one of this name."""
    images, size = setup.images, setup.size
    if source != "torchvision" and not describe_machine(setup.on, threads).dali:
        raise ImportError(f"DALI is not installed; {INSTALL_DALI}")
    peers = load_gpu_peers([source], setup.on)
    (peer,) = (peer for peer in peers if name in (None, peer.name))
    needed = [images.folder] if source == "torchvision" else [images.folder, images.shards]
    if not all(needed):
        raise ImportError("the set of shards that this reads was not compiled, for libturbojpeg is missing")
    folder, beton, shards = (Path(path) for path in (images.folder, images.beton, images.shards))
    job = Job(folder, beton, shards, moco_v2(size.crop_px), size.batch_size, threads)
    offered = cast(Work, works(work, [peer])[peer.name])
    figures = _rates_of(setup, lambda: offered.open(job)) | {"configured": offered.configured}
    if work == "crops":
        fixed = choose_crops(job, _ERROR_IMAGES)
        figures |= pixel_error(peer, fixed, reference_crops(fixed))
    return figures


def _rates_of(setup: Setup, open_batches: Callable[[], Iterator[object]]) -> dict[str, Any]:
    """Samples per second of endless batches, and the GPU's memory: in torch's tensors, and in all."""
    on_gpu, size = setup.device == "cuda", setup.size
    before = torch.cuda.mem_get_info(setup.on)[0] if on_gpu else 0
    batches = open_batches()
    with closing(cast(Closing, batches)):
        figures = peak_mib(
            setup,
            lambda: rates(
                lambda: next(batches), size.batch_size, setup, least=_LEAST_BATCHES, most_queued=_QUEUED
            ),
        )
        if on_gpu:
            figures["gpu_mib"] = round((before - torch.cuda.mem_get_info(setup.on)[0]) / 2**20, 1)
    return figures
