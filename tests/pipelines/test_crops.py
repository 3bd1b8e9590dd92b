"""Crop boxes against torchvision's distribution."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from pipelines.crops import draw_boxes
from pipelines.recipe import Mixing, Recipe, evaluation, moco_v2


@given(
    height=st.integers(1, 700), width=st.integers(1, 700), low=st.floats(0.01, 1.0), seed=st.integers(0, 999)
)
@settings(max_examples=200, deadline=None)
def test_boxes_lie_within_the_picture(height: int, width: int, low: float, seed: int) -> None:
    recipe = Recipe(crop_scale=(low, 1.0))
    size = torch.tensor([height] * 4), torch.tensor([width] * 4)
    boxes = draw_boxes(recipe, seed, 0, torch.arange(4), *size).long()
    assert boxes.shape == (4, 2, 4)
    assert (boxes[..., 2:] >= 1).all() and (boxes[..., :2] >= 0).all()
    assert (boxes[..., 0] + boxes[..., 2] <= height).all()
    assert (boxes[..., 1] + boxes[..., 3] <= width).all()


def test_distribution_is_torchvisions() -> None:
    """Quantiles of area share, ratio and position of 6,000 boxes each, on a wide picture."""
    num, height, width = 6000, 375, 500
    recipe = moco_v2()
    ours = draw_boxes(recipe, 0, 0, torch.arange(num), torch.full((num,), height), torch.full((num,), width))
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    theirs = torch.tensor(
        [
            RandomResizedCrop.get_params(picture, list(recipe.crop_scale), list(recipe.crop_ratio))
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
    """A picture too long for any crop of the range falls back to the largest box of the extreme ratio."""
    size = torch.tensor([10]), torch.tensor([400])
    box = draw_boxes(Recipe(crop_scale=(1.0, 1.0)), 0, 0, torch.arange(1), *size)[0, 0]
    expected = RandomResizedCrop.get_params(torch.empty(3, 10, 400), [1.0, 1.0], [3 / 4, 4 / 3])
    assert tuple(box.tolist()) == tuple(expected)


def test_views_of_a_picture_differ_and_epochs_too() -> None:
    size = torch.full((50,), 300), torch.full((50,), 400)
    first = draw_boxes(moco_v2(), 0, 0, torch.arange(50), *size)
    second = draw_boxes(moco_v2(), 0, 1, torch.arange(50), *size)
    assert (first[:, 0] != first[:, 1]).any(dim=1).float().mean() > 0.9
    assert (first != second).flatten(1).any(dim=1).all()


def test_center_crop_is_the_middle_square() -> None:
    recipe = evaluation(moco_v2())
    box = draw_boxes(recipe, 0, 0, torch.arange(1), torch.tensor([256]), torch.tensor([341]))
    assert box.tolist() == [[[16, 58, 224, 224]]]


def test_evaluation_leaves_nothing_to_chance() -> None:
    recipe = evaluation(Recipe(solarize_prob=1.0, mixing=Mixing(method="both")))
    chances = [f.name for f in dataclasses.fields(recipe) if f.name.endswith("_prob")]
    assert len(chances) == 5 and all(getattr(recipe, name) == 0 for name in chances)
    assert (recipe.num_views, recipe.crop, recipe.mixing.method) == (1, "center", "moco")
