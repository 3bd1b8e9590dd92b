"""Every number of the augmentation and the mixing; all backends use it.

Sources: MoCo v1 (arXiv 1911.05722), MoCo v2 (arXiv 2003.04297), MixMask (arXiv 2210.11456),
Un-Mix (arXiv 2003.05438).
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from models.batch import Method

MaskType = Literal["block", "grid"]
MaskPer = Literal["batch", "image"]
Partner = Literal["reverse", "random"]
Fill = Literal["zero", "mean", "noise"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass(frozen=True)
class Mixing:
    """How query views are mixed. The defaults are those of the published MixMask run."""

    method: Method = "mixmask"
    """moco: no mixture; both: an Un-Mix and a MixMask mixture; erase: cells are filled with erase_fill."""
    mask_type: MaskType = "block"
    """block: the kept cells form rectangles; grid: each cell is kept or replaced independently."""
    grid_size: int = 8
    """Cells along a side of the mask."""
    mask_lam: float = 0.5
    """Share of cells kept from the anchor. block keeps exactly int(mask_lam · grid_size²) cells; grid keeps
    each cell with this probability."""
    mask_per: MaskPer = "batch"
    """batch: one mask for all images of a batch, as published; image: one for each image."""
    partner: Partner = "reverse"
    """reverse: the batch in reverse order; random: a random permutation. Method `both` always uses reverse
    for Un-Mix and random for MixMask."""
    unmix_beta: float = 1.0
    """Un-Mix draws λ from Beta(unmix_beta, unmix_beta)."""
    unmix_global_prob: float = 0.5
    """Probability that Un-Mix blends all pixels by λ. If it does not, it pastes a rectangle."""
    erase_fill: Fill = "mean"
    """zero: black; mean: the mean of the recipe; noise: Gaussian noise."""
    symmetric: bool = False
    """Use each view once as query and once as key, and mix both. The loss is the sum of both directions."""

    def __post_init__(self) -> None:
        cells = self.grid_size**2
        _check(self.grid_size >= 2, f"grid_size is {self.grid_size}; it must be at least 2")
        _check(
            1 <= int(self.mask_lam * cells) < cells,
            f"mask_lam {self.mask_lam} keeps {int(self.mask_lam * cells)} of {cells} cells; "
            f"choose it in [{1 / cells:.4g}, 1) so that at least one cell is kept and one replaced",
        )
        _check(self.unmix_beta > 0, f"unmix_beta is {self.unmix_beta}; it must be above 0")
        _check(
            0 <= self.unmix_global_prob <= 1,
            f"unmix_global_prob is {self.unmix_global_prob}; it must lie in [0, 1]",
        )


@dataclass(frozen=True)
class Recipe:
    """Every number that decides what a view looks like. The defaults are those of MoCo v2."""

    crop_px: int = 224
    """Side of a view."""
    num_views: int = 2
    """Views per image: 2 (query and key), or 1 for training and evaluating classifiers."""
    crop: Literal["random", "center"] = "random"
    """random: a random box; center: a square from the middle of the image, for evaluation."""
    center_share: float = 224 / 256
    """Side of the centre crop divided by the short side of the image. 224 / 256 is published for 224 px;
    use 1 for tiny images."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of the area of a random crop, as a share of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the width of a random crop divided by its height."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip."""
    jitter_prob: float = 0.8
    """Probability of the colour jitter, which changes brightness, contrast, saturation and hue."""
    brightness: float = 0.4
    """The brightness factor is drawn from [1 − brightness, 1 + brightness]."""
    contrast: float = 0.4
    """The contrast factor, likewise."""
    saturation: float = 0.4
    """The saturation factor, likewise."""
    hue_turns: float = 0.1
    """The hue shift is drawn from [−hue_turns, hue_turns], in turns of the colour circle."""
    grey_prob: float = 0.2
    """Probability of a greyscale view."""
    blur_prob: float = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    """Range of the standard deviation of the blur."""
    solarize_prob: float = 0.0
    """Probability that all values of 128 and above are inverted."""
    grey_before_jitter: bool = False
    """Whether greyscale comes before the colour jitter, as in MoCo v1, or after it, as in MoCo v2."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from pixels in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides the values after the mean is subtracted."""
    mixing: Mixing = Mixing(method="moco")
    """How query views are mixed."""

    def __post_init__(self) -> None:
        _check(
            self.crop_px >= 8, f"crop_px is {self.crop_px}; views of fewer than 8 pixels are not supported"
        )
        _check(self.num_views in (1, 2), f"num_views is {self.num_views}; it must be 1 or 2")
        _check(0 < self.center_share <= 1, f"center_share is {self.center_share}; it must lie in (0, 1]")
        low, high = self.crop_scale
        _check(0 < low <= high <= 1, f"crop_scale is {self.crop_scale}; it must satisfy 0 < low ≤ high ≤ 1")
        low, high = self.crop_ratio
        _check(0 < low <= high, f"crop_ratio is {self.crop_ratio}; it must satisfy 0 < low ≤ high")
        low, high = self.blur_sigma_px
        _check(0 < low <= high, f"blur_sigma_px is {self.blur_sigma_px}; it must satisfy 0 < low ≤ high")
        _check(0 <= self.hue_turns <= 0.5, f"hue_turns is {self.hue_turns}; it must lie in [0, 0.5]")
        for name in ("flip_prob", "jitter_prob", "grey_prob", "blur_prob", "solarize_prob"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"{name} is {value}; it must lie in [0, 1]")
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"{name} is {value}; it must lie in [0, 1]")
        _check(
            self.mixing.grid_size <= self.crop_px,
            f"a grid of {self.mixing.grid_size} cells a side is finer than a view of {self.crop_px} px",
        )
        _check(
            self.mixing.method == "moco" or self.num_views == 2,
            f"mixing method {self.mixing.method!r} needs two views, num_views is {self.num_views}",
        )


def moco_v1(crop_px: int = 224, mixing: Mixing | None = None) -> Recipe:
    """MoCo v1: greyscale, then a jitter that is always applied and has hue 0.4; no blur."""
    return Recipe(
        crop_px=crop_px,
        jitter_prob=1.0,
        hue_turns=0.4,
        blur_prob=0.0,
        grey_before_jitter=True,
        mixing=mixing or Mixing(method="moco"),
    )


def moco_v2(crop_px: int = 224, mixing: Mixing | None = None) -> Recipe:
    """MoCo v2 (``--aug-plus``): jitter with probability 0.8, greyscale, blur, flip."""
    return Recipe(crop_px=crop_px, mixing=mixing or Mixing(method="moco"))


def evaluation(recipe: Recipe) -> Recipe:
    """One centre crop with the size and normalisation of a recipe, without augmentation."""
    return dataclasses.replace(
        recipe,
        num_views=1,
        crop="center",
        mixing=Mixing(method="moco"),
        flip_prob=0.0,
        jitter_prob=0.0,
        grey_prob=0.0,
        blur_prob=0.0,
        solarize_prob=0.0,
    )


def linear_train(recipe: Recipe) -> Recipe:
    """The training view of the linear probe: a random crop of 8 % … 100 % of the area, and a flip."""
    return dataclasses.replace(evaluation(recipe), crop="random", crop_scale=(0.08, 1.0), flip_prob=0.5)
