"""DALI by itself, on the CPU or a GPU: its own reader, decoder, random crops and photometric operators.

Shape letters: N batch, V views, S side in pixels.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from benchmarks.peers.contract import (
    DALI_GPU_ONCE,
    DALI_GPU_TWICE,
    DALI_ONCE,
    DALI_TWICE,
    FixedCrops,
    Job,
    Peer,
    Work,
    settle,
)
from pipelines.recipe import Recipe

_BATCHES_AHEAD = 2
_SHUFFLED_FILES = 1024
_DEGREES_PER_TURN = 360
# DALI documents the fast inverse transform as up to 14 % faster.
_DECODE = {"output_type": types.RGB, "use_fast_idct": True}
_RESAMPLE = {"antialias": True, "interp_type": types.INTERP_LINEAR}
_Crops = Callable[[Any, Recipe, str], tuple[Any, ...]]
"""Encoded pictures, the recipe and the decoder's device to V crops; what follows is on the decoder's side."""


def _run(job: Job, cut: _Crops, device_id: int | None, *, augmented: bool) -> Iterator[object]:
    """Build the pipeline and run it without end.

    Gives V views (N, S, S, 3), on the host as DALI's own lists of tensors, from a GPU as torch's tensors of
    the same memory.
    """

    @pipeline_def(
        batch_size=job.batch_size,
        num_threads=job.num_threads,
        device_id=device_id,
        exec_dynamic=True,
        prefetch_queue_depth=_BATCHES_AHEAD,
        enable_conditionals=augmented,
        seed=0,
    )
    def define() -> tuple[Any, ...]:
        encoded, _ = fn.readers.file(
            file_root=str(job.folder), random_shuffle=True, initial_fill=_SHUFFLED_FILES
        )
        crops = cut(encoded, job.recipe, _decoder(device_id))
        return tuple(_augment(crop, job.recipe) for crop in crops) if augmented else crops

    pipeline = define()
    pipeline.build()
    # Given by position: a keyword would be taken for the name of an input.
    stream = None if device_id is None else torch.cuda.current_stream(device_id)
    while True:
        views = pipeline.run(stream)
        if device_id is None:
            yield views
        else:
            yield tuple(torch.utils.dlpack.from_dlpack(view.as_tensor()) for view in views)


def _decoder(device_id: int | None) -> str:
    """The decoder's device: DALI's mixed one takes bytes of the host and leaves pixels on the GPU."""
    return "cpu" if device_id is None else "mixed"


def _crops_of_one_decode(encoded: Any, recipe: Recipe, decoder: str) -> tuple[Any, ...]:
    picture = fn.decoders.image(encoded, device=decoder, **_DECODE)
    return tuple(
        fn.random_resized_crop(
            picture,
            size=recipe.crop_px,
            random_area=recipe.crop_scale,
            random_aspect_ratio=recipe.crop_ratio,
            **_RESAMPLE,
        )
        for _ in range(recipe.num_views)
    )


def _crops_of_regions(encoded: Any, recipe: Recipe, decoder: str) -> tuple[Any, ...]:
    return tuple(
        fn.resize(
            fn.decoders.image_random_crop(
                encoded,
                device=decoder,
                random_area=recipe.crop_scale,
                random_aspect_ratio=recipe.crop_ratio,
                **_DECODE,
            ),
            size=[recipe.crop_px, recipe.crop_px],
            **_RESAMPLE,
        )
        for _ in range(recipe.num_views)
    )


def _happens(probability: float) -> Any:
    """0 or 1 per sample, as float so that it can switch a parameter."""
    return fn.cast(fn.random.coin_flip(probability=probability), dtype=types.FLOAT)


def _augment(crop: Any, recipe: Recipe) -> Any:
    """Jitter and grey in one colour matrix, blur where it happens, flip and normalise in one pass."""
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
    view = _maybe_blur(view, recipe)
    return fn.crop_mirror_normalize(
        view,
        mirror=fn.random.coin_flip(probability=recipe.flip_prob),
        dtype=types.FLOAT,
        output_layout="HWC",
        mean=[255 * mean for mean in recipe.mean],
        std=[255 * std for std in recipe.std],
    )


def _maybe_blur(view: Any, recipe: Recipe) -> Any:
    blurred = fn.random.coin_flip(probability=recipe.blur_prob, dtype=types.BOOL)
    sigma = fn.random.uniform(range=list(recipe.blur_sigma_px))
    # DALI rewrites this branch so that only the samples it holds for are blurred.
    if blurred:  # noqa: SIM108 – DALI rewrites statements, not expressions
        result = fn.gaussian_blur(view, sigma=sigma)
    else:
        result = view
    return result


def _fixed_crops(
    cut: Callable[[Any, Any, Any, int, str], Any], device_id: int | None, asked: FixedCrops
) -> NDArray[np.uint8]:
    crops_NVSS3 = asked.empty()
    num, num_views = crops_NVSS3.shape[:2]
    encoded = [np.frombuffer(file.read_bytes(), np.uint8) for file in asked.files]

    @pipeline_def(batch_size=num, num_threads=1, device_id=device_id)
    def define(corner_N2: NDArray[np.float32], extent_N2: NDArray[np.float32]) -> Any:
        payload = fn.external_source(source=[encoded], batch=True)
        corner = fn.external_source(source=[list(corner_N2)], batch=True)
        extent = fn.external_source(source=[list(extent_N2)], batch=True)
        return cut(payload, corner, extent, asked.crop_px, _decoder(device_id))

    for v in range(num_views):
        boxes_N4 = asked.boxes_NV4[:, v].astype(np.float32)
        pipeline = define(boxes_N4[:, :2], boxes_N4[:, 2:])
        pipeline.build()
        (crops,) = pipeline.run()
        crops_NVSS3[:, v] = crops.as_cpu().as_array()
    return crops_NVSS3


def _cut_of_one_decode(payload: Any, corner: Any, extent: Any, crop_px: int, decoder: str) -> Any:
    picture = fn.decoders.image(payload, device=decoder, **_DECODE)
    size = [crop_px, crop_px]
    return fn.resize(picture, size=size, roi_start=corner, roi_end=corner + extent, **_RESAMPLE)


def _cut_of_region(payload: Any, corner: Any, extent: Any, crop_px: int, decoder: str) -> Any:
    absolute: dict[str, Any] = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
    region = fn.decoders.image_slice(payload, corner, extent, device=decoder, **absolute, **_DECODE)
    return fn.resize(region, size=[crop_px, crop_px], **_RESAMPLE)


_ON_CPU = (
    "DALI without a GPU, fn.readers.file with shuffling, dynamic executor, antialias=True with the linear "
    "(triangular) filter, the fast inverse transform; batches stay DALI's own, without a copy to torch"
)
_ON_GPU = (
    "DALI with mixed decoding, fn.readers.file with shuffling, dynamic executor, the rest on the GPU, "
    "antialias=True with the linear (triangular) filter; batches become torch's by DLPack, without a copy"
)
_ONCE = "fn.decoders.image once, fn.random_resized_crop twice"
_TWICE = "fn.decoders.image_random_crop and fn.resize for each view"
_PHOTOMETRIC = (
    "jitter and grey are one fn.color_twist (brightness, contrast about mid-grey, saturation and hue as one "
    "matrix in YIQ, in a fixed order, where torchvision draws the order and turns hue in HSV), "
    "fn.gaussian_blur only where it fires, flip and normalisation in fn.crop_mirror_normalize"
)


def _peers(device_id: int | None, names: tuple[str, str], setup: str, *, recipe_by_both: bool) -> list[Peer]:
    """The two ways, the first of them the one that decodes once."""
    wait = None if device_id is None else settle(torch.device("cuda", device_id))

    def work(cut: _Crops, how: str, *, augmented: bool) -> Work:
        run = partial(_run, cut=cut, device_id=device_id, augmented=augmented)
        sentence = f"{setup}; {how}" + (f"; {_PHOTOMETRIC}" if augmented else "")
        return Work(run, sentence, queued=_BATCHES_AHEAD + 1, settle=wait)

    reason = f"measured for crops only; the recipe is measured with DALI's faster way, {names[0]!r}"
    return [
        Peer(
            names[0],
            crops=work(_crops_of_one_decode, _ONCE, augmented=False),
            recipe=work(_crops_of_one_decode, _ONCE, augmented=True),
            fixed_crops=partial(_fixed_crops, _cut_of_one_decode, device_id),
            antialiased=True,
        ),
        Peer(
            names[1],
            crops=work(_crops_of_regions, _TWICE, augmented=False),
            recipe=work(_crops_of_regions, _TWICE, augmented=True) if recipe_by_both else reason,
            fixed_crops=partial(_fixed_crops, _cut_of_region, device_id),
            antialiased=True,
        ),
    ]


PEERS = _peers(None, (DALI_ONCE, DALI_TWICE), _ON_CPU, recipe_by_both=False)


def gpu_peers(device: torch.device) -> list[Peer]:
    """The same graphs on a GPU; on the device ``cpu`` they run there. Which is faster is not known before."""
    device_id = (device.index or 0) if device.type == "cuda" else None
    return _peers(device_id, (DALI_GPU_ONCE, DALI_GPU_TWICE), _ON_GPU, recipe_by_both=True)
