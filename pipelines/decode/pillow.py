"""Decoding with Pillow: the ``folder`` backend, and functions for single images.

The ``folder`` backend reads folders of images without conversion. The other backends are tested against it.
Pillow does not report damage inside the coded data of a JPEG; conversion and ``python -m dataset_tools
verify`` do.

Shape letters: N images, V views, H height, W width, S side in pixels.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms.functional import InterpolationMode, hflip, resized_crop

from pipelines.kernels.jpeg_crops import EXIF_ORIENTATION, TABLE_MISSING, missing_table
from pipelines.sets import Encoded
from pipelines.sets.beton import MODE_JPEG, MODE_RAW

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
"""Pillow's names of the supported formats. Others are disabled, because some run programs: Pillow decodes a
PostScript file by Ghostscript, whatever the suffix of the file."""
JPEG_START = b"\xff\xd8"
"""First bytes of every JPEG file."""


class PillowDecoder:
    """Pillow's decoder and torchvision's ``resized_crop``; see :class:`pipelines.decode.Decoder`."""

    name = "folder"

    def crop(
        self, encoded: Encoded, boxes_NV5: NDArray[np.int32], out_NVSS3: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Decode each image once and write its crops; returns which images could be decoded."""
        contents = (content_C.tobytes() for content_C in encoded)
        return np.fromiter(map(_crop, contents, boxes_NV5, out_NVSS3), np.bool_, len(encoded.index_N))


def _crop(content: bytes, boxes_V5: NDArray[np.int32], out_VSS3: NDArray[np.uint8]) -> bool:
    image = read_rgb(content)
    if image is None:
        return False
    size = list(out_VSS3.shape[1:3])
    for box, out_SS3 in zip(boxes_V5, out_VSS3, strict=True):
        top, left, height, width, mirrored = (int(x) for x in box)
        view = resized_crop(image, top, left, height, width, size, InterpolationMode.BILINEAR)
        out_SS3[...] = hflip(view) if mirrored else view
    return True


def decode_image(encoded: Encoded) -> NDArray[np.uint8] | None:
    """Decode one image completely.

    Args:
        encoded: one image, in any mode.

    Returns:
        (H, W, 3) RGB, upright; None if the image cannot be decoded.
    """
    (data_C,) = encoded
    height, width = encoded.size_N2[0].tolist()
    if encoded.mode_N[0] == MODE_JPEG:
        image = read_rgb(data_C.tobytes())
        return None if image is None else np.asarray(image)
    if encoded.mode_N[0] == MODE_RAW:
        return np.array(data_C).reshape(height, width, 3)
    return planes_to_rgb(data_C, height, width)


def is_jpeg(payload: NDArray[np.uint8]) -> bool:
    """Whether the bytes start like a JPEG file."""
    return payload[: len(JPEG_START)].tobytes() == JPEG_START


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode, rotate by the EXIF tag and convert to 8-bit RGB; transparency is dropped.

    Raises:
        ValueError: for floating-point pixels.
        Exception: whatever Pillow raises for a damaged file.
    """
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        # Sixteen bits per pixel. Pillow's own conversion clips the values instead of scaling them.
        grey = np.asarray(upright).astype(np.float32)
        return Image.fromarray(np.clip(grey / 257 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if upright.mode == "F":
        raise ValueError("floating-point pixels of unknown range; convert them to 8 bits first")
    return upright.convert("RGB")


def planes_to_rgb(payload: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Convert planes at 4:2:0 (see :mod:`pipelines.sets.beton`) to (H, W, 3) uint8 RGB as JPEG decoders do.

    The chroma is upsampled with the weights ¾ and ¼, which JPEG decoders call fancy upsampling.
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


def open_image(payload: bytes) -> Image.Image:
    """Open an encoded image of one of ``FORMATS``. Pillow decodes it when its pixels are first accessed.

    Raises:
        ValueError: for a JPEG that lacks a table it needs.
        PIL.UnidentifiedImageError: for another format.
        Exception: whatever Pillow raises for a damaged header.
    """
    if missing := missing_table(np.frombuffer(payload, np.uint8)):
        raise ValueError(TABLE_MISSING[missing])
    return Image.open(io.BytesIO(payload), formats=FORMATS)


def read_rgb(payload: bytes) -> Image.Image | None:
    """Decode an image by :func:`upright_rgb`; None if it cannot be decoded."""
    # For arbitrary bytes, Pillow may raise almost any exception. All of them mean a bad image.
    try:
        with open_image(payload) as image:
            return upright_rgb(image)
    except MemoryError:
        raise
    except Exception:
        return None


def read_size(payload: bytes) -> tuple[int, int] | None:
    """(height, width) in pixels after rotation by the EXIF tag; None if the header cannot be read."""
    try:
        with open_image(payload) as image:
            is_rotated = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if is_rotated else (image.height, image.width)
    except MemoryError:
        raise
    except Exception:
        return None
