"""Small pictures of every kind, made on the spot."""

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
    """A smooth picture with some noise, encoded; the same for the same arguments."""
    rng = np.random.default_rng(width * 1000 + height)
    small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(image, np.int16) + rng.integers(-9, 10, (height, width, 3))
    image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(name="encode")
def _encode() -> Encode:
    return encode


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes: cats with three JPEGs, dogs with two, one of them in a nested folder."""
    root = tmp_path / "pictures"
    for i, name in enumerate(["cats/a.jpg", "cats/b.JPEG", "cats/c.jpeg", "dogs/a.jpg", "dogs/deep/b.JPG"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(60 + i, 40 + i))
    return root
