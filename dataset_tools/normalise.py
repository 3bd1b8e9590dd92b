"""Converts any image to what a compiled set stores: its own JPEG, a new JPEG, planes, or raw pixels."""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pipelines.decode.jpeg import Jpeg, check_jpeg, encode_planes, read_header
from pipelines.decode.pillow import JPEG_START, open_image, upright_rgb
from pipelines.kernels.jpeg_crops import EXIF_ORIENTATION
from pipelines.sets.beton import MAX_SIDE_PX
from pipelines.sets.manifest import TIERS, Tier

_JPEG_FORMATS = ("JPEG", "MPO")
_MARKER, _APP1, _SOS = 0xFF, 0xE1, 0xDA


class BadImage(Exception):
    """An image that is unusable; reports count images by ``reason``; ``detail`` is specific.

    Both are stored in users' files: manifests count the reasons, and lists of skipped images hold both.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Normalising:
    """How images are converted. Raises ValueError for unusable values."""

    tier: Tier = "jpeg"
    """jpeg: store JPEG files, plain RGB ones unchanged. yuv420: store planes; of a 4:2:0 JPEG, exactly those
    to which it decodes. raw: store (H, W, 3) uint8 pixels."""
    quality: int = 95
    """JPEG quality, 1 … 100, of images that must be encoded again."""
    max_side: int | None = None
    """Reduce the longer side to this number of px if it is larger; None keeps sizes."""
    short_side: int | None = None
    """Reduce the shorter side to this number of px if it is larger; None keeps sizes."""
    recompress: bool = False
    """Encode every JPEG again at ``quality``, even one that could be stored unchanged."""
    verify: bool = True
    """Decode every unchanged JPEG once, to find truncated and damaged ones."""

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise ValueError(f"tier is {self.tier!r}; known are {', '.join(TIERS)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; it must lie in 1 … 100")
        for name, side in (("max_side", self.max_side), ("short_side", self.short_side)):
            if side is not None and not 1 <= side <= MAX_SIDE_PX:
                raise ValueError(f"{name} is {side} px; it must lie in 1 … {MAX_SIDE_PX}")
        if self.max_side is not None and self.short_side is not None:
            raise ValueError(
                f"max_side is {self.max_side} px and short_side {self.short_side} px; give one of the two"
            )
        if self.recompress and self.tier != "jpeg":
            raise ValueError(f"recompress encodes JPEGs, the tier {self.tier} has none; choose tier jpeg")

    def reduced(self, width: int, height: int) -> tuple[int, int] | None:
        """Return the (width, height) to reduce an image to, or None if it keeps its size."""
        side, limit = (
            (max(width, height), self.max_side)
            if self.short_side is None
            else (min(width, height), self.short_side)
        )
        if limit is None or side <= limit:
            return None
        return max(1, round(width * limit / side)), max(1, round(height * limit / side))


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in the form in which it is stored."""

    payload: bytes | npt.NDArray[np.uint8]
    width: int
    height: int
    changed: str = ""
    """Why it differs from the source; "" if it does not."""


def normalise(payload: bytes | npt.NDArray[np.uint8], how: Normalising) -> StoredImage:
    """Convert one image to the form that ``how`` describes.

    In the jpeg tier, an RGB JPEG stays unchanged if it is upright and small enough. In the yuv420 tier, such
    a JPEG with 4:2:0 chroma is stored as the planes to which it decodes. Any other image is decoded, turned
    upright, converted to RGB, reduced, and stored as the tier requires; JPEGs are encoded at 4:2:0, other
    images at 4:4:4.

    Args:
        payload: an encoded file of a format that Pillow reads, or (H, W, 3) uint8 RGB pixels.
        how: the options.

    Raises:
        BadImage: if the image cannot be decoded completely or has a side over 65,535 px.
    """
    if isinstance(payload, np.ndarray):
        return _normalise_pixels(payload, how)
    # For arbitrary bytes Pillow raises nearly any exception; each of them means a bad image.
    try:
        if (normal := _store_unchanged(payload, how)) is not None:
            return normal
        with open_image(payload) as image:
            return _normalise_opened(payload, image, how)
    except (BadImage, MemoryError, ImportError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not a picture") from error
    except Image.DecompressionBombError as error:
        raise BadImage("too large", str(error)) from error
    except Exception as error:
        reason = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise BadImage(reason, str(error)) from error


def _store_unchanged(payload: bytes, how: Normalising) -> StoredImage | None:
    """Return an image that can be stored unchanged, or None if Pillow must examine it.

    Most JPEGs of a set take this path, which costs only the decode that checks them.
    """
    if how.tier == "raw" or how.recompress or not _is_plain_jpeg(payload):
        return None
    jpeg = Jpeg(payload)
    header = jpeg.header
    if header is None or not (header.is_colour and header.is_usual):
        return None
    if how.reduced(header.width, header.height) is not None:
        return None
    if header.width * header.height > (Image.MAX_IMAGE_PIXELS or 0):
        return None  # its pixels may not fit in memory, even if the file is small
    if how.tier == "yuv420":
        return _decode_planes(jpeg, header.width, header.height) if header.is_yuv420 else None
    if how.verify and jpeg.check().state != "whole":
        return None
    return StoredImage(payload, header.width, header.height)


def _is_plain_jpeg(payload: bytes) -> bool:
    """Whether this is a JPEG without an APP1 segment (EXIF or XMP, which may request a rotation)."""
    if not payload.startswith(JPEG_START):
        return False
    at = len(JPEG_START)
    while at + 4 <= len(payload) and payload[at] == _MARKER and payload[at + 1] != _APP1:
        if payload[at + 1] == _SOS:  # segments after the start of a scan are not read
            return True
        at += 2 + int.from_bytes(payload[at + 2 : at + 4])
    return False


def _decode_planes(jpeg: Jpeg, width: int, height: int) -> StoredImage:
    try:
        return StoredImage(jpeg.planes().packed(), width, height)
    except ValueError as error:
        raise _damaged(str(error)) from error


def _damaged(message: str) -> BadImage:
    """The error for a decoder's message about missing pixels."""
    return BadImage("truncated" if "remature end" in message else "damaged", message)


def _normalise_pixels(pixels: npt.NDArray[np.uint8], how: Normalising) -> StoredImage:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise BadImage(
            "not a picture", f"pixels are {pixels.dtype} of shape {pixels.shape}, not (H, W, 3) uint8"
        )
    height, width, _ = pixels.shape
    reduced = how.reduced(width, height)
    if how.tier == "raw" and reduced is None:
        return StoredImage(np.ascontiguousarray(pixels), width, height)
    return _encode(Image.fromarray(pixels), "pixels", how, _reduction_reason(how) if reduced else "pixels")


def _normalise_opened(payload: bytes, image: Image.Image, how: Normalising) -> StoredImage:
    if max(image.size) > MAX_SIDE_PX:
        raise BadImage(
            "too large", f"{image.width} × {image.height} px; the limit is {MAX_SIDE_PX} px a side"
        )
    kind = image.format or "unknown"
    changed = _reason_to_convert(payload, image, kind, how)
    if how.tier == "yuv420" and not changed:
        return _decode_planes(Jpeg(payload), image.width, image.height)
    if kind in _JPEG_FORMATS and (how.verify or changed):
        verdict = check_jpeg(payload)
        if verdict.state == "damaged":
            raise _damaged(verdict.message)
        if verdict.state == "irregular" and not changed:
            changed = "irregular JPEG"
    if not changed and how.tier == "jpeg":
        return StoredImage(payload, image.width, image.height)
    return _encode(upright_rgb(image), kind, how, changed)


def _reason_to_convert(payload: bytes, image: Image.Image, kind: str, how: Normalising) -> str:
    """Return why this file's bytes, or planes, cannot be stored as they are; "" if they can."""
    if how.reduced(*image.size) is not None:
        return _reduction_reason(how)
    if kind not in _JPEG_FORMATS:
        return kind
    if image.mode != "RGB":
        return {"L": "greyscale JPEG", "CMYK": "CMYK JPEG"}.get(image.mode, f"{image.mode} JPEG")
    if image.getexif().get(EXIF_ORIENTATION, 1) not in (0, 1):
        return "EXIF rotation"
    if how.recompress:
        return "recompressed"
    header = read_header(payload)
    if header is not None and not header.is_usual:
        return "JPEG of unusual subsampling"
    if how.tier == "yuv420" and (header is None or not header.is_yuv420):
        return "JPEG not of 4:2:0"
    return ""


def _reduction_reason(how: Normalising) -> str:
    """The reason that is recorded for a reduced image."""
    if how.short_side is not None:
        return f"reduced to a short side of {how.short_side} px"
    return f"reduced to {how.max_side} px"


def _encode(image: Image.Image, kind: str, how: Normalising, changed: str) -> StoredImage:
    """Reduce if needed, then encode for the tier; in the raw tier only a reduction counts as a change."""
    if (size := how.reduced(*image.size)) is not None:
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    if max(image.size) > MAX_SIDE_PX:
        raise BadImage(
            "too large", f"{image.width} × {image.height} px; the limit is {MAX_SIDE_PX} px a side"
        )
    if how.tier == "raw":
        reduced = changed if changed.startswith("reduced") else ""
        return StoredImage(np.ascontiguousarray(np.asarray(image)), image.width, image.height, reduced)
    if how.tier == "yuv420":
        return StoredImage(encode_planes(np.asarray(image)).packed(), image.width, image.height, changed)
    buffer = io.BytesIO()
    subsampling = "4:2:0" if kind in _JPEG_FORMATS else "4:4:4"
    image.save(buffer, "JPEG", quality=how.quality, subsampling=subsampling)
    return StoredImage(buffer.getvalue(), image.width, image.height, changed)
