"""DALI on the CPU: its own reader, decoder, random crops and photometric operators.

Shape letters: N batch, V views, S side in pixels.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from benchmarks.peers.contract import DALI_ONCE, DALI_TWICE, FixedCrops, Job, Peer, Work
from pipelines.recipe import Recipe

_BATCHES_AHEAD = 2
_SHUFFLED_FILES = 1024
_DEGREES_PER_TURN = 360
# DALI documents the fast inverse transform as up to 14 % faster.
_DECODE = {"device": "cpu", "output_type": types.RGB, "use_fast_idct": True}
_RESAMPLE = {"antialias": True, "interp_type": types.INTERP_LINEAR}


def _run(job: Job, views: Callable[[Any, Recipe], tuple[Any, ...]], conditionals: bool) -> Iterator[object]:
    """Build the pipeline and run it without end; outputs are DALI's own lists of tensors."""

    @pipeline_def(
        batch_size=job.batch_size,
        num_threads=job.num_threads,
        device_id=None,
        exec_dynamic=True,
        prefetch_queue_depth=_BATCHES_AHEAD,
        enable_conditionals=conditionals,
        seed=0,
    )
    def define() -> tuple[Any, ...]:
        encoded, _ = fn.readers.file(
            file_root=str(job.folder), random_shuffle=True, initial_fill=_SHUFFLED_FILES
        )
        return views(encoded, job.recipe)

    pipeline = define()
    pipeline.build()
    while True:
        yield pipeline.run()


def _crops_of_one_decode(encoded: Any, recipe: Recipe) -> tuple[Any, ...]:
    picture = fn.decoders.image(encoded, **_DECODE)
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


def _crops_of_regions(encoded: Any, recipe: Recipe) -> tuple[Any, ...]:
    return tuple(
        fn.resize(
            fn.decoders.image_random_crop(
                encoded, random_area=recipe.crop_scale, random_aspect_ratio=recipe.crop_ratio, **_DECODE
            ),
            size=[recipe.crop_px, recipe.crop_px],
            **_RESAMPLE,
        )
        for _ in range(recipe.num_views)
    )


def _views(encoded: Any, recipe: Recipe) -> tuple[Any, ...]:
    return tuple(_augment(crop, recipe) for crop in _crops_of_one_decode(encoded, recipe))


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


def _fixed_crops(cut: Callable[[Any, Any, Any, int], Any], asked: FixedCrops) -> NDArray[np.uint8]:
    crops_NVSS3 = asked.empty()
    num, num_views = crops_NVSS3.shape[:2]
    encoded = [np.frombuffer(file.read_bytes(), np.uint8) for file in asked.files]

    @pipeline_def(batch_size=num, num_threads=1, device_id=None)
    def define(corner_N2: NDArray[np.float32], extent_N2: NDArray[np.float32]) -> Any:
        payload = fn.external_source(source=[encoded], batch=True)
        corner = fn.external_source(source=[list(corner_N2)], batch=True)
        extent = fn.external_source(source=[list(extent_N2)], batch=True)
        return cut(payload, corner, extent, asked.crop_px)

    for v in range(num_views):
        boxes_N4 = asked.boxes_NV4[:, v].astype(np.float32)
        pipeline = define(boxes_N4[:, :2], boxes_N4[:, 2:])
        pipeline.build()
        (crops,) = pipeline.run()
        crops_NVSS3[:, v] = crops.as_array()
    return crops_NVSS3


def _cut_of_one_decode(payload: Any, corner: Any, extent: Any, crop_px: int) -> Any:
    picture = fn.decoders.image(payload, **_DECODE)
    size = [crop_px, crop_px]
    return fn.resize(picture, size=size, roi_start=corner, roi_end=corner + extent, **_RESAMPLE)


def _cut_of_region(payload: Any, corner: Any, extent: Any, crop_px: int) -> Any:
    absolute: dict[str, Any] = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
    region = fn.decoders.image_slice(payload, corner, extent, **absolute, **_DECODE)
    return fn.resize(region, size=[crop_px, crop_px], **_RESAMPLE)


_SETUP = (
    "DALI without a GPU, fn.readers.file with shuffling, dynamic executor, antialias=True with the linear "
    "(triangular) filter, the fast inverse transform; batches stay DALI's own, without a copy to torch"
)
_RECIPE = (
    f"{_SETUP}; jitter and grey are one fn.color_twist (brightness, contrast about mid-grey, saturation and "
    "hue as one matrix in YIQ, in a fixed order, where torchvision draws the order and turns hue in HSV), "
    "fn.gaussian_blur only where it fires, flip and normalisation in fn.crop_mirror_normalize"
)
PEERS = [
    Peer(
        DALI_ONCE,
        crops=Work(
            partial(_run, views=_crops_of_one_decode, conditionals=False),
            f"{_SETUP}; fn.decoders.image once, fn.random_resized_crop twice",
            queued=_BATCHES_AHEAD + 1,
        ),
        recipe=Work(partial(_run, views=_views, conditionals=True), _RECIPE, queued=_BATCHES_AHEAD + 1),
        fixed_crops=partial(_fixed_crops, _cut_of_one_decode),
        antialiased=True,
    ),
    Peer(
        DALI_TWICE,
        crops=Work(
            partial(_run, views=_crops_of_regions, conditionals=False),
            f"{_SETUP}; fn.decoders.image_random_crop and fn.resize for each view",
            queued=_BATCHES_AHEAD + 1,
        ),
        recipe=f"measured for crops only; the recipe is measured with DALI's faster way, {DALI_ONCE!r}",
        fixed_crops=partial(_fixed_crops, _cut_of_region),
        antialiased=True,
    ),
]
