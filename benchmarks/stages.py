"""Where our loader's time goes: microseconds per picture of each stage, on one thread.

Every stage is run by itself over the same pictures; the stages take turns, and each one's median counts. A
stage that cannot be run alone is the difference of two runs, with it and without it.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines import PictureSet, open_set
from pipelines.augment.draws import draw_boxes, draw_parameters
from pipelines.augment.photometric_cpu import augment_on_cpu
from pipelines.decode.turbo import TurboDecoder
from pipelines.randomness import Draw
from pipelines.recipe import Recipe

_REPEATS = 7
_AT_ONCE = 16
"""Pictures per call, about what a worker of the loader takes."""


def measure(path: str | Path, recipe: Recipe, num: int) -> dict[str, float]:
    """Time the stages on the first ``num`` pictures of a compiled set, its pages in memory.

    Args:
        path: a ``.beton`` set.
        recipe: what is done to the pictures.
        num: how many pictures; a multiple of 16 is taken.

    Returns:
        Stage → median microseconds per picture, all its views together: drawing (boxes and parameters),
        decoding, cropping, jitter and grey, blur, normalising.

    Raises:
        ValueError: if the set has fewer than 16 pictures.
    """
    images, decoder = open_set(path, "map"), TurboDecoder()
    num = min(num, images.count) // _AT_ONCE * _AT_ONCE
    if num == 0:
        raise ValueError(f"{path} has {images.count} pictures; {_AT_ONCE} at least are needed")
    times: dict[str, list[float]] = {}
    for repeat in range(_REPEATS + 1):
        for name, task in _tasks(images, decoder, recipe).items():
            started = time.perf_counter()
            for first in range(0, num, _AT_ONCE):
                task(np.arange(first, first + _AT_ONCE))
            if repeat:  # the first round compiles and warms up
                times.setdefault(name, []).append((time.perf_counter() - started) / num * 1e6)
    whole = {name: statistics.median(values) for name, values in times.items()}
    return {
        "drawing": whole["drawing"],
        "decoding": whole["decoding"],
        "cropping": whole["crops"] - whole["decoding"] - whole["drawing"] / 2,
        "jitter and grey": whole["without blur"] - whole["normalising"],
        "blur": whole["photometric"] - whole["without blur"],
        "normalising": whole["normalising"],
    }


def _tasks(
    images: PictureSet, decoder: TurboDecoder, recipe: Recipe
) -> dict[str, Callable[[NDArray[np.int64]], object]]:
    """What is timed, each over the pictures of one index array."""
    shape = (_AT_ONCE, recipe.num_views, recipe.crop_px, recipe.crop_px, 3)
    views = np.zeros(shape, np.uint8)
    floats = np.zeros((shape[1], shape[0], *shape[2:]), np.float32)
    no_boxes = np.zeros((_AT_ONCE, 0, 5), np.int32)

    def crop(index: NDArray[np.int64]) -> None:
        encoded = images.fetch(index)
        decoder.crop(encoded, draw_boxes(recipe, Draw(0, 0, index), encoded.size_N2), views)

    def draw(index: NDArray[np.int64]) -> None:
        draw_boxes(recipe, Draw(0, 0, index), images.fetch(index).size_N2)
        draw_parameters(recipe, Draw(0, 0, index))

    def augment(what: Recipe) -> Callable[[NDArray[np.int64]], None]:
        return lambda index: augment_on_cpu(views, draw_parameters(what, Draw(0, 0, index)), what, floats)

    sharp = dataclasses.replace(recipe, blur_prob=0.0)
    plain = dataclasses.replace(sharp, jitter_prob=0.0, grey_prob=0.0, solarize_prob=0.0)
    return {
        "drawing": draw,
        "decoding": lambda index: decoder.crop(images.fetch(index), no_boxes, views[:, :0]),
        "crops": crop,
        "photometric": augment(recipe),
        "without blur": augment(sharp),
        "normalising": augment(plain),
    }
