"""The resampler against PIL."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipelines.resample import resample_crop

PICTURE = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@given(data=st.data(), side=st.sampled_from([8, 31, 64, 130]))
@settings(max_examples=60, deadline=None)
def test_within_one_grey_level_of_pil(data: st.DataObject, side: int) -> None:
    height = data.draw(st.integers(1, 90))
    width = data.draw(st.integers(1, 120))
    top = data.draw(st.integers(0, 90 - height))
    left = data.draw(st.integers(0, 120 - width))
    assert np.abs(_difference(top, left, height, width, side)).max() <= 1


@given(width=st.integers(1, 120), side=st.sampled_from([8, 31, 64, 90]))
@settings(max_examples=60, deadline=None)
def test_one_pass_equals_pil_bit_for_bit(width: int, side: int) -> None:
    """Along one axis there is no order of passes to differ in."""
    assert not _difference(0, 0, side, width, side).any()
    assert not _difference(0, 0, min(width, 90), side, side).any()


def _difference(top: int, left: int, height: int, width: int, side: int) -> NDArray[np.int16]:
    out = np.zeros((side, side, 3), np.uint8)
    resample_crop(PICTURE, top, left, height, width, out)
    crop = Image.fromarray(PICTURE[top : top + height, left : left + width])
    expected = np.asarray(crop.resize((side, side), Image.Resampling.BILINEAR))
    return out.astype(np.int16) - expected
