"""DALI by itself, on the CPU or a GPU: its own reader, decoder, random crops and photometric operators.

Shape letters: N batch, V views, S side in pixels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch.utils.dlpack import from_dlpack

from benchmarks.peers import contract
from benchmarks.peers.contract import FixedCrops, Job, Peer, PeerWork, synchronizer
from pipelines.recipe import Recipe

_PREFETCHED = 2
_SHUFFLED_FILES = 1024
_DEGREES_PER_TURN = 360
_RESAMPLE: dict[str, Any] = {"antialias": True, "interp_type": types.INTERP_LINEAR}
_IN_PIXELS: dict[str, Any] = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}


def _decoding(device: torch.device) -> dict[str, Any]:
    """Return a decoder's options; "mixed" takes bytes of the host and leaves pixels on the GPU."""
    # DALI documents the fast inverse transform as up to 14 % faster.
    place = "mixed" if device.type == "cuda" else "cpu"
    return {"device": place, "output_type": types.RGB, "use_fast_idct": True}


def _random_view(source: Any, recipe: Recipe, once: bool, decoding: dict[str, Any]) -> Any:
    """Crop a view at random, of a decoded image or of a region that is decoded for it."""
    side = recipe.crop_px
    drawn: dict[str, Any] = {"random_area": recipe.crop_scale, "random_aspect_ratio": recipe.crop_ratio}
    if once:
        view = fn.random_resized_crop(source, size=side, **drawn, **_RESAMPLE)
    else:
        region = fn.decoders.image_random_crop(source, **drawn, **decoding)
        view = fn.resize(region, size=[side, side], **_RESAMPLE)
    return view


def _fixed_view(source: Any, box: tuple[Any, Any], side: int, once: bool, decoding: dict[str, Any]) -> Any:
    """Crop a view at a corner and extent, by the same operations."""
    corner, extent = box
    if once:
        return fn.resize(source, size=[side, side], roi_start=corner, roi_end=corner + extent, **_RESAMPLE)
    region = fn.decoders.image_slice(source, corner, extent, **_IN_PIXELS, **decoding)
    return fn.resize(region, size=[side, side], **_RESAMPLE)


def _augment(crop: Any, recipe: Recipe) -> Any:
    """Apply jitter and grey as one colour matrix, blur where it happens, flip and normalise in one pass."""

    def happens(probability: float) -> Any:
        """0 or 1 per sample, as float so that it can switch a parameter."""
        return fn.cast(fn.random.coin_flip(probability=probability), dtype=types.FLOAT)

    jittered = happens(recipe.jitter_prob)

    def factor(strength: float) -> Any:
        return 1 + jittered * fn.random.uniform(range=[-strength, strength])

    hue = recipe.hue_turns * _DEGREES_PER_TURN
    view = fn.color_twist(
        crop,
        brightness=factor(recipe.brightness),
        contrast=factor(recipe.contrast),
        saturation=factor(recipe.saturation) * (1 - happens(recipe.grey_prob)),
        hue=jittered * fn.random.uniform(range=[-hue, hue]),
    )
    blurred = fn.random.coin_flip(probability=recipe.blur_prob, dtype=types.BOOL)
    sigma = fn.random.uniform(range=list(recipe.blur_sigma_px))
    # DALI rewrites this statement, so that only the samples for which it holds are blurred.
    if blurred:
        view = fn.gaussian_blur(view, sigma=sigma)
    return fn.crop_mirror_normalize(
        view,
        mirror=fn.random.coin_flip(probability=recipe.flip_prob),
        dtype=types.FLOAT,
        output_layout="HWC",
        mean=[255 * mean for mean in recipe.mean],
        std=[255 * std for std in recipe.std],
    )


def _run(once: bool, augmented: bool, device: torch.device, job: Job) -> Iterator[object]:
    """Yield V views (N, S, S, 3) without end: on the host DALI's own tensors, on a GPU torch's."""
    decoding = _decoding(device)

    @pipeline_def(
        batch_size=job.batch_size,
        num_threads=job.num_threads,
        device_id=device.index,
        exec_dynamic=True,
        prefetch_queue_depth=_PREFETCHED,
        enable_conditionals=augmented,
        seed=0,
    )
    def define() -> tuple[Any, ...]:
        encoded, _ = fn.readers.file(
            file_root=str(job.folder), random_shuffle=True, initial_fill=_SHUFFLED_FILES
        )
        source = fn.decoders.image(encoded, **decoding) if once else encoded
        crops = tuple(_random_view(source, job.recipe, once, decoding) for _ in range(job.recipe.num_views))
        return tuple(_augment(view, job.recipe) for view in crops) if augmented else crops

    pipeline = define()
    pipeline.build()
    on_gpu = device.type == "cuda"
    # Passed by position: DALI takes a keyword for the name of an input.
    stream = torch.cuda.current_stream(device) if on_gpu else None
    while True:
        views = pipeline.run(stream)
        yield tuple(from_dlpack(view.as_tensor()) for view in views) if on_gpu else views


def _fixed_crops(once: bool, device: torch.device, fixed: FixedCrops) -> NDArray[np.uint8]:
    files = [np.frombuffer(file.read_bytes(), np.uint8) for file in fixed.files]
    boxes_VN4 = fixed.boxes_NV4.transpose(1, 0, 2).astype(np.float32)
    decoding = _decoding(device)

    def given(arrays: Iterable[Any]) -> Any:
        return fn.external_source(source=[list(arrays)], batch=True)

    @pipeline_def(batch_size=len(files), num_threads=1, device_id=device.index)
    def define() -> tuple[Any, ...]:
        source = fn.decoders.image(given(files), **decoding) if once else given(files)
        boxes_V = [(given(boxes_N4[:, :2]), given(boxes_N4[:, 2:])) for boxes_N4 in boxes_VN4]
        return tuple(_fixed_view(source, box, fixed.crop_px, once, decoding) for box in boxes_V)

    pipeline = define()
    pipeline.build()
    return np.stack([views.as_cpu().as_array() for views in pipeline.run()], axis=1)


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
_ONLY_CROPS = (
    f"measured for crops only; the recipe is measured with DALI's faster way, {contract.DALI_ONCE!r}"
)


def _peer(name: str, once: bool, device: torch.device) -> Peer:
    how = f"{_ON_CPU if device.type == 'cpu' else _ON_GPU}; {_ONCE if once else _TWICE}"
    work = partial(PeerWork, queued=_PREFETCHED + 1, settle=synchronizer(device))
    return Peer(
        name,
        work(partial(_run, once, False, device), how),
        work(partial(_run, once, True, device), f"{how}; {_PHOTOMETRIC}"),
        partial(_fixed_crops, once, device),
    )


_CPU = torch.device("cpu")
PEERS = [
    _peer(contract.DALI_ONCE, True, _CPU),
    replace(_peer(contract.DALI_TWICE, False, _CPU), recipe=_ONLY_CROPS),
]


def gpu_peers(device: torch.device) -> list[Peer]:
    """Return the same graphs on a GPU; on the device ``cpu`` they run there."""
    return [_peer(contract.DALI_GPU_ONCE, True, device), _peer(contract.DALI_GPU_TWICE, False, device)]
