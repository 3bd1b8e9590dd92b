"""Any picture → what a compiled set stores: its own JPEG bytes, a new JPEG, or raw pixels."""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pipelines.beton import MAX_SIDE_PX
from pipelines.pictures import EXIF_ORIENTATION, upright_rgb
from pipelines.turbojpeg import check_jpeg

_JPEG_FORMATS = ("JPEG", "MPO")


class BadPicture(Exception):
    """A picture that cannot go into a set; ``reason`` groups it in the report, ``detail`` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Normalising:
    """What becomes of a picture on its way into a set."""

    tier: str = "jpeg"
    """jpeg: store JPEG files, a plain RGB one untouched; raw: store (H, W, 3) uint8 pixels."""
    quality: int = 95
    """JPEG quality, 1 … 100, of pictures that must be encoded anew."""
    max_side: int | None = None
    """Pictures with a longer side than this many px are reduced to it; None leaves sizes alone."""
    verify: bool = True
    """Decode every untouched JPEG once, to find cut and corrupt ones."""

    def __post_init__(self) -> None:
        if self.tier not in ("jpeg", "raw"):
            raise ValueError(f"tier is {self.tier!r}; known are jpeg, raw")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; it must lie in 1 … 100")
        if self.max_side is not None and not 1 <= self.max_side <= MAX_SIDE_PX:
            raise ValueError(f"max_side is {self.max_side} px; it must lie in 1 … {MAX_SIDE_PX}")


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
    components, upright by its EXIF tag and not above ``max_side`` passes untouched into the jpeg tier;
    anything else is decoded, turned upright, converted to RGB, and encoded anew: 4:2:0 what was a JPEG,
    4:4:4 what was not. Raises BadPicture where it cannot be decoded in full or has a side over 65,535 px.
    """
    if isinstance(payload, np.ndarray):
        return _normalise_pixels(payload, how)
    # Pillow's readers meet arbitrary bytes here and raise nearly anything; all of it means a bad picture.
    try:
        with Image.open(io.BytesIO(payload)) as image:
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


def _normalise_pixels(pixels: npt.NDArray[np.uint8], how: Normalising) -> Normal:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise BadPicture(
            "not a picture", f"pixels are {pixels.dtype} of shape {pixels.shape}, not (H, W, 3) uint8"
        )
    height, width, _ = pixels.shape
    reduced = how.max_side is not None and max(height, width) > how.max_side
    if how.tier == "raw" and not reduced:
        return Normal(np.ascontiguousarray(pixels), width, height)
    return _store(
        Image.fromarray(pixels), "pixels", how, f"reduced to {how.max_side} px" if reduced else "pixels"
    )


def _normalise_opened(payload: bytes, image: Image.Image, how: Normalising) -> Normal:
    if max(image.size) > MAX_SIDE_PX:
        raise BadPicture(
            "too large", f"{image.width} × {image.height} px; the limit is {MAX_SIDE_PX} px a side"
        )
    kind = image.format or "unknown"
    changed = _why_not_as_is(image, kind, how)
    if kind in _JPEG_FORMATS and (how.verify or changed):
        verdict = check_jpeg(payload)
        if verdict.state == "damaged":
            raise BadPicture("truncated" if "remature end" in verdict.message else "damaged", verdict.message)
        if verdict.state == "irregular" and not changed:
            changed = "irregular JPEG"
    if not changed and how.tier == "jpeg":
        return Normal(payload, image.width, image.height)
    return _store(upright_rgb(image), kind, how, changed)


def _why_not_as_is(image: Image.Image, kind: str, how: Normalising) -> str:
    """Return why this file's bytes cannot be stored as they are; "" where they can."""
    if how.max_side is not None and max(image.size) > how.max_side:
        return f"reduced to {how.max_side} px"
    if kind not in _JPEG_FORMATS:
        return kind
    if image.mode != "RGB":
        return {"L": "greyscale JPEG", "CMYK": "CMYK JPEG"}.get(image.mode, f"{image.mode} JPEG")
    if image.getexif().get(EXIF_ORIENTATION, 1) not in (0, 1):
        return "EXIF rotation"
    return ""


def _store(image: Image.Image, kind: str, how: Normalising, changed: str) -> Normal:
    """Reduce where asked, then encode for the tier; in the raw tier only a reduction counts as a change."""
    if how.max_side is not None and max(image.size) > how.max_side:
        image.thumbnail((how.max_side, how.max_side), Image.Resampling.LANCZOS)
    if max(image.size) > MAX_SIDE_PX:
        raise BadPicture(
            "too large", f"{image.width} × {image.height} px; the limit is {MAX_SIDE_PX} px a side"
        )
    if how.tier == "raw":
        reduced = changed if changed.startswith("reduced") else ""
        return Normal(np.ascontiguousarray(np.asarray(image)), image.width, image.height, reduced)
    buffer = io.BytesIO()
    subsampling = "4:2:0" if kind in _JPEG_FORMATS else "4:4:4"
    image.save(buffer, "JPEG", quality=how.quality, subsampling=subsampling)
    return Normal(buffer.getvalue(), image.width, image.height, changed)
