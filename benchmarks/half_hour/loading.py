"""Two parts that make batches on the device: our loader by threads, and DALI with our loader and by itself.

Our loader decodes on the host here, from a set that repeats the images, so that an epoch is as long as in
training. The rows with DALI read the images once an epoch and need the set of shards. At the start of each
epoch our loader opens its workers again; DALI's own reader is endless and does not have to. The crops of all
peers are compared with PIL's, pixel by pixel.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.half_hour.plan import Row, Setup, peak_mib, rates, row
from benchmarks.peers import GPUPeerName, contract, load_gpu_peers
from benchmarks.peers.contract import WORKS, Job, PeerWork, WorkName
from benchmarks.peers.ours import GPU_VARIANTS, crops_on_device, epochs
from benchmarks.pixel_error import choose_crops, pixel_error, reference_crops
from pipelines import ViewLoader, build_loader
from pipelines.decode.choose import describe_machine
from pipelines.decode.dali_operators import INSTALL_DALI
from pipelines.recipe import moco_v2
from pipelines.workers import usable_cores
from training.precision import Precision

_Batches = Callable[[ViewLoader], Iterator[object]]
_THREADS = (4, 8, 16)
_LEAST_BATCHES = 8
_QUEUED = 4
"""Calls between waits. A batch that is ready takes no time to fetch, so its time cannot set this number."""
_ERROR_IMAGES = 32


def loader(setup: Setup) -> dict[str, Row]:
    """Our loader with 4, 8 and 16 threads, as far as there are cores, and torchvision with nvJPEG."""
    most = usable_cores(0)
    threads = [num for num in _THREADS if num <= most] or [most]
    ways: dict[str, tuple[float, _Batches, bool]] = {
        "crops": (12, crops_on_device, False),
        "recipe, eager": (12, iter, False),
        "recipe, compiled": (30, iter, True),
    }
    ours = {
        f"ours, {name}, {num} threads": row(setup, cost_s, _ours, num, batches, compiled, needs_gpu=compiled)
        for num in reversed(threads)
        for name, (cost_s, batches, compiled) in ways.items()
    }
    return ours | {
        f"torchvision v2 with nvJPEG, {work}, {threads[-1]} threads": row(
            setup, 20, _peer, "torchvision", contract.TORCHVISION_GPU, work, threads[-1]
        )
        for work in WORKS
    }


def dali(setup: Setup) -> dict[str, Row]:
    """Our loader with DALI on the device, its variants for crops alone, and stock DALI."""
    sources = {
        contract.OURS_GPU_DECODES: "ours",
        contract.DALI_GPU_ONCE: "dali",
        contract.DALI_GPU_TWICE: "dali",
    }
    rows = [(name, source, work) for work in WORKS for name, source in sources.items()]
    rows += [(contract.OURS_GPU_DECODES + variant, "ours", "crops") for variant in GPU_VARIANTS if variant]
    alone = setup.device == "cuda"
    return {
        f"{name}, {work}": row(setup, 25, _peer, source, name, work, usable_cores(0), alone=alone)
        for name, source, work in rows
    }


def _ours(setup: Setup, threads: int, batches: _Batches, compiled: bool) -> dict[str, Any]:
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
    return _rates_of(setup, lambda: epochs(opened, batches))


def _peer(setup: Setup, source: GPUPeerName, name: str, kind: WorkName, threads: int) -> dict[str, Any]:
    images, size = setup.images, setup.size
    if source != "torchvision" and not describe_machine(setup.on, threads).dali:
        raise ImportError(f"DALI is not installed; {INSTALL_DALI}")
    (peer,) = (peer for peer in load_gpu_peers([source], setup.on) if peer.name == name)
    if not (images.folder and (images.shards or source == "torchvision")):
        raise ImportError("the set of shards that this reads was not compiled, for libturbojpeg is missing")
    folder, beton, shards = (Path(path) for path in (images.folder, images.beton, images.shards))
    job = Job(folder, beton, shards, moco_v2(size.crop_px), size.batch_size, threads)
    work = cast(PeerWork, peer.work(kind))
    figures = _rates_of(setup, lambda: work.open(job)) | {"configured": work.configured}
    if kind == "crops":
        fixed = choose_crops(job, _ERROR_IMAGES)
        figures |= pixel_error(peer, fixed, reference_crops(fixed))
    return figures


def _rates_of(setup: Setup, open_batches: Callable[[], Iterator[object]]) -> dict[str, Any]:
    """Measure samples per second of endless batches, and the GPU's memory: torch's tensors, and all of it."""
    on_gpu = setup.device == "cuda"
    before = torch.cuda.mem_get_info(setup.on)[0] if on_gpu else 0
    batches = open_batches()

    def measure() -> dict[str, Any]:
        num = setup.size.batch_size
        return rates(lambda: next(batches), num, setup, least=_LEAST_BATCHES, most_queued=_QUEUED)

    with closing(cast(Any, batches)):
        figures = peak_mib(setup, measure)
        if on_gpu:
            figures["gpu_mib"] = round((before - torch.cuda.mem_get_info(setup.on)[0]) / 2**20, 1)
    return figures
