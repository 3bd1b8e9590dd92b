"""Random draws: the distributions of our boxes and parameters compared with torchvision's.

All backends use these draws. Distributions are compared by the Kolmogorov-Smirnov statistic, frequencies by
their difference.

Shape letters: N samples, V views, P parameters.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop

from pipelines.augment import draws as columns
from pipelines.augment.draws import draw_boxes, draw_parameters
from pipelines.randomness import Draw
from pipelines.recipe import Recipe
from tests.parity.comparisons import FIRING, MEASURES, NUM_DRAWS, Errors, Row

Floats = NDArray[np.float64]
DrawBoxes = Callable[[Recipe, Draw, NDArray[np.int64]], NDArray[np.int32]]
DrawParameters = Callable[[Recipe, Draw], NDArray[np.float32]]

_SIZES_PX = ((375, 500), (640, 200))
"""Height, width. In the second most boxes do not fit, which exercises torchvision's fallback."""


def rows(
    draw_boxes: DrawBoxes = draw_boxes, draw_parameters: DrawParameters = draw_parameters
) -> Iterator[Row]:
    """Compare boxes, factors, orders, and the frequency of each operation."""
    yield from _crop_rows(draw_boxes)
    draw = Draw(1, 0, np.arange(NUM_DRAWS))
    boxes_NV5 = draw_boxes(FIRING, draw, np.full((NUM_DRAWS, 2), 300))
    params_NP = np.concatenate(draw_parameters(FIRING, draw))
    yield from _factor_rows(params_NP)
    yield _order_row(params_NP)
    jittered_N = (params_NP[:, [columns.BRIGHTNESS, columns.CONTRAST, columns.SATURATION]] != 1).any(axis=1)
    for name, fired_A, probability in (
        ("flip", boxes_NV5[..., 4], FIRING.flip_prob),
        ("jitter", jittered_N | (params_NP[:, columns.HUE] != 0), FIRING.jitter_prob),
        ("grey", params_NP[:, columns.GREY] > 0, FIRING.grey_prob),
        ("blur", params_NP[:, columns.BLUR] > 0, FIRING.blur_prob),
        ("solarise", params_NP[:, columns.SOLARIZE] > 0, FIRING.solarize_prob),
    ):
        errors = Errors()
        errors.add(fired_A.mean(), probability)
        yield errors.row(MEASURES[f"how often: {name}"])


def _crop_rows(draw_boxes: DrawBoxes) -> Iterator[Row]:
    errors = {name: Errors() for name in ("crop, area", "crop, ratio", "crop, centre")}
    for height, width in _SIZES_PX:
        size_N2 = np.broadcast_to([height, width], (NUM_DRAWS, 2)).astype(np.int64)
        ours_N4 = draw_boxes(FIRING, Draw(0, 0, np.arange(NUM_DRAWS)), size_N2)[:, 0, :4].astype(np.float64)
        theirs_N4 = _torchvision_boxes(height, width)
        for name, describe in (
            ("crop, area", lambda box: box[:, 2] * box[:, 3]),
            ("crop, ratio", lambda box: np.log(box[:, 3] / box[:, 2])),
            ("crop, centre", lambda box: box[:, 0] + box[:, 2] / 2),
            ("crop, centre", lambda box: box[:, 1] + box[:, 3] / 2),
        ):
            errors[name].add_distance(describe(ours_N4), describe(theirs_N4))
    for name, found in errors.items():
        yield found.row(MEASURES[name])


@cache
def _torchvision_boxes(height: int, width: int) -> Floats:
    """(N, 4) top, left, height, width."""
    image = torch.empty(3, height, width)
    scale, ratio = list(FIRING.crop_scale), list(FIRING.crop_ratio)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        boxes = [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(NUM_DRAWS)]
    return np.array(boxes, np.float64)


def _factor_rows(params_NP: NDArray[np.float32]) -> Iterator[Row]:
    places = {
        "brightness": columns.BRIGHTNESS,
        "contrast": columns.CONTRAST,
        "saturation": columns.SATURATION,
        "hue": columns.HUE,
    }
    theirs_N4, sigma_N = _torchvision_factors()
    fired_A = params_NP[:, columns.HUE] != 0
    drawn = {
        name: (params_NP[fired_A, place], theirs_N4[:, i]) for i, (name, place) in enumerate(places.items())
    }
    drawn["blur"] = (params_NP[params_NP[:, columns.BLUR] > 0, columns.BLUR], sigma_N)
    for name, (ours_A, theirs_N) in drawn.items():
        errors = Errors()
        errors.add_distance(ours_A, theirs_N)
        yield errors.row(MEASURES[f"factor: {name}"])


@cache
def _torchvision_factors() -> tuple[Floats, Floats]:
    """(N, 4) factors of brightness, contrast, saturation and hue, and (N,) sigmas of the blur."""
    strengths = (FIRING.brightness, FIRING.contrast, FIRING.saturation)
    ranges = [(1 - strength, 1 + strength) for strength in strengths]
    ranges.append((-FIRING.hue_turns, FIRING.hue_turns))
    low, high = FIRING.blur_sigma_px
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        factors_N4 = np.array([ColorJitter.get_params(*ranges)[1:] for _ in range(NUM_DRAWS)])
        sigma_N = np.array([GaussianBlur.get_params(low, high) for _ in range(NUM_DRAWS)])
    return factors_N4, sigma_N


def _order_row(params_NP: NDArray[np.float32]) -> Row:
    """Compare the frequency of each of the 24 orders of the four jitters."""
    # Hue, here a 4, comes between the third place and the fourth; zeros are empty places.
    places_N7 = np.insert(params_NP[:, columns.PLACES].astype(np.int64), 3, 4, axis=1)
    orders_N4 = places_N7[places_N7 > 0].reshape(-1, 4)
    shares = [(orders_N4 == order).all(axis=1).mean() for order in itertools.permutations((1, 2, 3, 4))]
    errors = Errors()
    errors.add(shares, np.full(len(shares), 1 / len(shares)))
    return errors.row(MEASURES["order of the jitters"])
