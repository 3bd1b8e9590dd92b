"""Makes small images of every kind."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Encode = Callable[..., bytes]


def encode(
    width: int = 64, height: int = 48, mode: str = "RGB", kind: str = "JPEG", **options: object
) -> bytes:
    """A smooth image with some noise, encoded; the same for the same arguments."""
    rng = np.random.default_rng(width * 1000 + height)
    small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(image, np.int16) + rng.integers(-9, 10, (height, width, 3))
    image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def unusual_jpeg() -> bytes:
    """A mid-grey JPEG of 32 × 16 px with 4 × 2 luma blocks per chroma block, unknown to TurboJPEG."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 16), (128, 128, 128)).save(buffer, "JPEG", subsampling=0)
    head, scan = buffer.getvalue().split(b"\xff\xda")
    one, four_by_two = bytes([1, 0x11, 0, 2, 0x11, 1]), bytes([1, 0x42, 0, 2, 0x11, 1])
    assert one in head
    # Eight blocks of luma and two of chroma, each "no difference, end of block", padded with ones.
    blocks = int(("001010" * 8 + "0000" * 2).ljust(56, "1"), 2).to_bytes(7)
    return head.replace(one, four_by_two) + b"\xff\xda" + scan[:12] + blocks + b"\xff\xd9"


@pytest.fixture(name="encode")
def _encode() -> Encode:
    return encode


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes: cats with three JPEGs, dogs with two, one of them in a nested folder."""
    root = tmp_path / "images"
    for i, name in enumerate(["cats/a.jpg", "cats/b.JPEG", "cats/c.jpeg", "dogs/a.jpg", "dogs/deep/b.JPG"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(60 + i, 40 + i))
    return root
