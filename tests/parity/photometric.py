"""The photometric operations: our two stages compared with torchvision, one by one and in a chain.

There are two references. MoCo's published code works on Pillow images: eight bits between any two operations,
hue in 256 steps, blur as three box filters. Float tensors are the same operations without rounding; our
stages promise to equal them.

Shape letters: N views, S side in pixels, P parameters.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import functional as on_pil
from torchvision.transforms.v2 import functional as on_tensor

from pipelines.augment import draws as columns
from pipelines.augment.draws import blur_radius_px, draw_parameters
from pipelines.augment.photometric import augment
from pipelines.augment.photometric_cpu import augment_on_cpu
from pipelines.randomness import Draw
from pipelines.recipe import Recipe, moco_v1, moco_v2
from tests.parity.comparisons import MEASURES, Errors, Row

Stage = Callable[[Tensor, Tensor, Recipe], Tensor]
"""(N, S, S, 3) uint8 views, (N, P) parameters, recipe → (N, 3, S, S) float32."""
Steps = list[tuple[str, float]]
"""Operations and their values, in the order in which they are applied."""

SIDE_PX = 96
PIL, FLOAT = "Pillow", "floats"
VALUES: Mapping[str, tuple[float, ...]] = {
    "brightness": (0.6, 0.8, 1.2, 1.4),
    "contrast": (0.6, 0.8, 1.2, 1.4),
    "saturation": (0.6, 0.8, 1.2, 1.4),
    "hue": (-0.4, -0.1, -0.03, 0.05, 0.1, 0.4),
    "grey": (1.0,),
    "blur": (0.1, 0.5, 1.0, 1.5, 2.0),
    "solarise": (1.0,),
}
"""Fixed parameters that cover the recipes' ranges; MoCo v1 shifts the hue by up to 0.4."""
_COLUMNS = dict(
    zip(
        VALUES,
        (
            columns.BRIGHTNESS,
            columns.CONTRAST,
            columns.SATURATION,
            columns.HUE,
            columns.GREY,
            columns.BLUR,
            columns.SOLARIZE,
        ),
        strict=True,
    )
)
_PLACE_OF = {
    "brightness": columns.BY_BRIGHTNESS,
    "contrast": columns.BY_CONTRAST,
    "saturation": columns.BY_SATURATION,
}
PLAIN = dataclasses.replace(moco_v2(SIDE_PX), solarize_prob=0.5, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""Every operation may fire; no normalisation, so that the output is in [0, 1]."""
CHAINS = (PLAIN, dataclasses.replace(moco_v1(SIDE_PX), mean=PLAIN.mean, std=PLAIN.std))


def fused_stage(views: Tensor, params_NP: Tensor, recipe: Recipe) -> Tensor:
    """Call the CPU stage with the signature of the batched one."""
    out_VNSS3 = np.empty((1, *views.shape), np.float32)
    augment_on_cpu(views[:, None].numpy(), params_NP[None].numpy(), recipe, out_VNSS3)
    return torch.from_numpy(out_VNSS3[0]).permute(0, 3, 1, 2)


STAGES: Mapping[str, Stage] = {"torch stage": augment, "CPU stage": fused_stage}


def rows(name: str, stage: Stage, views: Tensor) -> Iterator[Row]:
    """Compare each operation at fixed parameters, the whole chain at drawn ones, and normalisation."""
    for operation, values in VALUES.items():
        against = {PIL: Errors(), FLOAT: Errors()}
        for value in values:
            got = 255 * stage(views, single(operation, value, len(views)), PLAIN)
            for reference, errors in against.items():
                errors.add(got, REFERENCES[reference](views, [[(operation, value)]] * len(views)))
        for reference, errors in against.items():
            yield errors.row(MEASURES[f"{operation} / {reference}"], name)
    against = {PIL: Errors(), FLOAT: Errors()}
    for number, recipe in enumerate(CHAINS):
        params_NP = draw_parameters(
            dataclasses.replace(recipe, num_views=1), Draw(number, 0, np.arange(len(views)))
        )[0]
        got = 255 * stage(views, torch.from_numpy(params_NP), recipe)
        for reference, errors in against.items():
            errors.add(got, REFERENCES[reference](views, [steps_of(row, recipe) for row in params_NP]))
    for reference, errors in against.items():
        yield errors.row(MEASURES[f"whole chain / {reference}"], name)
    errors = Errors()
    recipe = moco_v2(SIDE_PX)
    got = stage(views, identity(len(views)), recipe)
    errors.add(got, on_tensor.normalize(images(views), list(recipe.mean), list(recipe.std)))
    yield errors.row(MEASURES["normalise"], name)


def identity(num: int) -> Tensor:
    """Return (N, P) parameters with which no operation fires."""
    params_NP = torch.zeros(num, columns.NUM_PARAMETERS)
    params_NP[:, [columns.BRIGHTNESS, columns.CONTRAST, columns.SATURATION]] = 1
    return params_NP


def single(operation: str, value: float, num: int) -> Tensor:
    """Return (N, P) parameters with which one operation fires."""
    params_NP = identity(num)
    params_NP[:, _COLUMNS[operation]] = value
    params_NP[:, columns.PLACES.start] = _PLACE_OF.get(operation, 0)
    return params_NP


def steps_of(params_P: NDArray[np.float32], recipe: Recipe) -> Steps:
    """Return the operations that fire for a row of drawn parameters, in order."""
    blend = {place: name for name, place in _PLACE_OF.items()}
    places = params_P[columns.PLACES].astype(int).tolist()
    order = [blend[p] for p in places[:3] if p] + ["hue"] + [blend[p] for p in places[3:] if p]
    grey_at = 0 if recipe.grey_before_jitter else len(order)
    order = [*order[:grey_at], "grey", *order[grey_at:], "blur", "solarise"]
    idle = {name: 1.0 if name in _PLACE_OF else 0.0 for name in order}
    steps = [(name, float(params_P[_COLUMNS[name]])) for name in order]
    return [(name, value) for name, value in steps if value != idle[name]]


def images(views: Tensor) -> Tensor:
    """Convert (N, S, S, 3) uint8 to (N, 3, S, S) float32 in [0, 1]."""
    return views.permute(0, 3, 1, 2).float() / 255


def _by_pil(views: Tensor, steps_N: list[Steps]) -> Tensor:
    """(N, 3, S, S) grey levels: torchvision's functions on Pillow images, blurred as in MoCo's code."""
    done = []
    for view, steps in zip(views.numpy(), steps_N, strict=True):
        image = Image.fromarray(view)
        for operation, value in steps:
            image = _ON_PIL[operation](image, value)
        done.append(torch.from_numpy(np.array(image)))
    return torch.stack(done).permute(0, 3, 1, 2).float()


def _by_floats(views: Tensor, steps_N: list[Steps]) -> Tensor:
    """(N, 3, S, S) grey levels: torchvision's functions on float tensors."""
    done = []
    for x, steps in zip(images(views), steps_N, strict=True):
        for operation, value in steps:
            x = ON_FLOATS[operation](x, value)
        done.append(255 * x)
    return torch.stack(done)


def _blur_floats(x: Tensor, sigma: float) -> Tensor:
    kernel = 2 * blur_radius_px(PLAIN.blur_sigma_px[1], SIDE_PX) + 1
    blurred: Tensor = on_tensor.gaussian_blur(x, [kernel, kernel], [sigma, sigma])
    return blurred


_ON_PIL: Mapping[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": on_pil.adjust_brightness,
    "contrast": on_pil.adjust_contrast,
    "saturation": on_pil.adjust_saturation,
    "hue": on_pil.adjust_hue,
    "grey": lambda image, _: on_pil.rgb_to_grayscale(image, 3),
    "blur": lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
    "solarise": lambda image, _: on_pil.solarize(image, 128),
}
ON_FLOATS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "brightness": on_tensor.adjust_brightness,
    "contrast": on_tensor.adjust_contrast,
    "saturation": on_tensor.adjust_saturation,
    "hue": on_tensor.adjust_hue,
    "grey": lambda x, _: on_tensor.rgb_to_grayscale(x, 3),
    "blur": _blur_floats,
    "solarise": lambda x, _: on_tensor.solarize(x, 128 / 255),
}
REFERENCES: Mapping[str, Callable[[Tensor, list[Steps]], Tensor]] = {PIL: _by_pil, FLOAT: _by_floats}
