"""Mixtures: what they are made of, λ, partners, polarity."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from models.batch import Mixture
from pipelines.augment.mixing import blend, draw_mixtures, draw_partner
from pipelines.recipe import Mixing, moco_v2


def _queries(num: int, side: int = 16) -> Tensor:
    """Image n is the constant n + 1, so that every pixel of a mixture tells where it came from."""
    return torch.arange(1.0, num + 1).view(num, 1, 1, 1).expand(num, 3, side, side).contiguous()


def _mix(num: int = 6, side: int = 16, seed: int = 0, **options: object) -> tuple[Mixture, ...]:
    recipe = dataclasses.replace(moco_v2(side), mixing=dataclasses.replace(Mixing(grid_size=4), **options))
    drawn = draw_mixtures(recipe, seed, 0, np.arange(10, 10 + num))
    return tuple(blend(_queries(num, side), one) for one in drawn)


@given(num=st.integers(2, 40), kind=st.sampled_from(["reverse", "random"]), seed=st.integers(0, 999))
@settings(max_examples=200, deadline=None)
def test_partner_is_invertible_and_never_itself(num: int, kind: str, seed: int) -> None:
    partner = draw_partner(kind, seed, 0, np.arange(num))
    assert np.array_equal(np.sort(partner), np.arange(num))
    assert (partner != np.arange(num)).all()


@pytest.mark.parametrize("num", [2, 6, 100])
def test_reverse_is_the_batch_backwards(num: int) -> None:
    assert np.array_equal(draw_partner("reverse", 0, 0, np.arange(num)), np.arange(num)[::-1])


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


def test_unmix_is_global_as_often_as_asked() -> None:
    values = [_mix(2, method="unmix", seed=s)[0].images[0].unique().numel() for s in range(400)]
    # A global mixture has one value; a rectangle has two (or one, where it is empty or everything).
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
    assert np.array_equal(mixmask.partner, draw_partner("random", 0, 0, np.arange(10, 18)))
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


def test_mixtures_are_addressed_not_consumed() -> None:
    first, again, other = (_mix(6, method="both", seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a.images, b.images) for a, b in zip(first, other, strict=True))


class _Operations(TorchDispatchMode):
    """Counts what is handed to a device; views cost it nothing."""

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
            (drawn,) = draw_mixtures(recipe, seed, 0, np.arange(6))
            drawn = drawn.to(torch.clone)
            blend(query, drawn)
        assert 3 < counted.num <= 20


@pytest.mark.parametrize("method", ["mixmask", "unmix", "erase"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_mixtures_have_the_dtype_of_their_views(method: str, dtype: torch.dtype) -> None:
    recipe = dataclasses.replace(moco_v2(16), mixing=Mixing(method=method, grid_size=4))
    query = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    for seed in range(4):
        (drawn,) = draw_mixtures(recipe, seed, 0, np.arange(6))
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
        (drawn,) = draw_mixtures(recipe, seed, 0, np.arange(6))
        assert torch.equal(graph(query, drawn).images, blend(query, drawn).images)
