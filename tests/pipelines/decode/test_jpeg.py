"""Planes against Pillow's libjpeg and NumPy transcriptions; verdicts for every kind of JPEG."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.decode.jpeg import Jpeg, Planes, check_jpeg, encode_planes, read_header
from pipelines.decode.pillow import planes_to_rgb
from tests.dataset_tools.conftest import unusual_jpeg

Pixels = npt.NDArray[np.uint8]
TJPF_RGB, TJSAMP_420 = 0, 2
# Small sides, and sides around multiples of JPEG's blocks of 8 and 16 px.
sides = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 47, 48, 49, 127, 128, 129]))


def colourful(width: int, height: int) -> Pixels:
    """An image with coloured structure in all directions, the same for the same size."""
    rng = np.random.default_rng(width * 1000 + height)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return (smooth + rng.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8)


def jpeg(pixels: Pixels, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **({"quality": 90, "subsampling": 2} | options))
    return buffer.getvalue()


def ycbcr_by_pillow(payload: bytes) -> Pixels:
    """(H, W, 3) Y, Cb, Cr as Pillow's libjpeg decodes them, chroma enlarged."""
    with Image.open(io.BytesIO(payload)) as image:
        image.draft("YCbCr", image.size)
        assert image.mode == "YCbCr"
        return np.asarray(image)


def fancy_upsampled(plane: Pixels, width: int, height: int) -> Pixels:
    """libjpeg's "fancy" enlargement of a chroma plane, weights 9, 3, 3, 1, transcribed to NumPy."""
    if plane.shape[1] <= 2:
        return plane.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    rows = np.pad(plane.astype(np.int64), ((1, 1), (0, 0)), mode="edge")
    tall = np.empty((2 * plane.shape[0], plane.shape[1]), np.int64)
    tall[0::2], tall[1::2] = 3 * rows[1:-1] + rows[:-2], 3 * rows[1:-1] + rows[2:]
    columns = np.pad(tall, ((0, 0), (1, 1)), mode="edge")
    out = np.empty((tall.shape[0], 2 * tall.shape[1]), np.int64)
    out[:, 0::2] = (3 * tall + columns[:, :-2] + 8) >> 4
    out[:, 1::2] = (3 * tall + columns[:, 2:] + 7) >> 4
    return out[:height, :width].astype(np.uint8)


def planes_by_numpy(rgb: Pixels) -> list[npt.NDArray[np.float64]]:
    """JFIF's conversion and the means of 2 × 2 pixels, the last odd row or column counted twice."""
    height, width, _ = rgb.shape
    red, green, blue = np.moveaxis(rgb.astype(np.float64), 2, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    found = [luma]
    for colour, share in ((blue, 0.114), (red, 0.299)):
        chroma = 128 + 0.5 * (colour - luma) / (1 - share)
        even = np.pad(chroma, ((0, height % 2), (0, width % 2)), mode="edge")
        found.append(even.reshape(-(-height // 2), 2, -(-width // 2), 2).mean(axis=(1, 3)))
    return found


@given(width=sides, height=sides, progressive=st.booleans())
@settings(max_examples=80, deadline=None)
def test_planes_are_those_pillow_decodes(width: int, height: int, progressive: bool) -> None:
    payload = jpeg(colourful(width, height), progressive=progressive)
    y, u, v = Jpeg(payload).planes()
    expected = ycbcr_by_pillow(payload)
    half = (-(-height // 2), -(-width // 2))
    assert (y.shape, u.shape, v.shape) == ((height, width), half, half)
    assert np.array_equal(y, expected[:, :, 0])
    assert np.array_equal(fancy_upsampled(u, width, height), expected[:, :, 1])
    assert np.array_equal(fancy_upsampled(v, width, height), expected[:, :, 2])


@given(width=sides, height=sides)
@settings(max_examples=80, deadline=None)
def test_encoded_planes_follow_jfif(width: int, height: int) -> None:
    pixels = colourful(width, height)
    for plane, expected in zip(encode_planes(pixels), planes_by_numpy(pixels), strict=True):
        assert plane.shape == expected.shape
        assert np.abs(plane - expected).max() <= 1.01


@pytest.mark.parametrize("rgb", [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)])
def test_one_pixel_has_full_range(rgb: tuple[int, int, int]) -> None:
    pixel = np.array([[rgb]], np.uint8)
    planes = encode_planes(pixel)
    assert [plane.shape for plane in planes] == [(1, 1)] * 3
    expected = [round(float(plane[0, 0])) for plane in planes_by_numpy(pixel)]
    assert [int(plane[0, 0]) for plane in planes] == pytest.approx([min(n, 255) for n in expected], abs=1)
    from_jpeg = Jpeg(jpeg(pixel, quality=100)).planes()
    assert [int(plane[0, 0]) for plane in from_jpeg] == pytest.approx([min(n, 255) for n in expected], abs=2)


def test_rows_need_not_be_contiguous() -> None:
    pixels = colourful(30, 20)
    flipped = encode_planes(pixels[:, ::-1])
    for plane, expected in zip(flipped, encode_planes(np.ascontiguousarray(pixels[:, ::-1])), strict=True):
        assert np.array_equal(plane, expected)


@given(width=sides, height=sides)
@settings(max_examples=40, deadline=None)
def test_packed_is_y_then_u_then_v(width: int, height: int) -> None:
    planes = encode_planes(colourful(width, height))
    packed = planes.packed()
    assert packed.tobytes() == b"".join(plane.tobytes() for plane in planes)
    assert packed.size == height * width + 2 * (-(-height // 2)) * (-(-width // 2))


@given(width=sides.filter(lambda n: n > 4), height=sides)
@settings(max_examples=40, deadline=None)
def test_planes_become_the_pixels_that_pillow_decodes(width: int, height: int) -> None:
    """Wider than 4 px, because libjpeg enlarges the chroma of narrower images by repeating it."""
    file = io.BytesIO()
    Image.fromarray(colourful(width, height)).save(file, "JPEG", quality=90, subsampling="4:2:0")
    packed = Jpeg(file.getvalue()).planes().packed()
    expected = np.asarray(Image.open(file)).astype(int)
    assert np.abs(planes_to_rgb(packed, height, width) - expected).max() <= 3


@pytest.mark.parametrize(
    ("options", "is_colour", "is_yuv420"),
    [
        ({}, True, True),
        ({"progressive": True}, True, True),
        ({"subsampling": 0}, True, False),
        ({"subsampling": 1}, True, False),
        ({"subsampling": 0, "keep_rgb": True}, True, False),
        ({"mode": "L"}, False, False),
        ({"mode": "CMYK"}, False, False),
    ],
)
def test_header_and_check_know_every_kind(options: dict[str, Any], is_colour: bool, is_yuv420: bool) -> None:
    settings = {"subsampling": 2} | options
    buffer = io.BytesIO()
    Image.fromarray(colourful(37, 21)).convert(settings.pop("mode", "RGB")).save(buffer, "JPEG", **settings)
    payload = buffer.getvalue()
    header = read_header(payload)
    assert header is not None
    assert (header.width, header.height) == (37, 21)
    assert (header.is_colour, header.is_yuv420) == (is_colour, is_yuv420)
    verdict = check_jpeg(payload)
    assert (verdict.state, verdict.width, verdict.height) == ("whole", 37, 21)
    assert check_jpeg(payload[: len(payload) * 3 // 4]).state == "damaged"
    if is_yuv420:
        assert isinstance(Jpeg(payload).planes(), Planes)
    else:
        with pytest.raises(ValueError, match="4:2:0"):
            Jpeg(payload).planes()


def test_subsampling_without_a_name_can_be_checked() -> None:
    payload = unusual_jpeg()
    found = read_header(payload)
    assert found is not None
    assert (found.width, found.height, found.is_colour, found.is_usual) == (32, 16, True, False)
    assert check_jpeg(payload).state == "whole"
    assert check_jpeg(payload[:-7]).state == "damaged"


@pytest.mark.parametrize("payload", [b"", b"hello", b"\xff\xd8\xff"])
def test_other_content_has_no_header(payload: bytes) -> None:
    assert read_header(payload) is None
    with pytest.raises(ValueError, match="4:2:0"):
        Jpeg(payload).planes()


def test_lost_pixels_are_an_error_and_stray_bytes_are_not() -> None:
    whole = jpeg(colourful(64, 48))
    with pytest.raises(ValueError, match="remature end"):
        Jpeg(whole[: len(whole) // 2]).planes()
    irregular = whole[:-2] + b"stray" * 40 + whole[-2:]
    assert check_jpeg(irregular).state == "irregular"
    for plane, expected in zip(Jpeg(irregular).planes(), Jpeg(whole).planes(), strict=True):
        assert np.array_equal(plane, expected)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
    ],
)
def test_other_arrays_are_refused(pixels: Any) -> None:
    with pytest.raises(ValueError, match=r"give \(H, W, 3\) uint8"):
        encode_planes(pixels)
