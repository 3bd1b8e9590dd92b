"""What is compared with what, how far apart the two may be, and why that far: one table."""

import dataclasses
import math
from collections.abc import Mapping

from benchmarks.parity.measures import GREY_LEVELS, KS, NORMALISED, SHARE, Measure
from pipelines.recipe import Mixing, moco_v2

NUM_DRAWS = 20_000
"""Samples of each distribution that is drawn at random."""
NUM_UNMIX = 1_000
"""Un-Mix batches; about half are global."""
GRID_CELL_DRAWS = 40_000
FIRING = dataclasses.replace(moco_v2(), solarize_prob=0.2)
"""MoCo v2 with a solarisation, whose frequency could not be seen otherwise."""
NUM_JITTERED, NUM_BLURRED = 2 * NUM_DRAWS * FIRING.jitter_prob, 2 * NUM_DRAWS * FIRING.blur_prob
"""Of two views of each sample, those that an operation is expected to fire for."""
_KS_SIGNIFICANCE = 1e-4
_SIGMAS = 4.0
_KS_WHY = (
    f"what two samples of one distribution exceed once in {1 / _KS_SIGNIFICANCE:,.0f} times; seeds are "
    "fixed, so the row is the same in every run"
)
_SHARE_WHY = f"{_SIGMAS:g} standard deviations of the binomial distribution; seeds are fixed"


def ks_limit(num_ours: int, num_theirs: int) -> float:
    """Kolmogorov's and Smirnov's critical distance of two samples."""
    return math.sqrt(-math.log(_KS_SIGNIFICANCE / 2) / 2 * (1 / num_ours + 1 / num_theirs))


def share_limit(share: float, num: int) -> float:
    """How far the share of ``num`` draws may be from its probability."""
    return _SIGMAS * math.sqrt(share * (1 - share) / num)


_PIL_CROP = "torchvision's resized_crop on Pillow pictures"
_ON_PILLOW = "torchvision on Pillow pictures"
_ON_FLOATS = "torchvision on tensors of floats"
_TRUNCATES = "Pillow cuts off or rounds to whole grey levels after each step"
_GREY_TOO = f"{_TRUNCATES}, the grey it blends with too"
_EXACT = "an exact copy"
_FLOAT32 = "rounding of float32"


def _decode(kind: str) -> Measure:
    return Measure(
        f"decode {kind}", "Pillow's decoder", GREY_LEVELS, 0.5, 1,
        "a decoder may round chroma and colour together or one after the other",
    )  # fmt: skip


def _resize(direction: str) -> dict[str, Measure]:
    operation = f"resize, {direction}"
    return {
        f"{operation} / pixels": Measure(
            operation, _PIL_CROP, GREY_LEVELS, 0.5, 1,
            "Pillow rounds to whole grey levels between its two passes, another may not",
        ),
        f"{operation} / planes": Measure(
            operation, "resized_crop of Y, U and V in floats, colours converted afterwards",
            GREY_LEVELS, 0.5, 2,
            "one rounding of each plane, which the conversion weighs with up to 1.8",
        ),
        f"{operation} / clamped": Measure(
            operation, _PIL_CROP, GREY_LEVELS, 0.5, 32,
            "colours that RGB cannot show are clamped after resizing instead of before, which shows at "
            "glaring edges only, so the mean is what counts; against the planes the largest is small",
        ),
        f"{operation} / repeated": Measure(
            operation, "resized_crop with the border's pixels repeated beyond it", GREY_LEVELS, 0.5, 1,
            "Pillow rounds to whole grey levels between its two passes, DALI does not",
        ),
        f"{operation} / bordered": Measure(
            operation, _PIL_CROP, GREY_LEVELS, 0.5, 32,
            "where the filter reaches over the border DALI repeats the border's pixels and Pillow leaves "
            "them out, so the outermost pixels differ where much is shrunk, and the mean is what counts",
        ),
    }  # fmt: skip


def _photometric(
    operation: str, pil: tuple[float, float, str], floats: tuple[float, float, str]
) -> dict[str, Measure]:
    return {
        f"{operation} / Pillow": Measure(operation, _ON_PILLOW, GREY_LEVELS, *pil),
        f"{operation} / floats": Measure(operation, _ON_FLOATS, GREY_LEVELS, *floats),
    }


def _drawn(operation: str, against: str, num_ours: float = NUM_DRAWS) -> dict[str, Measure]:
    limit = ks_limit(int(num_ours), NUM_DRAWS)
    return {operation: Measure(operation, against, KS, limit, limit, _KS_WHY)}


def _fires(name: str, share: float, num: int = 2 * NUM_DRAWS) -> dict[str, Measure]:
    operation, limit = f"how often: {name}", share_limit(share, num)
    return {
        operation: Measure(
            operation, f"probability {share:.4g} of the recipe", SHARE, limit, limit, _SHARE_WHY
        )
    }


def _formula(
    operation: str, against: str, tolerance: float, why: str, unit: str = SHARE
) -> dict[str, Measure]:
    return {operation: Measure(operation, against, unit, tolerance, tolerance, why)}


_UNMIX = "λ · x + (1 − λ) · x[π], or a pasted rectangle, in NumPy"
_LUMA_DIGITS = "torchvision's grey weighs red by 0.2989 where Pillow's and ours has 0.299"
_ORDER_LIMIT = share_limit(1 / 24, 2 * NUM_DRAWS)
_CELL_LIMIT = share_limit(0.5, GRID_CELL_DRAWS)
_CROPS = "torchvision's RandomResizedCrop.get_params"
_JITTER = "torchvision's ColorJitter.get_params"

MEASURES: Mapping[str, Measure] = {
    **{f"decode {kind}": _decode(kind) for kind in ("4:2:0", "4:2:2", "4:4:4", "progressive")},
    "decode grey": Measure(
        "decode grey", "Pillow's decoder", GREY_LEVELS, 0.5, 4,
        "the converter encodes a grey JPEG anew, in colour and at quality 95",
    ),
    **_resize("shrinking"),
    **_resize("enlarging"),
    **_formula("flip", "the mirror of the crop that is not flipped", 0, _EXACT, GREY_LEVELS),
    **_photometric("brightness", (0.5, 1, _TRUNCATES), (1e-3, 1e-3, _FLOAT32)),
    **_photometric("contrast", (0.75, 1.5, _GREY_TOO), (0.05, 0.05, _LUMA_DIGITS)),
    **_photometric("saturation", (0.75, 1.5, _GREY_TOO), (0.05, 0.05, _LUMA_DIGITS)),
    **_photometric(
        "hue",
        (1, 20, "Pillow's HSV has 256 hues and saturations, torchvision cuts the shift off to one of them"),
        (1e-3, 0.01, _FLOAT32),
    ),
    **_photometric("grey", (0.5, 0.6, _TRUNCATES), (0.05, 0.05, _LUMA_DIGITS)),
    **_photometric(
        "blur",
        (1, 40, "Pillow, as in MoCo's code, blurs by three box filters and repeats the border's pixels where "
                "torchvision reflects them; the largest errors are at the border"),
        (1e-3, 0.01, _FLOAT32),
    ),
    **_photometric("solarise", (1e-3, 1e-3, _FLOAT32), (1e-3, 1e-3, _FLOAT32)),
    **_photometric(
        "whole chain",
        (3, 60, "the roundings of up to seven steps one upon the other, and Pillow's hue and blur"),
        (0.05, 1.1, "on solarisation's threshold the last bit decides, which is one grey level"),
    ),
    **_formula("normalise", "torchvision's normalize", 1e-5, _FLOAT32, NORMALISED),
    **_drawn("crop, area", _CROPS),
    **_drawn("crop, ratio", _CROPS),
    **_drawn("crop, centre", _CROPS),
    **_drawn("factor: brightness", _JITTER, NUM_JITTERED),
    **_drawn("factor: contrast", _JITTER, NUM_JITTERED),
    **_drawn("factor: saturation", _JITTER, NUM_JITTERED),
    **_drawn("factor: hue", _JITTER, NUM_JITTERED),
    **_drawn("factor: blur", "torchvision's GaussianBlur.get_params", 2 * NUM_DRAWS * FIRING.blur_prob
    ),
    **_formula("order of the jitters", "24 orders, one as likely as the other", _ORDER_LIMIT, _SHARE_WHY),
    **_fires("flip", FIRING.flip_prob),
    **_fires("jitter", FIRING.jitter_prob),
    **_fires("grey", FIRING.grey_prob),
    **_fires("blur", FIRING.blur_prob),
    **_fires("solarise", FIRING.solarize_prob),
    **_formula("block mask, share kept", "int(λ · g²) of g² cells", 1e-6, _FLOAT32),
    **_drawn("grid mask, cells kept", "masks drawn again where all or none is kept"),
    **_formula("grid mask, each cell", "kept with probability 0.5", _CELL_LIMIT, _SHARE_WHY),
    **_formula("mixmask, images", "M · x + (1 − M) · x[π] in NumPy", 1e-6, _EXACT, NORMALISED),
    **_formula("erase, images", "M · x + (1 − M) · fill in NumPy", 1e-6, _FLOAT32, NORMALISED),
    **_formula("λ of cell masks", "the mean of the mask", 1e-6, _FLOAT32),
    **_formula("partners", "nobody is their own partner, everybody is one", 0, "shares of nothing"),
    **_formula("unmix, images", _UNMIX, 1e-5, _FLOAT32, NORMALISED),
    **_formula("λ of rectangles", "the share of pixels outside the rectangle", 1e-6, _FLOAT32),
    **_fires("global mixture", Mixing().unmix_global_prob, NUM_UNMIX),
    **_drawn("unmix, λ of global mixtures", "NumPy's beta distribution", 0.5 * NUM_UNMIX),
    **_drawn("unmix, λ of rectangles", "CutMix's rectangles in NumPy", 0.5 * NUM_UNMIX
    ),
}  # fmt: skip
"""What is compared → the comparison and its limits. The one place of all tolerances."""
