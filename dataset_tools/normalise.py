"""Any picture → what a compiled set stores: its own JPEG bytes, a new JPEG, planes, or raw pixels."""

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


class BadPicture(Exception):
    """A picture that cannot go into a set; ``reason`` groups it in the report, ``detail`` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Normalising:
    """What becomes of a picture on its way into a set."""

    tier: Tier = "jpeg"
    """jpeg: store JPEG files, a plain RGB one untouched; yuv420: store planes, those of a 4:2:0 JPEG exactly
    as it decodes; raw: store (H, W, 3) uint8 pixels."""
    quality: int = 95
    """JPEG quality, 1 … 100, of pictures that must be encoded anew."""
    max_side: int | None = None
    """Pictures with a longer side than this many px are reduced to it; None leaves sizes alone."""
    short_side: int | None = None
    """Pictures with a shorter side than this many px stay; the others are reduced to it; None as above."""
    recompress: bool = False
    """Encode every JPEG anew at ``quality``, even one that could be stored untouched."""
    verify: bool = True
    """Decode every untouched JPEG once, to find cut and corrupt ones."""

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
        """Return the (width, height) to reduce a picture to, None where it keeps its size."""
        side, wanted = (
            (max(width, height), self.max_side)
            if self.short_side is None
            else (min(width, height), self.short_side)
        )
        if wanted is None or side <= wanted:
            return None
        return max(1, round(width * wanted / side)), max(1, round(height * wanted / side))


@dataclass(frozen=True, slots=True)
class Normal:
    """A picture as it will be stored."""

    payload: bytes | npt.NDArray[np.uint8]
    width: int
    height: int
    changed: str = ""
    """Why it is not the source's own bytes, "" where it is."""


def normalise(payload: bytes | npt.NDArray[np.uint8], how: Normalising) -> Normal:
    """Bring one picture into the form ``how`` asks for.

    ``payload`` is an encoded file of any kind Pillow reads, or (H, W, 3) uint8 RGB. A JPEG of three
    components, upright by its EXIF tag and not to be reduced passes untouched into the jpeg tier, and one of
    them at 4:2:0 gives the yuv420 tier its own planes. Anything else is decoded, turned upright, converted to
    RGB, reduced, and made into what the tier stores; a JPEG is encoded anew at 4:2:0, all else at 4:4:4.
    Raises BadPicture where it cannot be decoded in full or has a side over 65,535 px.
    """
    if isinstance(payload, np.ndarray):
        return _normalise_pixels(payload, how)
    # Pillow's readers meet arbitrary bytes here and raise nearly anything; all of it means a bad picture.
    try:
        if (normal := _as_it_is(payload, how)) is not None:
            return normal
        with open_image(payload) as image:
            return _normalise_opened(payload, image, how)
    except (BadPicture, MemoryError, ImportError):
        raise
    except UnidentifiedImageError as error:
        raise BadPicture("not a picture") from error
    except Image.DecompressionBombError as error:
        raise BadPicture("too large", str(error)) from error
    except Exception as error:
        reason = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise BadPicture(reason, str(error)) from error


def _as_it_is(payload: bytes, how: Normalising) -> Normal | None:
    """Take a sound JPEG that needs no change by the decoder's word alone; None: Pillow must look at it.

    Most JPEGs of a set go this way, which costs them nothing but the one decode that checks them.
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
        return None  # perhaps a small file that would take all memory
    if how.tier == "yuv420":
        return _own_planes(jpeg, header.width, header.height) if header.is_yuv420 else None
    if how.verify and jpeg.check().state != "whole":
        return None
    return Normal(payload, header.width, header.height)


def _is_plain_jpeg(payload: bytes) -> bool:
    """Is this a JPEG without EXIF and XMP, which may ask for a rotation, before its first scan?"""
    if not payload.startswith(JPEG_START):
        return False
    at = len(JPEG_START)
    while at + 4 <= len(payload) and payload[at] == _MARKER and payload[at + 1] != _APP1:
        if payload[at + 1] == _SOS:
            return True
        at += 2 + int.from_bytes(payload[at + 2 : at + 4])
    return False


def _own_planes(jpeg: Jpeg, width: int, height: int) -> Normal:
    """Decode a 4:2:0 JPEG to what the yuv420 tier stores of it."""
    try:
        return Normal(jpeg.planes().packed(), width, height)
    except ValueError as error:
        raise _damaged(str(error)) from error


def _damaged(message: str) -> BadPicture:
    """What the decoder's complaint about lost pixels means."""
    return BadPicture("truncated" if "remature end" in message else "damaged", message)


def _normalise_pixels(pixels: npt.NDArray[np.uint8], how: Normalising) -> Normal:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise BadPicture(
            "not a picture", f"pixels are {pixels.dtype} of shape {pixels.shape}, not (H, W, 3) uint8"
        )
    height, width, _ = pixels.shape
    reduced = how.reduced(width, height)
    if how.tier == "raw" and reduced is None:
        return Normal(np.ascontiguousarray(pixels), width, height)
    return _store(Image.fromarray(pixels), "pixels", how, _reduction(how) if reduced else "pixels")


def _normalise_opened(payload: bytes, image: Image.Image, how: Normalising) -> Normal:
    if max(image.size) > MAX_SIDE_PX:
        raise BadPicture(
            "too large", f"{image.width} × {image.height} px; the limit is {MAX_SIDE_PX} px a side"
        )
    kind = image.format or "unknown"
    changed = _why_not_as_is(payload, image, kind, how)
    if how.tier == "yuv420" and not changed:
        return _own_planes(Jpeg(payload), image.width, image.height)
    if kind in _JPEG_FORMATS and (how.verify or changed):
        verdict = check_jpeg(payload)
        if verdict.state == "damaged":
            raise _damaged(verdict.message)
        if verdict.state == "irregular" and not changed:
            changed = "irregular JPEG"
    if not changed and how.tier == "jpeg":
        return Normal(payload, image.width, image.height)
    return _store(upright_rgb(image), kind, how, changed)


def _why_not_as_is(payload: bytes, image: Image.Image, kind: str, how: Normalising) -> str:
    """Return why this file's bytes, or planes, cannot be stored as they are; "" where they can."""
    if how.reduced(*image.size) is not None:
        return _reduction(how)
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


def _reduction(how: Normalising) -> str:
    """Name the change of a picture that is reduced."""
    if how.short_side is not None:
        return f"reduced to a short side of {how.short_side} px"
    return f"reduced to {how.max_side} px"


def _store(image: Image.Image, kind: str, how: Normalising, changed: str) -> Normal:
    """Reduce where asked, then encode for the tier; in the raw tier only a reduction counts as a change."""
    if (size := how.reduced(*image.size)) is not None:
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    if max(image.size) > MAX_SIDE_PX:
        raise BadPicture(
            "too large", f"{image.width} × {image.height} px; the limit is {MAX_SIDE_PX} px a side"
        )
    if how.tier == "raw":
        reduced = changed if changed.startswith("reduced") else ""
        return Normal(np.ascontiguousarray(np.asarray(image)), image.width, image.height, reduced)
    if how.tier == "yuv420":
        return Normal(encode_planes(np.asarray(image)).packed(), image.width, image.height, changed)
    buffer = io.BytesIO()
    subsampling = "4:2:0" if kind in _JPEG_FORMATS else "4:4:4"
    image.save(buffer, "JPEG", quality=how.quality, subsampling=subsampling)
    return Normal(buffer.getvalue(), image.width, image.height, changed)
