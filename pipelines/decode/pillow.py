"""Any picture file → upright 8-bit RGB, the same way for the converter and for every backend."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipelines.kernels.jpeg_crops import EXIF_ORIENTATION, TABLE_MISSING, missing_table

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
"""Pillow's names of the formats that pictures may have. It knows others, some of which run programs: a file
of PostScript starts Ghostscript, whatever its name."""
JPEG_START = b"\xff\xd8"
"""What every JPEG file begins with."""


def is_jpeg(payload: NDArray[np.uint8]) -> bool:
    """Whether these bytes begin as a JPEG file does."""
    return payload[: len(JPEG_START)].tobytes() == JPEG_START


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode, turn as the EXIF tag says, convert to 8-bit RGB; transparency is dropped.

    Raises ValueError for floating-point pixels, and what Pillow raises for a file that is no whole picture.
    """
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        # Sixteen bits a pixel: Pillow's conversion would clip instead of scale.
        grey = np.asarray(upright).astype(np.float32)
        return Image.fromarray(np.clip(grey / 257 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if upright.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown; convert them to 8 bits first")
    return upright.convert("RGB")


def planes_to_rgb(payload: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Make (H, W, 3) uint8 pixels of planes at 4:2:0 (see pipelines.sets.beton), as a JPEG's decoder does.

    The chroma is enlarged with the weights ¾ and ¼, which JPEG decoders call fancy upsampling.
    """
    rows, columns = (height + 1) // 2, (width + 1) // 2
    luma, chroma = height * width, rows * columns
    y, u, v = np.split(payload, (luma, luma + chroma))
    planes = [y.reshape(height, width)]
    for plane in (u, v):
        enlarged = _doubled(_doubled(plane.reshape(rows, columns).astype(np.float32)).T).T
        planes.append((enlarged[:height, :width] + 0.5).astype(np.uint8))
    return np.asarray(Image.merge("YCbCr", [Image.fromarray(plane) for plane in planes]).convert("RGB"))


def _doubled(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    above, below = np.concatenate([rows[:1], rows[:-1]]), np.concatenate([rows[1:], rows[-1:]])
    near, far = np.float32(0.75), np.float32(0.25)
    pairs = np.stack([near * rows + far * above, near * rows + far * below], axis=1)
    return pairs.reshape(-1, rows.shape[1]).astype(np.float32, copy=False)


def open_picture(payload: bytes) -> Image.Image:
    """Open an encoded picture of one of FORMATS by Pillow, which decodes it at the first use of its pixels.

    Raises ValueError for a JPEG that lacks a table it needs, and what Pillow raises for a file of another
    format (UnidentifiedImageError) or a damaged header.
    """
    if missing := missing_table(np.frombuffer(payload, np.uint8)):
        raise ValueError(TABLE_MISSING[missing])
    return Image.open(io.BytesIO(payload), formats=FORMATS)


def read_rgb(payload: bytes) -> Image.Image | None:
    """The picture in ``payload`` by :func:`upright_rgb`, None where it cannot be decoded."""
    # Pillow's readers meet arbitrary bytes here and raise nearly anything; all of it means a bad picture.
    try:
        with open_picture(payload) as image:
            return upright_rgb(image)
    except MemoryError:
        raise
    except Exception:
        return None


def read_size(payload: bytes) -> tuple[int, int] | None:
    """(height, width) in pixels of the upright picture, by its header; None where that cannot be read."""
    try:
        with open_picture(payload) as image:
            turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except MemoryError:
        raise
    except Exception:
        return None
