"""What the photometric stage does to each view: drawn on the host, one small row of numbers for a view.

An operation that does not fire gets its identity: factor 1, hue 0, blur 0. Flipping is not among them, it is
part of the crop (:mod:`pipelines.augment.crops`).

Shape letters: N samples, V views, P parameters.
"""

import numpy as np
from numpy.typing import NDArray

from pipelines.kernels.compiled import kernel
from pipelines.randomness import Purpose, key_of, words
from pipelines.recipe import Recipe

# Columns of the parameters.
BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, BLUR, SOLARIZE = range(7)
# Columns 7 … 12: which blend (0 for none) goes into each of the three places before the hue shift and the
# three after it. Hue is the dear one, so it is computed once.
PLACES = slice(7, 13)
BY_BRIGHTNESS, BY_CONTRAST, BY_SATURATION = 1, 2, 3
NUM_PARAMETERS = 13
SOLARIZE_FROM = 127.5 / 255  # of 255 levels 128 is the first, also when rounded to 16 bits
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as PIL and torchvision use it

_PHOTOMETRIC = int(Purpose.PHOTOMETRIC)
_BLOCKS = 4
"""Of four draws each."""
_FIRST_PLACE = PLACES.start


def blur_radius_px(largest_sigma: float, side: int) -> int:
    """How far the blur's kernel reaches: three times the largest standard deviation, at most side − 1."""
    return min(int(3 * largest_sigma + 0.5), side - 1)


def draw_parameters(recipe: Recipe, seed: int, epoch: int, index_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """(V, N, P) float32 parameters of all views of each sample; columns are named at the top of this file."""
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue_turns)
    probabilities = (recipe.jitter_prob, recipe.grey_prob, recipe.solarize_prob, recipe.blur_prob)
    params_VNP = np.zeros((recipe.num_views, len(index_N), NUM_PARAMETERS), np.float32)
    _draw(key_of(seed), epoch, index_N, strengths, probabilities, recipe.blur_sigma_px, params_VNP)
    return params_VNP


@kernel
def _draw(
    key: int,
    epoch: int,
    index_N: NDArray[np.int64],
    strengths: tuple[float, float, float, float],
    probabilities: tuple[float, float, float, float],
    sigma_range: tuple[float, float],
    params_VNP: NDArray[np.float32],
) -> None:
    u = np.empty(4 * _BLOCKS, np.float32)
    for v in range(params_VNP.shape[0]):
        for n in range(len(index_N)):
            for block in range(_BLOCKS):
                drawn = words(key, epoch, index_N[n], _PHOTOMETRIC, v, block)
                for i in range(4):
                    # The upper 24 bits: what a float32 in [0, 1) can hold.
                    u[4 * block + i] = np.float32(drawn[i] >> 8) * np.float32(2.0**-24)
            params = params_VNP[v, n]
            jitter = u[0] < probabilities[0]
            params[GREY] = u[1] < probabilities[1]
            params[SOLARIZE] = u[2] < probabilities[2]
            if u[3] < probabilities[3]:
                params[BLUR] = sigma_range[0] + (sigma_range[1] - sigma_range[0]) * u[4]
            for column in range(3):
                strength = strengths[column] if jitter else 0.0
                params[BRIGHTNESS + column] = 1 + strength * (2 * u[5 + column] - 1)
            params[HUE] = strengths[3] * (2 * u[8] - 1) if jitter else 0.0
            _place(u[9:13], params)


@kernel
def _place(key_4: NDArray[np.float32], params: NDArray[np.float32]) -> None:
    """Turn four random keys, of brightness, contrast, saturation and hue, into the order of the four."""
    hue_rank = 0
    for j in range(3):
        hue_rank += key_4[j] <= key_4[3]
    for which in range(3):
        rank = key_4[3] < key_4[which]
        for j in range(3):
            rank += key_4[j] < key_4[which] or (key_4[j] == key_4[which] and j < which)
        place = rank if rank < hue_rank else rank - hue_rank - 1 + 3
        params[_FIRST_PLACE + place] = which + 1
