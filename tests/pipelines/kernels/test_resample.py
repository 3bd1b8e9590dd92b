"""The resampler against PIL, on pixels and on the planes of JPEGs."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipelines.kernels.resample import SLACK, crop_planes, crop_rgb, make_scratch
from tests.conftest import photograph_like

PICTURE = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@st.composite
def boxes(draw: st.DrawFn, height: int = 90, width: int = 120) -> tuple[int, int, int, int, int]:
    h, w = draw(st.integers(1, height)), draw(st.integers(1, width))
    top, left = draw(st.integers(0, height - h)), draw(st.integers(0, width - w))
    return top, left, h, w, draw(st.integers(0, 1))


@given(box=boxes(), side=st.sampled_from([8, 16, 31, 64, 130]))
@settings(max_examples=100, deadline=None)
def test_pixels_within_one_grey_level_of_pil(box: tuple[int, int, int, int, int], side: int) -> None:
    out = np.zeros((side, side, 3), np.uint8)
    crop_rgb(_flat(PICTURE), PICTURE.shape[1], box, out.reshape(-1), make_scratch(side, max(box[2:4])))
    assert np.abs(out.astype(int) - _by_pil(PICTURE, box, side)).max() <= 1


def test_a_large_image_shrinks_without_overflow() -> None:
    white = np.full((4000, 3000, 3), 255, np.uint8)
    out = np.zeros((16, 16, 3), np.uint8)
    crop_rgb(_flat(white), 3000, (0, 0, 4000, 3000, 0), out.reshape(-1), make_scratch(16, 4000))
    assert (out == 255).all()


@given(
    size=st.tuples(st.integers(8, 90), st.integers(8, 120)),
    sampling=st.sampled_from([(1, 1), (1, 2), (2, 2)]),
    side=st.sampled_from([8, 31, 64, 130]),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_planes_within_two_grey_levels_of_enlarging_first(
    size: tuple[int, int], sampling: tuple[int, int], side: int, data: st.DataObject
) -> None:
    """Against the long way: enlarge the chroma, resample each plane by PIL, convert."""
    rng = np.random.default_rng(size)
    box = data.draw(boxes(*size))
    small = -(-size[0] // sampling[0]), -(-size[1] // sampling[1])
    # Colours that RGB can show, so that nothing is clamped.
    y = rng.integers(100, 156, size, dtype=np.uint8)
    u, v = (rng.integers(98, 158, small, dtype=np.uint8) for _ in range(2))
    full = [y.astype(np.float32), *(_enlarge(plane, sampling, size) for plane in (u, v))]
    top, left, h, w, mirrored = box
    views = [
        np.asarray(
            Image.fromarray(plane[top : top + h, left : left + w]).resize((side, side), Image.BILINEAR)
        )
        for plane in full
    ]
    expected = _to_rgb(*views)
    expected = expected[:, ::-1] if mirrored else expected
    out = np.zeros((side, side, 3), np.uint8)
    _crop_planes((y, u, v), sampling, size, box, out)
    assert np.abs(out - expected).max() <= 1.01


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(97, 131), (128, 96)])
def test_planes_of_a_jpeg_stay_near_pils_crop(subsampling: str, size: tuple[int, int]) -> None:
    """Against PIL, which rounds four times more and clamps colours before it resamples."""
    height, width = size
    file = io.BytesIO()
    photograph_like(3, width, height).save(file, "JPEG", quality=90, subsampling=subsampling)
    box = (5, 9, height - 20, width - 30, 1)
    sampling = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}[subsampling]
    out = np.zeros((64, 64, 3), np.uint8)
    _crop_planes(_planes(file.getvalue(), sampling), sampling, size, box, out)
    off = np.abs(out.astype(int) - _by_pil(np.asarray(Image.open(file)), box, 64))
    assert (off > 2).mean() < 2e-3 and off.max() <= 8 and off.mean() < 0.5


def _flat(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([pixels.reshape(-1), np.zeros(SLACK, np.uint8)])


def _by_pil(pixels: NDArray[np.uint8], box: tuple[int, int, int, int, int], side: int) -> NDArray[np.uint8]:
    top, left, h, w, mirrored = box
    crop = Image.fromarray(pixels[top : top + h, left : left + w])
    view = np.asarray(crop.resize((side, side), Image.Resampling.BILINEAR))
    return view[:, ::-1] if mirrored else view


def _enlarge(
    plane: NDArray[np.uint8], sampling: tuple[int, int], size: tuple[int, int]
) -> NDArray[np.float32]:
    """libjpeg's fancy upsampling: each new sample is ¾ of its own sample and ¼ of the nearest other."""
    out = plane.astype(np.float32)
    for axis, factor in enumerate(sampling):
        if factor == 2:
            out = np.moveaxis(out, axis, 0)
            before, after = np.concatenate([out[:1], out[:-1]]), np.concatenate([out[1:], out[-1:]])
            pairs = np.stack([0.75 * out + 0.25 * before, 0.75 * out + 0.25 * after], axis=1)
            out = np.moveaxis(pairs.reshape(-1, *out.shape[1:]), 0, axis)
    return out[: size[0], : size[1]]


def _to_rgb(y: NDArray[np.float32], u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """JFIF's inverse of BT.601."""
    u, v = u - 128, v - 128
    return np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], axis=2)


def _planes(jpeg: bytes, sampling: tuple[int, int]) -> tuple[NDArray[np.uint8], ...]:
    """A JPEG's own planes, by libturbojpeg."""
    import ctypes

    from pipelines.kernels.turbojpeg import library

    lib = library()
    width, height = Image.open(io.BytesIO(jpeg)).size
    rows, columns = (-(-n // f) for n, f in zip((height, width), sampling, strict=True))
    planes = [np.zeros((rows * sampling[0], columns * sampling[1]), np.uint8)]
    planes += [np.zeros((rows, columns), np.uint8) for _ in range(2)]
    addresses = (ctypes.c_void_p * 3)(*(plane.ctypes.data for plane in planes))
    handle = ctypes.c_void_p(lib.tjInitDecompress())
    assert lib.tjDecompressToYUVPlanes(handle, jpeg, len(jpeg), addresses, width, None, height, 4096) == 0
    lib.tjDestroy(handle)
    return tuple(planes)


def _crop_planes(
    planes: tuple[NDArray[np.uint8], ...],
    sampling: tuple[int, int],
    size: tuple[int, int],
    box: tuple[int, int, int, int, int],
    out_SS3: NDArray[np.uint8],
) -> None:
    memory = _flat(np.concatenate([plane.reshape(-1) for plane in planes]))
    starts = (0, planes[0].size, planes[0].size + planes[1].size)
    pitches = planes[0].shape[1], planes[1].shape[1]
    halved = sampling[0] == 2, sampling[1] == 2
    scratch = make_scratch(len(out_SS3), max(box[2:4]))
    crop_planes(memory, starts, pitches, size, halved, box, out_SS3.reshape(-1), scratch)
