"""Every comparison with its reference, its limits and the reason for them; errors, and the verdict on them.

A comparison passes when its mean error and its largest error are both within their limits. Comparisons of
operations that the loader does not use are for information and may fail.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pipelines.recipe import Mixing, moco_v2

GREY_LEVELS, SHARE, KS, NORMALISED = "grey levels", "share", "KS distance", "normalised value"
"""Units: 1/255 of the range; a fraction of 1; the Kolmogorov-Smirnov statistic; after mean and std."""
NUM_DRAWS = 20_000
"""Samples of each random distribution."""
NUM_UNMIX = 1_000
"""Un-Mix batches; about half of them are global mixtures."""
GRID_CELL_DRAWS = 40_000
FIRING = dataclasses.replace(moco_v2(), solarize_prob=0.2)
"""MoCo v2 with solarisation, so that its frequency can be measured."""
_NUM_JITTERED, _NUM_BLURRED = 2 * NUM_DRAWS * FIRING.jitter_prob, 2 * NUM_DRAWS * FIRING.blur_prob
"""Expected number of views that an operation applies to; each sample has two views."""
_KS_SIGNIFICANCE = 1e-4
_SIGMAS = 4.0


@dataclass(frozen=True)
class Measure:
    """One comparison and its limits."""

    operation: str
    against: str
    """The reference, in words."""
    unit: str
    mean_tolerance: float
    tolerance: float
    """Limit of the largest error."""
    why: str
    """Why the limits are no smaller."""


@dataclass(frozen=True)
class Row(Measure):
    """The result of a comparison."""

    backend: str
    how: str
    """The call that was measured, where the backend's name does not identify it."""
    mean_error: float
    max_error: float
    ok: bool
    used: bool
    """False for operations that the loader does not use: the row is for information."""


class Errors:
    """Mean and largest absolute difference, accumulated over several arrays."""

    def __init__(self) -> None:
        self._sum, self._count, self._max = 0.0, 0, 0.0

    def add(self, got: ArrayLike, expected: ArrayLike) -> None:
        """Add the differences of two arrays of the same shape."""
        got_A, expected_A = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        if got_A.shape != expected_A.shape:
            raise ValueError(f"{got_A.shape} values cannot be compared with {expected_A.shape}")
        difference = np.abs(got_A - expected_A)
        self._sum += float(difference.sum())
        self._count += difference.size
        # Python's max would drop NaN; NumPy's keeps it.
        self._max = float(np.max([self._max, difference.max()]))

    def add_distance(self, ours: ArrayLike, theirs: ArrayLike) -> None:
        """Add the distances between the empirical distribution functions of two samples."""
        ours_A, theirs_B = np.sort(np.asarray(ours, np.float64)), np.sort(np.asarray(theirs, np.float64))
        at = np.concatenate([ours_A, theirs_B])
        self.add(
            np.searchsorted(ours_A, at, side="right") / len(ours_A),
            np.searchsorted(theirs_B, at, side="right") / len(theirs_B),
        )

    def row(
        self, measure: Measure, backend: str = "all backends", *, how: str = "", used: bool = True
    ) -> Row:
        """Return the result, with the verdict."""
        if self._count == 0:
            raise ValueError(f"nothing was measured of {measure.operation} by {backend}")
        mean, fields = self._sum / self._count, dataclasses.asdict(measure)
        fields |= {name: _rounded(fields[name]) for name in ("mean_tolerance", "tolerance")}
        fields |= {"mean_error": _rounded(mean), "max_error": _rounded(self._max)}
        ok = mean <= measure.mean_tolerance and self._max <= measure.tolerance
        return Row(**fields, backend=backend, how=how, ok=ok, used=used)


def _rounded(value: float) -> float:
    """Round to three digits; further ones change from one processor to the next."""
    return float(f"{value:.3g}")


def ks_limit(num_ours: int, num_theirs: int) -> float:
    """Return the critical distance of the two-sample Kolmogorov-Smirnov test."""
    return math.sqrt(-math.log(_KS_SIGNIFICANCE / 2) / 2 * (1 / num_ours + 1 / num_theirs))


def share_limit(share: float, num: int) -> float:
    """Return the limit for the difference between a probability and its frequency in ``num`` draws."""
    return _SIGMAS * math.sqrt(share * (1 - share) / num)


_KS_WHY = (
    f"two samples of one distribution exceed it once in {1 / _KS_SIGNIFICANCE:,.0f} times; seeds are fixed, "
    "so the row is the same in every run"
)
_SHARE_WHY = f"{_SIGMAS:g} standard deviations of the binomial distribution; seeds are fixed"
_PIL_CROP = "torchvision's resized_crop on Pillow images"
_ROUNDS = "Pillow truncates or rounds to whole grey levels after each step"
_GREY_TOO = f"{_ROUNDS}, including the grey that it blends with"
_EXACT = "an exact copy"
_FLOAT32 = "rounding of float32"
_LUMA_DIGITS = "torchvision's grey weighs red by 0.2989, Pillow's and ours by 0.299"
_TWO_PASSES = "Pillow rounds to whole grey levels between its two passes"


def _levels(operation: str, against: str, mean: float, largest: float, why: str) -> Measure:
    return Measure(operation, against, GREY_LEVELS, mean, largest, why)


def _decode(kind: str, largest: float, why: str) -> dict[str, Measure]:
    operation = f"decode {kind}"
    return {operation: _levels(operation, "Pillow's decoder", 0.5, largest, why)}


def _resize(direction: str) -> dict[str, Measure]:
    operation = f"resize, {direction}"
    planes = "resized_crop of Y, U and V in floats, colours converted afterwards"
    repeated = "resized_crop with the border's pixels repeated beyond it"
    return {
        f"{operation} / {reference}": _levels(operation, against, 0.5, largest, why)
        for reference, against, largest, why in (
            ("pixels", _PIL_CROP, 1, f"{_TWO_PASSES}, others may not"),
            ("planes", planes, 2, "each plane is rounded once, and the conversion weighs it by up to 1.8"),
            ("clamped", _PIL_CROP, 32,
             "colours outside RGB's range are clamped after resizing instead of before, which shows only "
             "at saturated edges, so the mean decides; against the planes the largest error is small"),
            ("repeated", repeated, 1, f"{_TWO_PASSES}, DALI does not"),
            ("bordered", _PIL_CROP, 32,
             "beyond the border DALI repeats the border's pixels and Pillow drops the filter's taps, so the "
             "outermost pixels differ where much is shrunk, and the mean decides"),
        )
    }  # fmt: skip


def _photometric(
    operation: str, pil: tuple[float, float, str], floats: tuple[float, float, str]
) -> dict[str, Measure]:
    return {
        f"{operation} / Pillow": _levels(operation, "torchvision on Pillow images", *pil),
        f"{operation} / floats": _levels(operation, "torchvision on float tensors", *floats),
    }


def _drawn(operation: str, against: str, num_ours: float = NUM_DRAWS) -> dict[str, Measure]:
    limit = ks_limit(int(num_ours), NUM_DRAWS)
    return {operation: Measure(operation, against, KS, limit, limit, _KS_WHY)}


def _frequency(name: str, share: float, num: int = 2 * NUM_DRAWS) -> dict[str, Measure]:
    against = f"probability {share:.4g} of the recipe"
    return _formula(f"how often: {name}", against, share_limit(share, num), _SHARE_WHY)


def _formula(
    operation: str, against: str, tolerance: float, why: str, unit: str = SHARE
) -> dict[str, Measure]:
    return {operation: Measure(operation, against, unit, tolerance, tolerance, why)}


_CHROMA = "a decoder may round chroma and colour together or one after the other"
_UNMIX = "λ · x + (1 − λ) · x[π], or a pasted rectangle, in NumPy"
_CROPS = "torchvision's RandomResizedCrop.get_params"
_JITTER = "torchvision's ColorJitter.get_params"

MEASURES: Mapping[str, Measure] = {
    **{key: found for kind in ("4:2:0", "4:2:2", "4:4:4", "progressive")
       for key, found in _decode(kind, 1, _CHROMA).items()},
    **_decode("grey", 4, "the converter re-encodes a grey JPEG in colour at quality 95"),
    **_resize("shrinking"),
    **_resize("enlarging"),
    **_formula("flip", "the mirror image of the crop without a flip", 0, _EXACT, GREY_LEVELS),
    **_photometric("brightness", (0.5, 1, _ROUNDS), (1e-3, 1e-3, _FLOAT32)),
    **_photometric("contrast", (0.75, 1.5, _GREY_TOO), (0.05, 0.05, _LUMA_DIGITS)),
    **_photometric("saturation", (0.75, 1.5, _GREY_TOO), (0.05, 0.05, _LUMA_DIGITS)),
    **_photometric(
        "hue",
        (1, 20, "Pillow's HSV has 256 hues and saturations; torchvision truncates the shift to one of them"),
        (1e-3, 0.01, _FLOAT32),
    ),
    **_photometric("grey", (0.5, 0.6, _ROUNDS), (0.05, 0.05, _LUMA_DIGITS)),
    **_photometric(
        "blur",
        (1, 40, "Pillow, as in MoCo's code, blurs by three box filters and repeats the border's pixels where "
                "torchvision reflects them; the largest errors are at the border"),
        (1e-3, 0.01, _FLOAT32),
    ),
    **_photometric("solarise", (1e-3, 1e-3, _FLOAT32), (1e-3, 1e-3, _FLOAT32)),
    **_photometric(
        "whole chain",
        (3, 60, "the rounding errors of up to seven steps add up, and Pillow's hue and blur differ"),
        (0.05, 1.1, "at solarisation's threshold the last bit decides, which is one grey level"),
    ),
    **_formula("normalise", "torchvision's normalize", 1e-5, _FLOAT32, NORMALISED),
    **_drawn("crop, area", _CROPS),
    **_drawn("crop, ratio", _CROPS),
    **_drawn("crop, centre", _CROPS),
    **_drawn("factor: brightness", _JITTER, _NUM_JITTERED),
    **_drawn("factor: contrast", _JITTER, _NUM_JITTERED),
    **_drawn("factor: saturation", _JITTER, _NUM_JITTERED),
    **_drawn("factor: hue", _JITTER, _NUM_JITTERED),
    **_drawn("factor: blur", "torchvision's GaussianBlur.get_params", _NUM_BLURRED),
    **_formula("order of the jitters", "24 orders of equal probability",
               share_limit(1 / 24, 2 * NUM_DRAWS), _SHARE_WHY),
    **_frequency("flip", FIRING.flip_prob),
    **_frequency("jitter", FIRING.jitter_prob),
    **_frequency("grey", FIRING.grey_prob),
    **_frequency("blur", FIRING.blur_prob),
    **_frequency("solarise", FIRING.solarize_prob),
    **_formula("block mask, share kept", "int(λ · g²) of g² cells", 1e-6, _FLOAT32),
    **_drawn("grid mask, cells kept", "masks drawn again where all or no cells are kept"),
    **_formula("grid mask, each cell", "kept with probability 0.5",
               share_limit(0.5, GRID_CELL_DRAWS), _SHARE_WHY),
    **_formula("mixmask, images", "M · x + (1 − M) · x[π] in NumPy", 1e-6, _EXACT, NORMALISED),
    **_formula("erase, images", "M · x + (1 − M) · fill in NumPy", 1e-6, _FLOAT32, NORMALISED),
    **_formula("λ of cell masks", "the mean of the mask", 1e-6, _FLOAT32),
    **_formula("partners", "a permutation without fixed points", 0, "both shares must be 0"),
    **_formula("unmix, images", _UNMIX, 1e-5, _FLOAT32, NORMALISED),
    **_formula("λ of rectangles", "the share of pixels outside the rectangle", 1e-6, _FLOAT32),
    **_frequency("global mixture", Mixing().unmix_global_prob, NUM_UNMIX),
    **_drawn("unmix, λ of global mixtures", "NumPy's beta distribution", 0.5 * NUM_UNMIX),
    **_drawn("unmix, λ of rectangles", "CutMix's rectangles in NumPy", 0.5 * NUM_UNMIX),
}  # fmt: skip
"""What is compared → the comparison. The only place of all limits."""
