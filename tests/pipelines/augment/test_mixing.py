"""Masks by property: exact count, never empty. Mixtures: what they are made of, λ, partners, polarity."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from models.batch import Mixture
from pipelines.augment.mixing import (
    blend,
    block_masks,
    cell_of_pixel,
    draw_masks,
    draw_mixtures,
    draw_partner,
    grid_masks,
    kept_share,
)
from pipelines.randomness import Draw, Purpose, uniform
from pipelines.recipe import Mixing, moco_v2

# ------------------------------------------------------------------------------------------------------------
# Masks of cells

SIZES = st.integers(2, 16)
KEEPS = st.floats(0.05, 0.99)


def _block_masks(grid_size: int, keep: float, draw: Draw) -> Tensor:
    return torch.from_numpy(block_masks(grid_size, keep, draw))


def _grid_masks(grid_size: int, keep: float, draw: Draw) -> Tensor:
    return torch.from_numpy(grid_masks(grid_size, keep, draw))


@given(grid_size=SIZES, keep=KEEPS, seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_block_keeps_exactly_its_quota(grid_size: int, keep: float, seed: int) -> None:
    quota = int(keep * grid_size**2)
    assume(1 <= quota < grid_size**2)
    masks = _block_masks(grid_size, keep, Draw(seed, 0, np.arange(16)))
    assert masks.shape == (16, grid_size, grid_size)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert (masks.sum(dim=(1, 2)) == quota).all()


@given(grid_size=SIZES, keep=KEEPS, seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_grid_is_never_all_kept_nor_all_replaced(grid_size: int, keep: float, seed: int) -> None:
    kept = _grid_masks(grid_size, keep, Draw(seed, 0, np.arange(64))).sum(dim=(1, 2))
    assert (kept >= 1).all() and (kept <= grid_size**2 - 1).all()


@pytest.mark.parametrize(("grid_size", "keep"), [(2, 0.5), (3, 0.3), (4, 0.5)])
def test_grid_has_the_distribution_of_redrawing(grid_size: int, keep: float) -> None:
    """Counts of kept cells follow the binomial law without its two ends; all cells are equally likely."""
    num, cells = 40_000, grid_size**2
    masks = _grid_masks(grid_size, keep, Draw(7, 3, np.arange(num)))
    counts = torch.bincount(masks.sum(dim=(1, 2)).long(), minlength=cells + 1) / num
    law = torch.distributions.Binomial(cells, torch.tensor(keep)).log_prob(torch.arange(cells + 1.0)).exp()
    law[0] = law[-1] = 0
    assert (counts - law / law.sum()).abs().max() < 0.01
    share = masks.mean(dim=0)
    assert (share - share.mean()).abs().max() < 0.01


def test_block_of_a_fine_grid_is_made_of_rectangles() -> None:
    """Kept cells have far more kept neighbours than in a mask of independent cells."""
    draw = Draw(0, 0, np.arange(500))

    def kept_neighbours(masks: Tensor) -> float:
        pairs = masks[:, :, 1:] * masks[:, :, :-1]
        return float(pairs.sum() / masks[:, :, 1:].sum())

    assert kept_neighbours(_block_masks(8, 0.5, draw)) > 0.75
    assert kept_neighbours(_grid_masks(8, 0.5, draw)) < 0.6


def test_block_masks_vary_and_cover_every_cell() -> None:
    masks = _block_masks(8, 0.5, Draw(0, 0, np.arange(2000)))
    assert len(masks.flatten(1).unique(dim=0)) > 1500
    share = masks.mean(dim=0)
    assert share.min() > 0.05 and share.max() < 0.95


@given(grid_size=st.integers(2, 12), side=st.integers(12, 70))
@settings(max_examples=80, deadline=None)
def test_lam_is_the_true_share_of_pixels(grid_size: int, side: int) -> None:
    masks = draw_masks(Mixing(mask_type="grid", grid_size=grid_size), Draw(0, 0, np.arange(4)))
    cell_S = cell_of_pixel(grid_size, side).numpy()
    pixels = masks[:, cell_S][:, :, cell_S]
    assert pixels.shape == (4, side, side)
    np.testing.assert_allclose(kept_share(masks, side), (pixels == 1).mean(axis=(1, 2)), rtol=1e-6)
    # torch's own nearest-neighbour enlargement.
    expected = torch.nn.functional.interpolate(torch.from_numpy(masks)[:, None], size=side, mode="nearest")
    assert np.array_equal(pixels, expected[:, 0])


def _block_in_numpy(grid_size: int, keep: float, u_T4: np.ndarray) -> np.ndarray:
    """One block mask, computed cell by cell in float64 as the docstring describes it."""
    quota, mask = int(keep * grid_size**2), np.zeros((grid_size, grid_size))
    smallest = min(4, quota)
    for area, aspect, top, left in u_T4.astype(np.float64):
        area, aspect = smallest + (quota - smallest) * area, (1 / 0.3) ** (2 * aspect - 1)
        sides = ((area * aspect) ** 0.5, (area / aspect) ** 0.5)
        height, width = (int(np.clip(np.rint(side), 1, grid_size)) for side in sides)
        if height * width < smallest:
            continue
        rows, columns = (int(u * (grid_size - side + 1)) for u, side in ((top, height), (left, width)))
        for y in range(rows, rows + height):
            for x in range(columns, columns + width):
                if mask.sum() < quota:
                    mask[y, x] = 1
    for cell in range(grid_size**2):
        if mask.sum() < quota:
            mask.flat[cell] = 1
    return mask


@pytest.mark.parametrize(("grid_size", "keep"), [(2, 0.5), (7, 0.3), (8, 0.5), (14, 0.75)])
def test_block_masks_are_those_of_numpy(grid_size: int, keep: float) -> None:
    draw = Draw(5, 2, np.arange(300))
    u_NT4 = uniform(draw, Purpose.MASK, 96).reshape(-1, 24, 4)
    expected = np.stack([_block_in_numpy(grid_size, keep, u_T4) for u_T4 in u_NT4])
    same = (block_masks(grid_size, keep, draw) == expected).all(axis=(1, 2))
    # A side within a float32's error of a half may be rounded the other way.
    assert same.mean() > 0.99


@pytest.mark.parametrize(("grid_size", "lam"), [(4, 0.05), (8, 1.0), (1, 0.5), (2, 0.2)])
def test_impossible_masks_are_refused(grid_size: int, lam: float) -> None:
    with pytest.raises(ValueError, match=r"mask_lam|grid_size"):
        Mixing(grid_size=grid_size, mask_lam=lam)


# ------------------------------------------------------------------------------------------------------------
# Mixtures


def _queries(num: int, side: int = 16) -> Tensor:
    """Image n is the constant n + 1, so every pixel of a mixture shows which image it came from."""
    return torch.arange(1.0, num + 1).view(num, 1, 1, 1).expand(num, 3, side, side).contiguous()


def _mix(num: int = 6, side: int = 16, seed: int = 0, **options: object) -> tuple[Mixture, ...]:
    recipe = dataclasses.replace(moco_v2(side), mixing=dataclasses.replace(Mixing(grid_size=4), **options))
    drawn = draw_mixtures(recipe, Draw(seed, 0, np.arange(10, 10 + num)))
    return tuple(blend(_queries(num, side), one) for one in drawn)


@given(num=st.integers(2, 40), kind=st.sampled_from(["reverse", "random"]), seed=st.integers(0, 999))
@settings(max_examples=200, deadline=None)
def test_partner_is_invertible_and_never_itself(num: int, kind: str, seed: int) -> None:
    partner = draw_partner(kind, Draw(seed, 0, np.arange(num)))
    assert np.array_equal(np.sort(partner), np.arange(num))
    assert (partner != np.arange(num)).all()


@pytest.mark.parametrize("num", [2, 6, 100])
def test_reverse_is_the_batch_backwards(num: int) -> None:
    assert np.array_equal(draw_partner("reverse", Draw(0, 0, np.arange(num))), np.arange(num)[::-1])


@pytest.mark.parametrize("mask_type", ["block", "grid"])
@pytest.mark.parametrize("mask_per", ["batch", "image"])
@pytest.mark.parametrize("num", [2, 5, 6])
def test_mixmask_keeps_lam_of_the_anchor(num: int, mask_per: str, mask_type: str) -> None:
    (mixture,) = _mix(num, method="mixmask", mask_type=mask_type, mask_per=mask_per)
    for i in range(num):
        image, own, other = mixture.images[i], i + 1.0, float(mixture.partner[i]) + 1
        from_anchor = image == own
        assert (from_anchor | (image == other)).all()
        assert float(mixture.lam[i]) == pytest.approx(float(from_anchor.float().mean()))
    if mask_type == "block":
        assert (mixture.lam == 0.5).all()
    same = (mixture.images == mixture.images.new_tensor(range(1, num + 1)).view(-1, 1, 1, 1)).flatten(1)
    if mask_per == "batch":
        assert (same == same[0]).all()
    assert mixture.images.is_contiguous(memory_format=torch.channels_last)


@given(seed=st.integers(0, 5000))
@settings(max_examples=120, deadline=None)
def test_unmix_lam_is_the_anchors_share(seed: int) -> None:
    (mixture,) = _mix(4, method="unmix", seed=seed)
    lam = float(mixture.lam[0])
    assert 0 <= lam <= 1
    assert torch.equal(mixture.partner, torch.tensor([3, 2, 1, 0]))
    expected = lam * 1 + (1 - lam) * 4  # image 0 is all ones, its partner all fours
    assert float(mixture.images[0].mean()) == pytest.approx(expected, abs=1e-4)


def test_unmix_is_global_as_often_as_the_recipe_says() -> None:
    values = [_mix(2, method="unmix", seed=s)[0].images[0].unique().numel() for s in range(400)]
    # A global mixture has one value. A rectangle has two, or one where it is empty or covers the image.
    assert 0.42 < sum(v == 1 for v in values) / 400 < 0.62
    always = [
        _mix(2, method="unmix", seed=s, unmix_global_prob=1.0)[0].images[0].unique().numel()
        for s in range(50)
    ]
    assert set(always) == {1}


def test_unmix_lam_follows_beta() -> None:
    lam = torch.tensor(
        [float(_mix(2, method="unmix", seed=s, unmix_global_prob=1.0)[0].lam[0]) for s in range(1500)]
    )
    assert (
        torch.quantile(lam, torch.tensor([0.1, 0.5, 0.9])) - torch.tensor([0.1, 0.5, 0.9])
    ).abs().max() < 0.04


def test_both_are_unmix_then_mixmask_with_their_partners() -> None:
    unmix, mixmask = _mix(8, method="both")
    assert torch.equal(unmix.partner, torch.arange(8).flip(0))
    assert np.array_equal(mixmask.partner, draw_partner("random", Draw(0, 0, np.arange(10, 18))))
    assert (mixmask.lam == 0.5).all()


@pytest.mark.parametrize(("fill", "value"), [("mean", 0.0), ("zero", -0.485 / 0.229)])
def test_erase_fills_the_rest(fill: str, value: float) -> None:
    (mixture,) = _mix(5, method="erase", erase_fill=fill, mask_per="image")
    erased = mixture.images[2, 0] != 3.0
    assert float(erased.float().mean()) == pytest.approx(1 - float(mixture.lam[2]))
    assert mixture.images[2, 0][erased].unique().tolist() == pytest.approx([value])


def test_erase_with_noise_is_noise() -> None:
    (mixture,) = _mix(64, method="erase", erase_fill="noise")
    erased = mixture.images != _queries(64)
    noise = mixture.images[erased]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_moco_mixes_nothing_and_a_batch_of_one_is_refused() -> None:
    assert _mix(4, method="moco") == ()
    with pytest.raises(ValueError, match="batch of 1"):
        _mix(1, method="mixmask")
    with pytest.raises(ValueError, match="finer than a view of 8 px"):
        _mix(4, side=8, method="mixmask", grid_size=9)


def test_mixtures_depend_on_the_address_alone() -> None:
    first, again, other = (_mix(6, method="both", seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a.images, b.images) for a, b in zip(first, other, strict=True))


class _Operations(TorchDispatchMode):
    """Counts the operations that a device executes; tensor views are free."""

    num = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ):
        self.num += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["mixmask", "unmix", "erase"])
def test_a_mixture_is_at_most_twenty_operations_on_the_device(method: str) -> None:
    recipe = dataclasses.replace(moco_v2(16), mixing=Mixing(method=method, grid_size=4))
    query = _queries(6)
    for seed in range(6):
        with _Operations() as counted:
            (drawn,) = draw_mixtures(recipe, Draw(seed, 0, np.arange(6)))
            drawn = drawn.to(torch.clone)
            blend(query, drawn)
        assert 3 < counted.num <= 20


@pytest.mark.parametrize("method", ["mixmask", "unmix", "erase"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_mixtures_have_the_dtype_of_their_views(method: str, dtype: torch.dtype) -> None:
    recipe = dataclasses.replace(moco_v2(16), mixing=Mixing(method=method, grid_size=4))
    query = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    for seed in range(4):
        (drawn,) = draw_mixtures(recipe, Draw(seed, 0, np.arange(6)))
        mixture, exact = blend(query, drawn), blend(query.double(), drawn)
        assert mixture.images.dtype == dtype
        torch.testing.assert_close(mixture.images, exact.images.to(dtype))


@pytest.mark.parametrize("method", ["mixmask", "unmix", "erase"])
def test_blending_compiles_as_one_graph(method: str) -> None:
    recipe = dataclasses.replace(
        moco_v2(16), mixing=Mixing(method=method, grid_size=4, unmix_global_prob=0.5)
    )
    graph = torch.compile(blend, fullgraph=True, backend="eager", dynamic=False)
    query = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for seed in range(4):
        (drawn,) = draw_mixtures(recipe, Draw(seed, 0, np.arange(6)))
        assert torch.equal(graph(query, drawn).images, blend(query, drawn).images)
