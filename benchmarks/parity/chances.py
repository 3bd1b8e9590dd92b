"""What is drawn at random: our boxes and parameters beside torchvision's, as distributions.

Everybody draws by these functions, whatever the backend. Distributions are compared by the greatest distance
between their distribution functions (Kolmogorov and Smirnov), shares by their difference.

Shape letters: N samples, V views, P parameters.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop

from benchmarks.parity.limits import FIRING, MEASURES, NUM_DRAWS
from benchmarks.parity.measures import Errors, Row
from pipelines.augment.draws import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    GREY,
    HUE,
    PLACES,
    SATURATION,
    SOLARIZE,
    draw_boxes,
    draw_parameters,
)
from pipelines.randomness import Draw
from pipelines.recipe import Recipe

EVERYBODY = "all backends"
Floats = NDArray[np.float64]
DrawBoxes = Callable[[Recipe, Draw, NDArray[np.int64]], NDArray[np.int32]]
DrawParameters = Callable[[Recipe, Draw], NDArray[np.float32]]

_SIZES_PX = ((375, 500), (640, 200))
"""Height, width. In the second most boxes do not fit, so that torchvision's fallback has its say."""


def add_distance(errors: Errors, ours: ArrayLike, theirs: ArrayLike) -> None:
    """Count the distances between the distribution functions of two samples."""
    ours_A, theirs_B = np.sort(np.asarray(ours, np.float64)), np.sort(np.asarray(theirs, np.float64))
    at = np.concatenate([ours_A, theirs_B])
    errors.add(
        np.searchsorted(ours_A, at, side="right") / len(ours_A),
        np.searchsorted(theirs_B, at, side="right") / len(theirs_B),
    )


def rows(
    draw_boxes: DrawBoxes = draw_boxes, draw_parameters: DrawParameters = draw_parameters
) -> Iterator[Row]:
    """Boxes, then flips, factors, orders and how often each operation fires."""
    yield from _crop_rows(draw_boxes)
    draw = Draw(1, 0, np.arange(NUM_DRAWS))
    boxes_NV5 = draw_boxes(FIRING, draw, np.full((NUM_DRAWS, 2), 300))
    params_NP = np.concatenate(draw_parameters(FIRING, draw))
    yield from _factor_rows(params_NP)
    yield from _order_rows(params_NP)
    fired = {
        "flip": boxes_NV5[..., 4],
        "jitter": (params_NP[:, [BRIGHTNESS, CONTRAST, SATURATION]] != 1).any(axis=1)
        | (params_NP[:, HUE] != 0),
        "grey": params_NP[:, GREY] > 0,
        "blur": params_NP[:, BLUR] > 0,
        "solarise": params_NP[:, SOLARIZE] > 0,
    }
    for name, fired_A in fired.items():
        errors = Errors()
        errors.add(fired_A.mean(), getattr(FIRING, _PROBABILITIES[name]))
        yield errors.row(MEASURES[f"how often: {name}"], EVERYBODY)


_PROBABILITIES = {
    "flip": "flip_prob",
    "jitter": "jitter_prob",
    "grey": "grey_prob",
    "blur": "blur_prob",
    "solarise": "solarize_prob",
}


def _crop_rows(draw_boxes: DrawBoxes) -> Iterator[Row]:
    errors = {name: Errors() for name in ("crop, area", "crop, ratio", "crop, centre")}
    for height, width in _SIZES_PX:
        size_N2 = np.broadcast_to([height, width], (NUM_DRAWS, 2)).astype(np.int64)
        draw = Draw(0, 0, np.arange(NUM_DRAWS))
        ours_N4 = draw_boxes(FIRING, draw, size_N2)[:, 0, :4].astype(np.float64)
        theirs_N4 = _torchvision_boxes(height, width)
        for name, describe in (
            ("crop, area", lambda box: box[:, 2] * box[:, 3]),
            ("crop, ratio", lambda box: np.log(box[:, 3] / box[:, 2])),
            ("crop, centre", lambda box: box[:, 0] + box[:, 2] / 2),
            ("crop, centre", lambda box: box[:, 1] + box[:, 3] / 2),
        ):
            add_distance(errors[name], describe(ours_N4), describe(theirs_N4))
    for name, found in errors.items():
        yield found.row(MEASURES[name], EVERYBODY)


@cache
def _torchvision_boxes(height: int, width: int) -> Floats:
    """(N, 4) top, left, height, width."""
    picture = torch.empty(3, height, width)
    scale, ratio = list(FIRING.crop_scale), list(FIRING.crop_ratio)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return np.array(
            [RandomResizedCrop.get_params(picture, scale, ratio) for _ in range(NUM_DRAWS)], np.float64
        )


def _factor_rows(params_NP: NDArray[np.float32]) -> Iterator[Row]:
    columns = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}
    theirs_N4, sigma_N = _torchvision_factors()
    fired_A = params_NP[:, HUE] != 0
    for column, (name, place) in enumerate(columns.items()):
        errors = Errors()
        add_distance(errors, params_NP[fired_A, place], theirs_N4[:, column])
        yield errors.row(MEASURES[f"factor: {name}"], EVERYBODY)
    errors = Errors()
    add_distance(errors, params_NP[params_NP[:, BLUR] > 0, BLUR], sigma_N)
    yield errors.row(MEASURES["factor: blur"], EVERYBODY)


@cache
def _torchvision_factors() -> tuple[Floats, Floats]:
    """(N, 4) factors of brightness, contrast, saturation and hue, and (N,) deviations of the blur."""
    strengths = (FIRING.brightness, FIRING.contrast, FIRING.saturation)
    ranges = [(1 - strength, 1 + strength) for strength in strengths] + [
        (-FIRING.hue_turns, FIRING.hue_turns)
    ]
    low, high = FIRING.blur_sigma_px
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        factors_N4 = np.array([ColorJitter.get_params(*ranges)[1:] for _ in range(NUM_DRAWS)])
        sigma_N = np.array([GaussianBlur.get_params(low, high) for _ in range(NUM_DRAWS)])
    return factors_N4, sigma_N


def _order_rows(params_NP: NDArray[np.float32]) -> Iterator[Row]:
    """How often each of the 24 orders of the four jitters comes."""
    # Hue, here a 4, stands between the third place and the fourth; zeros are empty places.
    places_N7 = np.insert(params_NP[:, PLACES].astype(np.int64), 3, 4, axis=1)
    orders_N4 = places_N7[places_N7 > 0].reshape(-1, 4)
    shares = [(orders_N4 == order).all(axis=1).mean() for order in itertools.permutations((1, 2, 3, 4))]
    errors = Errors()
    errors.add(shares, np.full(len(shares), 1 / len(shares)))
    yield errors.row(MEASURES["order of the jitters"], EVERYBODY)
