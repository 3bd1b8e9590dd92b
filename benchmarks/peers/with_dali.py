"""DALI by itself, on the CPU or a GPU: its own reader, decoder, random crops and photometric operators.

Shape letters: N batch, V views, S side in pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from benchmarks.peers import contract
from benchmarks.peers.contract import FixedCrops, Job, Peer, PeerWork, synchronizer
from pipelines.recipe import Recipe

_PREFETCHED = 2
_SHUFFLED_FILES = 1024
_DEGREES_PER_TURN = 360
# DALI documents the fast inverse transform as up to 14 % faster.
_DECODE = {"output_type": types.RGB, "use_fast_idct": True}
_RESAMPLE = {"antialias": True, "interp_type": types.INTERP_LINEAR}


def _decoder(device_id: int | None) -> str:
    """Return the decoder's device; "mixed" takes bytes of the host and leaves pixels on the GPU."""
    return "cpu" if device_id is None else "mixed"


def _crop_once_decoded(encoded: Any, recipe: Recipe, decoder: str) -> tuple[Any, ...]:
    image = fn.decoders.image(encoded, device=decoder, **_DECODE)
    area, ratio = recipe.crop_scale, recipe.crop_ratio
    return tuple(
        fn.random_resized_crop(
            image, size=recipe.crop_px, random_area=area, random_aspect_ratio=ratio, **_RESAMPLE
        )
        for _ in range(recipe.num_views)
    )


def _crop_regions(encoded: Any, recipe: Recipe, decoder: str) -> tuple[Any, ...]:
    drawn: dict[str, Any] = {"random_area": recipe.crop_scale, "random_aspect_ratio": recipe.crop_ratio}
    size = [recipe.crop_px, recipe.crop_px]
    regions = (
        fn.decoders.image_random_crop(encoded, device=decoder, **drawn, **_DECODE)
        for _ in range(recipe.num_views)
    )
    return tuple(fn.resize(region, size=size, **_RESAMPLE) for region in regions)


def _run(
    job: Job, crop: Callable[..., tuple[Any, ...]], device_id: int | None, *, augmented: bool
) -> Iterator[object]:
    """Build the pipeline and run it without end.

    Yields:
        V views (N, S, S, 3): on the host DALI's own lists of tensors, on a GPU torch's tensors of the same
        memory.
    """

    @pipeline_def(
        batch_size=job.batch_size,
        num_threads=job.num_threads,
        device_id=device_id,
        exec_dynamic=True,
        prefetch_queue_depth=_PREFETCHED,
        enable_conditionals=augmented,
        seed=0,
    )
    def define() -> tuple[Any, ...]:
        encoded, _ = fn.readers.file(
            file_root=str(job.folder), random_shuffle=True, initial_fill=_SHUFFLED_FILES
        )
        crops = crop(encoded, job.recipe, _decoder(device_id))
        return tuple(_augment(view, job.recipe) for view in crops) if augmented else crops

    pipeline = define()
    pipeline.build()
    # Passed by position: DALI takes a keyword for the name of an input.
    stream = None if device_id is None else torch.cuda.current_stream(device_id)
    while True:
        views = pipeline.run(stream)
        if device_id is None:
            yield views
        else:
            yield tuple(torch.utils.dlpack.from_dlpack(view.as_tensor()) for view in views)


def _happens(probability: float) -> Any:
    """0 or 1 per sample, as float so that it can switch a parameter."""
    return fn.cast(fn.random.coin_flip(probability=probability), dtype=types.FLOAT)


def _augment(crop: Any, recipe: Recipe) -> Any:
    """Apply jitter and grey as one colour matrix, blur where it happens, flip and normalise in one pass."""
    jittered = _happens(recipe.jitter_prob)

    def factor(strength: float) -> Any:
        return 1 + jittered * fn.random.uniform(range=[-strength, strength])

    hue = recipe.hue_turns * _DEGREES_PER_TURN
    view = fn.color_twist(
        crop,
        brightness=factor(recipe.brightness),
        contrast=factor(recipe.contrast),
        saturation=factor(recipe.saturation) * (1 - _happens(recipe.grey_prob)),
        hue=jittered * fn.random.uniform(range=[-hue, hue]),
    )
    return fn.crop_mirror_normalize(
        _maybe_blur(view, recipe),
        mirror=fn.random.coin_flip(probability=recipe.flip_prob),
        dtype=types.FLOAT,
        output_layout="HWC",
        mean=[255 * mean for mean in recipe.mean],
        std=[255 * std for std in recipe.std],
    )


def _maybe_blur(view: Any, recipe: Recipe) -> Any:
    blurred = fn.random.coin_flip(probability=recipe.blur_prob, dtype=types.BOOL)
    sigma = fn.random.uniform(range=list(recipe.blur_sigma_px))
    # DALI rewrites this statement, so that only the samples for which it holds are blurred.
    if blurred:  # noqa: SIM108 – DALI does not rewrite expressions
        result = fn.gaussian_blur(view, sigma=sigma)
    else:
        result = view
    return result


def _cut_once_decoded(encoded: Any, corner: Any, extent: Any, size: list[int], decoder: str) -> Any:
    image = fn.decoders.image(encoded, device=decoder, **_DECODE)
    return fn.resize(image, size=size, roi_start=corner, roi_end=corner + extent, **_RESAMPLE)


def _cut_region(encoded: Any, corner: Any, extent: Any, size: list[int], decoder: str) -> Any:
    absolute: dict[str, Any] = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
    region = fn.decoders.image_slice(encoded, corner, extent, device=decoder, **absolute, **_DECODE)
    return fn.resize(region, size=size, **_RESAMPLE)


def _fixed_crops(cut: Callable[..., Any], device_id: int | None, fixed: FixedCrops) -> NDArray[np.uint8]:
    crops_NVSS3 = fixed.empty()
    encoded = [np.frombuffer(file.read_bytes(), np.uint8) for file in fixed.files]
    size = [fixed.crop_px, fixed.crop_px]

    @pipeline_def(batch_size=len(encoded), num_threads=1, device_id=device_id)
    def define(boxes_N4: NDArray[np.float32]) -> Any:
        sources = ([encoded], [list(boxes_N4[:, :2])], [list(boxes_N4[:, 2:])])
        payload, corner, extent = (fn.external_source(source=source, batch=True) for source in sources)
        return cut(payload, corner, extent, size, _decoder(device_id))

    for v in range(crops_NVSS3.shape[1]):
        pipeline = define(fixed.boxes_NV4[:, v].astype(np.float32))
        pipeline.build()
        (crops,) = pipeline.run()
        crops_NVSS3[:, v] = crops.as_cpu().as_array()
    return crops_NVSS3


_SETUP = (
    "fn.readers.file with shuffling, dynamic executor, antialias=True with the linear (triangular) filter, "
    "the fast inverse transform"
)
_ON_CPU = f"DALI without a GPU, {_SETUP}; batches stay DALI's own, without a copy to torch"
_ON_GPU = (
    f"DALI with mixed decoding, {_SETUP}, all else on the GPU; batches become torch's by DLPack, not copied"
)
_ONCE = "fn.decoders.image once, fn.random_resized_crop twice"
_TWICE = "fn.decoders.image_random_crop and fn.resize for each view"
_PHOTOMETRIC = (
    "jitter and grey are one fn.color_twist (brightness, contrast about mid-grey, saturation and hue as one "
    "matrix in YIQ, in a fixed order, where torchvision draws the order and turns hue in HSV), "
    "fn.gaussian_blur only where it happens, flip and normalisation in fn.crop_mirror_normalize"
)


def _peers(device_id: int | None, once: str, twice: str) -> list[Peer]:
    setup = _ON_CPU if device_id is None else _ON_GPU
    wait = None if device_id is None else synchronizer(torch.device("cuda", device_id))

    def works(crop: Callable[..., Any], how: str) -> tuple[PeerWork, PeerWork]:
        run = partial(_run, crop=crop, device_id=device_id)
        work = partial(PeerWork, queued=_PREFETCHED + 1, settle=wait)
        return (
            work(partial(run, augmented=False), f"{setup}; {how}"),
            work(partial(run, augmented=True), f"{setup}; {how}; {_PHOTOMETRIC}"),
        )

    return [
        Peer(once, *works(_crop_once_decoded, _ONCE), partial(_fixed_crops, _cut_once_decoded, device_id)),
        Peer(twice, *works(_crop_regions, _TWICE), partial(_fixed_crops, _cut_region, device_id)),
    ]


_ONLY_CROPS = (
    f"measured for crops only; the recipe is measured with DALI's faster way, {contract.DALI_ONCE!r}"
)
_once, _twice = _peers(None, contract.DALI_ONCE, contract.DALI_TWICE)
PEERS = [_once, replace(_twice, recipe=_ONLY_CROPS)]


def gpu_peers(device: torch.device) -> list[Peer]:
    """Return the same graphs on a GPU; on the device ``cpu`` they run there."""
    device_id = (device.index or 0) if device.type == "cuda" else None
    return _peers(device_id, contract.DALI_GPU_ONCE, contract.DALI_GPU_TWICE)
