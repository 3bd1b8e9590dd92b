"""Crop boxes against torchvision's distribution, and how often each operation fires."""

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from pipelines.augment.draws import BLUR, BRIGHTNESS, GREY, HUE, PLACES, draw_boxes, draw_parameters
from pipelines.randomness import Draw
from pipelines.recipe import Mixing, Recipe, evaluation, moco_v2


def _boxes(
    recipe: Recipe, num: int, height: int, width: int, *, seed: int = 0, epoch: int = 0
) -> torch.Tensor:
    """(N, V, 5) boxes of images of one size."""
    size = np.tile(np.array([[height, width]]), (num, 1))
    return torch.from_numpy(draw_boxes(recipe, Draw(seed, epoch, np.arange(num)), size))


@given(
    height=st.integers(1, 700), width=st.integers(1, 700), low=st.floats(0.01, 1.0), seed=st.integers(0, 999)
)
@settings(max_examples=200, deadline=None)
def test_boxes_lie_within_the_image(height: int, width: int, low: float, seed: int) -> None:
    recipe = Recipe(crop_scale=(low, 1.0))
    boxes = _boxes(recipe, 4, height, width, seed=seed).long()
    assert boxes.shape == (4, 2, 5)
    assert (boxes[..., 2:4] >= 1).all() and (boxes[..., :2] >= 0).all()
    assert (boxes[..., 0] + boxes[..., 2] <= height).all()
    assert (boxes[..., 1] + boxes[..., 3] <= width).all()


def test_distribution_is_torchvisions() -> None:
    """Quantiles of area share, ratio and position of 6,000 boxes each, for a wide image."""
    num, height, width = 6000, 375, 500
    recipe = moco_v2()
    ours = _boxes(recipe, num, height, width)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torch.tensor(
        [
            RandomResizedCrop.get_params(image, list(recipe.crop_scale), list(recipe.crop_ratio))
            for _ in range(num)
        ]
    )
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    for describe in (_area_share, _ratio, lambda b: b[:, 0] / height, lambda b: b[:, 1] / width):
        got = torch.quantile(describe(ours[:, 1].float()), quantiles)
        expected = torch.quantile(describe(theirs.float()), quantiles)
        assert (got - expected).abs().max() < 0.03


def _area_share(box: torch.Tensor) -> torch.Tensor:
    return box[:, 2] * box[:, 3] / (375 * 500)


def _ratio(box: torch.Tensor) -> torch.Tensor:
    return box[:, 3] / box[:, 2]


def test_fallback_is_torchvisions() -> None:
    """An image too long for any crop of the range gets the largest box of the extreme ratio."""
    box = _boxes(Recipe(crop_scale=(1.0, 1.0)), 1, 10, 400)[0, 0, :4]
    expected = RandomResizedCrop.get_params(torch.empty(3, 10, 400), [1.0, 1.0], [3 / 4, 4 / 3])
    assert tuple(box.tolist()) == tuple(expected)


def test_views_of_an_image_differ_and_epochs_too() -> None:
    first, second = (_boxes(moco_v2(), 50, 300, 400, epoch=epoch) for epoch in (0, 1))
    assert (first[:, 0] != first[:, 1]).any(dim=1).float().mean() > 0.9
    assert (first != second).flatten(1).any(dim=1).all()


def test_center_crop_is_the_middle_square() -> None:
    recipe = evaluation(moco_v2())
    assert _boxes(recipe, 1, 256, 341).tolist() == [[[16, 58, 224, 224, 0]]]


def test_flips_fire_as_often_as_the_recipe_says() -> None:
    flips = _boxes(moco_v2(), 20_000, 300, 400)[..., 4].float()
    assert (flips.mean(dim=0) - 0.5).abs().max() < 0.015
    assert abs(float(torch.corrcoef(flips.T)[0, 1])) < 0.03
    for prob in (0.0, 1.0):
        assert (_boxes(Recipe(flip_prob=prob), 100, 300, 400)[..., 4] == prob).all()


def test_evaluation_draws_nothing() -> None:
    recipe = evaluation(Recipe(solarize_prob=1.0, mixing=Mixing(method="both")))
    chances = [f.name for f in dataclasses.fields(recipe) if f.name.endswith("_prob")]
    assert len(chances) == 5 and all(getattr(recipe, name) == 0 for name in chances)
    assert (recipe.num_views, recipe.crop, recipe.mixing.method) == (1, "center", "moco")


def _parameters(recipe: Recipe, num: int) -> torch.Tensor:
    """(V, N, P) parameters of the first samples."""
    return torch.from_numpy(draw_parameters(recipe, Draw(0, 0, np.arange(num))))


def test_every_jitter_fires_once_in_all_orders() -> None:
    params = _parameters(moco_v2(), 20_000)[0]
    places = params[:, PLACES]
    assert torch.equal(places.sort(dim=1).values, torch.tensor([0, 0, 0, 1, 2, 3.0]).expand(20_000, 6))
    before = (places[:, :3] > 0).sum(dim=1)
    shares = torch.bincount(before, minlength=4) / 20_000
    assert (shares - 0.25).abs().max() < 0.02  # hue is first, second, third and last equally often


def test_operations_fire_as_often_as_the_recipe_says() -> None:
    params = _parameters(moco_v2(), 40_000)[1]
    share = {
        "grey": (params[:, GREY] > 0, 0.2),
        "blur": (params[:, BLUR] > 0, 0.5),
        "jitter": (params[:, HUE] != 0, 0.8),
    }
    for name, (fired, expected) in share.items():
        assert abs(fired.float().mean() - expected) < 0.01, name
    fired = params[:, BRIGHTNESS] != 1
    factors = params[fired, BRIGHTNESS]
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 0.01
