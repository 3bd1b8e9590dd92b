"""Every photometric operation against torchvision's; the CPU stage against the batched one."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from pipelines.augment import draws
from pipelines.augment import photometric as ph
from pipelines.augment.draws import NUM_PARAMETERS, PLACES
from pipelines.augment.photometric import augment
from pipelines.augment.photometric_cpu import augment_on_cpu
from pipelines.randomness import Draw
from pipelines.recipe import Recipe, moco_v1, moco_v2

LEVEL = 1 / 255


@pytest.fixture(scope="module")
def views() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(12, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=48, mode="bicubic").clamp(0, 1)
    noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
    return (noisy.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def _image(views: Tensor) -> Tensor:
    return views.permute(0, 3, 1, 2).float() / 255


def _planes(views: Tensor) -> ph.Planes:
    return _image(views).unbind(1)


def _joined(planes: ph.Planes) -> Tensor:
    return torch.stack(planes, dim=1)


def _draw(recipe: Recipe, num: int, *, seed: int = 0, epoch: int = 0) -> Tensor:
    """(V, N, P) parameters of the first samples."""
    return torch.from_numpy(draws.draw_parameters(recipe, Draw(seed, epoch, np.arange(num))))


def _on_cpu(crops_NVSS3: Tensor, params_VNP: Tensor, recipe: Recipe) -> list[Tensor]:
    """Views of the CPU stage, (N, 3, S, S) each."""
    num, num_views, side = crops_NVSS3.shape[:3]
    out = torch.full((num_views, num, side, side, 3), torch.nan)
    augment_on_cpu(crops_NVSS3.numpy(), params_VNP.numpy(), recipe, out.numpy())
    return [view.permute(0, 3, 1, 2) for view in out]


def _identity(num: int) -> Tensor:
    params = torch.zeros(num, NUM_PARAMETERS)
    params[:, [ph.BRIGHTNESS, ph.CONTRAST, ph.SATURATION]] = 1.0
    return params


@pytest.mark.parametrize(
    ("column", "which", "name"),
    [
        (ph.BRIGHTNESS, 1, "adjust_brightness"),
        (ph.CONTRAST, 2, "adjust_contrast"),
        (ph.SATURATION, 3, "adjust_saturation"),
    ],
)
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4, 2.0])
def test_blend_equals_torchvision(views: Tensor, column: int, which: int, name: str, factor: float) -> None:
    params = _identity(len(views))
    params[:, column] = factor
    params[:, PLACES.start] = which
    expected = getattr(reference, name)(_image(views), factor)
    assert (_joined(ph.jitter(_planes(views), params)) - expected).abs().max() < 2 * LEVEL


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.03, 0.1, 0.4])
def test_hue_equals_torchvision(views: Tensor, turns: float) -> None:
    got = _joined(ph.shift_hue(_planes(views), torch.full((len(views),), turns)))
    assert (got - reference.adjust_hue(_image(views), turns)).abs().max() < 1e-4


def test_hue_of_grey_is_grey() -> None:
    grey = torch.linspace(0, 1, 64).view(1, 8, 8)
    shifted = ph.shift_hue((grey, grey, grey), torch.tensor([0.3]))
    assert all(torch.equal(plane, grey) for plane in shifted)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_equals_torchvision(views: Tensor, sigma: float) -> None:
    sigma_N = torch.full((len(views),), sigma)
    expected = reference.gaussian_blur(_image(views), [13, 13], [sigma, sigma])
    assert (_joined(ph.blur(_planes(views), sigma_N, 2.0)) - expected).abs().max() < 1e-5
    in_16_bits = _joined(ph.blur(_planes(views), sigma_N, 2.0, torch.float16))
    assert (in_16_bits - expected).abs().max() < 0.3 * LEVEL


@pytest.mark.parametrize("side", [8, 13])
def test_a_blur_as_wide_as_the_view_is_reflected(side: int) -> None:
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    radius = draws.blur_radius_px(5.0, side)
    got = _joined(ph.blur(x.unbind(1), torch.tensor([5.0, 0.0]), 5.0))
    expected = reference.gaussian_blur(x[:1], [2 * radius + 1] * 2, [5.0, 5.0])
    assert (got[:1] - expected).abs().max() < 1e-5
    assert torch.equal(got[1], x[1]), "no blur leaves a view as it is"


def test_grey_equals_torchvision(views: Tensor) -> None:
    params = _identity(len(views))
    params[:, ph.GREY] = 1
    expected = reference.rgb_to_grayscale(_image(views), num_output_channels=3)
    assert (_joined(ph.to_grey(_planes(views), params)) - expected).abs().max() < LEVEL


def test_jitter_follows_its_drawn_order(views: Tensor) -> None:
    """The whole jitter at random parameters against torchvision's functions called one by one."""
    params = _draw(moco_v1(), len(views), seed=3, epoch=1)[0]
    got = _joined(ph.jitter(_planes(views), params))
    names = {1: "adjust_brightness", 2: "adjust_contrast", 3: "adjust_saturation"}
    columns = {1: ph.BRIGHTNESS, 2: ph.CONTRAST, 3: ph.SATURATION}
    for i in range(len(views)):
        x = _image(views)[i]
        places = [int(p) for p in params[i, PLACES]]
        for which in [*places[:3], 4, *places[3:]]:
            if which == 4:
                x = reference.adjust_hue(x, float(params[i, ph.HUE]))
            elif which:
                x = getattr(reference, names[which])(x, float(params[i, columns[which]]))
        assert (got[i] - x).abs().max() < 2 * LEVEL


def test_solarize_and_normalise(views: Tensor) -> None:
    recipe = Recipe(crop_px=48, jitter_prob=0, grey_prob=0, blur_prob=0, solarize_prob=1)
    params = _draw(recipe, len(views))[0]
    got = augment(views, params, recipe)
    solarised = reference.solarize(views.permute(0, 3, 1, 2), 128).float() / 255
    expected = reference.normalize(solarised, list(recipe.mean), list(recipe.std))
    assert (got - expected).abs().max() < 1e-5
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_stage_compiles_as_one_graph(views: Tensor) -> None:
    recipe = moco_v2(48)
    params = _draw(recipe, len(views))[0]
    graph = torch.compile(lambda v, p: augment(v, p, recipe), fullgraph=True, backend="aot_eager")
    assert (graph(views, params) - augment(views, params, recipe)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_views_in_16_bits_are_the_rounded_ones(views: Tensor, dtype: torch.dtype) -> None:
    recipe = moco_v2(48)
    params = _draw(recipe, len(views))[0]
    exact, got = augment(views, params, recipe), augment(views, params, recipe, dtype)
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    blurred = 0.3 * LEVEL / min(recipe.std)
    assert ((got - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + blurred).all()


@pytest.mark.parametrize("make", [moco_v1, moco_v2])
def test_cpu_stage_equals_the_batched_one(views: Tensor, make: Callable[[int], Recipe]) -> None:
    recipe = dataclasses.replace(make(48), solarize_prob=0.3)
    both = torch.stack([views, views.flip(1)], dim=1).repeat(20, 1, 1, 1, 1)
    params = _draw(recipe, len(both), seed=5, epoch=2)
    got = _on_cpu(both, params, recipe)
    # For a pixel at solarisation's threshold, the last bit decides whether it is inverted.
    limit = 0.01 * LEVEL / min(recipe.std)
    for view in range(2):
        expected = augment(both[:, view], params[view], recipe)
        off = (got[view] - expected).abs() > limit
        assert off.float().mean() < 1e-4
        plain = params[view][:, ph.SOLARIZE] == 0
        assert (got[view] - expected)[plain].abs().max() < limit
        assert got[view].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("side", [8, 13, 224])
@pytest.mark.parametrize("sigma", [2.0, 5.0])
def test_cpu_stage_at_other_sizes(side: int, sigma: float) -> None:
    generator = torch.Generator().manual_seed(1)
    crops = torch.randint(0, 256, (6, 1, side, side, 3), dtype=torch.uint8, generator=generator)
    recipe = dataclasses.replace(moco_v2(side), num_views=1, blur_prob=1.0, blur_sigma_px=(0.1, sigma))
    params = _draw(recipe, 6)
    (got,) = _on_cpu(crops, params, recipe)
    assert (got - augment(crops[:, 0], params[0], recipe)).abs().max() < 0.01 * LEVEL / min(recipe.std)


def test_cpu_stage_writes_its_place_in_the_batch(views: Tensor) -> None:
    recipe = moco_v2(48)
    crops, params = torch.stack([views, views], dim=1), _draw(recipe, len(views))
    whole = _on_cpu(crops, params, recipe)
    out = torch.zeros((2, len(views), 48, 48, 3))
    for first in (8, 0, 4):
        part = slice(first, first + 4)
        some = np.ascontiguousarray(params[:, part])
        augment_on_cpu(crops[part].numpy(), some, recipe, out.numpy(), first)
    assert all(torch.equal(a, b.permute(0, 3, 1, 2)) for a, b in zip(whole, out, strict=True))


def test_cpu_stage_gives_the_same_bits_compiled_or_cached(tmp_path: Path) -> None:
    """A resumed run loads kernels from numba's cache that the first run compiled."""
    program = """
import hashlib, numpy as np
from pipelines.augment.draws import draw_parameters
from pipelines.augment.photometric_cpu import augment_on_cpu
from pipelines.randomness import Draw
from pipelines.recipe import moco_v2
crops = np.random.default_rng(0).integers(0, 256, (64, 2, 32, 32, 3), dtype=np.uint8)
params = draw_parameters(moco_v2(32), Draw(0, 0, np.arange(64)))
views = np.empty((2, 64, 32, 32, 3), np.float32)
augment_on_cpu(crops, params, moco_v2(32), views)
print(hashlib.sha256(views.tobytes()).hexdigest())
"""
    bits = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[3],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for _ in range(2)
    ]
    assert list(tmp_path.rglob("*.nbi"))
    assert bits[0] == bits[1]
