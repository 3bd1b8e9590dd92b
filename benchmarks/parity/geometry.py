"""Decoding, resizing and flipping: every backend's crops beside those of Pillow and torchvision.

Shape letters: N pictures, V views of a call, S side in pixels.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, resized_crop

from benchmarks.parity.limits import MEASURES
from benchmarks.parity.measures import Errors, Row
from benchmarks.parity.samples import Samples
from benchmarks.peers.ours import decoder_crops
from pipelines import Backend, DALIOptions, open_set
from pipelines.decode import Decoder
from pipelines.decode.choose import open_decoder
from pipelines.decode.dali import DALIDeviceDecoder

Cropper = Callable[[NDArray[np.int64], NDArray[np.int32], int], NDArray[np.uint8]]
"""(N,) positions, (N, 2, 5) boxes, S → (N, 2, S, S, 3) crops."""

Reference = Callable[[Samples, NDArray[np.int64], NDArray[np.int32], int], NDArray[np.float32]]

_DECODED_PX = 64
"""Side of what is cut out at its own size."""
_DECODED_PAIRS = 4
_RESIZED_PX = (32, 96, 224)
_RESIZED_PAIRS = 2
_LEAST_BOX_PX = 9
_FLIPPED_PX = 64


def cropper_of(path: Path, subject: str) -> Cropper:
    """Crops by a backend's engine.

    Args:
        path: a set that the backend reads.
        subject: a name among :data:`SUBJECTS`.

    Raises:
        ImportError: if a package of the backend is missing.
        ValueError: later, if it cannot decode one of the pictures.
    """
    images, cpu = open_set(path), torch.device("cpu")
    decoder: Decoder
    device: torch.device | None
    if subject == DALI_GRAPH:
        decoder, device = DALIDeviceDecoder(images, cpu, 1, DALIOptions()), cpu
    else:
        decoder, device = open_decoder(SUBJECTS[subject].backend, images, cpu, 1), None

    def crops(index_N: NDArray[np.int64], boxes_NV5: NDArray[np.int32], side: int) -> NDArray[np.uint8]:
        out_NVSS3, ok_N = decoder_crops(images, decoder, index_N, boxes_NV5, side, device)
        if not ok_N.all():
            names = ", ".join(images.name(int(index)) for index in index_N[~ok_N])
            raise ValueError(f"{subject} cannot decode {names} of {path}, which Pillow can")
        return out_NVSS3

    return crops


def rows(subject: str, crops: Cropper, samples: Samples) -> Iterator[Row]:
    """Decode each kind of JPEG, resize in both directions, flip; ``subject`` is among :data:`SUBJECTS`."""
    yield from decode_rows(subject, crops, samples)
    for against in SUBJECTS[subject].resized_as:
        yield from resize_rows(subject, crops, samples, against)
    yield flip_row(subject, crops, samples)


def decode_rows(
    backend: str, crops: Cropper, samples: Samples, *, used: bool = True, how: str = ""
) -> Iterator[Row]:
    """Pieces cut out at their own size, so that nothing is resampled."""
    rng, size_N2 = np.random.default_rng(0), _sizes(samples)
    for kind, indices in samples.kinds().items():
        errors, index_N = Errors(), np.array(indices)
        for _ in range(_DECODED_PAIRS):
            boxes_NV5 = windows(rng, size_N2[index_N], _DECODED_PX)
            expected = by_pil(samples, index_N, boxes_NV5, _DECODED_PX)
            errors.add(crops(index_N, boxes_NV5, _DECODED_PX), expected)
        yield errors.row(MEASURES[f"decode {kind}"], backend, used=used, how=how)


def resize_rows(
    backend: str, crops: Cropper, samples: Samples, against: str, *, used: bool = True, how: str = ""
) -> Iterator[Row]:
    """Boxes of many sizes, shrunk in both directions or enlarged in both."""
    rng = np.random.default_rng(1)
    # Without the grey ones, which the converter encodes anew.
    index_N = np.array([i for kind, found in samples.kinds().items() if kind != "grey" for i in found])
    size_N2 = _sizes(samples)[index_N]
    for direction in ("shrinking", "enlarging"):
        errors = Errors()
        for side in _RESIZED_PX:
            for _ in range(_RESIZED_PAIRS):
                boxes_NV5 = random_boxes(rng, size_N2, side, shrinking=direction == "shrinking")
                errors.add(
                    crops(index_N, boxes_NV5, side), RESIZED[against](samples, index_N, boxes_NV5, side)
                )
        yield errors.row(MEASURES[f"resize, {direction} / {against}"], backend, used=used, how=how)


def flip_row(backend: str, crops: Cropper, samples: Samples, *, used: bool = True, how: str = "") -> Row:
    """The flipped crop beside the mirror of the other."""
    errors, index_N = Errors(), np.arange(len(samples.names))
    boxes_NV5 = random_boxes(np.random.default_rng(2), _sizes(samples), _FLIPPED_PX, shrinking=True)
    plain = crops(index_N, boxes_NV5, _FLIPPED_PX)
    boxes_NV5[..., 4] = 1
    errors.add(crops(index_N, boxes_NV5, _FLIPPED_PX), plain[:, :, :, ::-1])
    return errors.row(MEASURES["flip"], backend, used=used, how=how)


def _sizes(samples: Samples) -> NDArray[np.int64]:
    """(N, 2) heights and widths."""
    return np.array([samples.picture(i).size[::-1] for i in range(len(samples.names))])


def windows(rng: np.random.Generator, size_N2: NDArray[np.int64], side: int) -> NDArray[np.int32]:
    """(N, 2, 5) boxes of S × S pixels anywhere in the pictures, one in three at the last row and column."""
    boxes_NV5 = np.full((len(size_N2), 2, 5), side, np.int32)
    room_N12 = size_N2[:, None] - side
    boxes_NV5[..., :2] = rng.integers(0, room_N12 + 1, (len(size_N2), 2, 2))
    at_end_NV1 = rng.random((len(size_N2), 2, 1)) < 1 / 3
    boxes_NV5[..., :2] = np.where(at_end_NV1, room_N12, boxes_NV5[..., :2])
    boxes_NV5[..., 4] = 0
    return boxes_NV5


def random_boxes(
    rng: np.random.Generator, size_N2: NDArray[np.int64], side: int, *, shrinking: bool
) -> NDArray[np.int32]:
    """(N, 2, 5) boxes with both sides above S, or both below; a picture too small for that is taken whole."""
    shape = (len(size_N2), 2, 2)
    most = np.broadcast_to(size_N2[:, None], shape)
    low, high = (np.minimum(side, most), most) if shrinking else (_LEAST_BOX_PX, np.minimum(side, most))
    boxes_NV5 = np.zeros((len(size_N2), 2, 5), np.int32)
    boxes_NV5[..., 2:4] = rng.integers(low, high + 1, shape)
    boxes_NV5[..., :2] = rng.integers(0, most - boxes_NV5[..., 2:4] + 1, shape)
    return boxes_NV5


def by_pil(
    samples: Samples, index_N: NDArray[np.int64], boxes_NV5: NDArray[np.int32], side: int
) -> NDArray[np.float32]:
    """(N, V, S, S, 3) grey levels: Pillow's decoding, torchvision's ``resized_crop`` on Pillow pictures."""
    return _crops_of([samples.picture(index) for index in index_N.tolist()], boxes_NV5, side)


def by_pil_in_planes(
    samples: Samples, index_N: NDArray[np.int64], boxes_NV5: NDArray[np.int32], side: int
) -> NDArray[np.float32]:
    """(N, V, S, S, 3) grey levels; the same in floats, with the colours converted after resizing."""
    planes = [[band.convert("F") for band in samples.planes(index).split()] for index in index_N.tolist()]
    bands = [_crops_of([picture[band] for picture in planes], boxes_NV5, side) for band in range(3)]
    return rgb_of(*bands).clip(0, 255)


def by_pil_repeating(
    samples: Samples, index_N: NDArray[np.int64], boxes_NV5: NDArray[np.int32], side: int
) -> NDArray[np.float32]:
    """(N, V, S, S, 3) grey levels; where the filter reaches over a box's border, its pixels are repeated."""
    out_NVSS3 = np.empty((*boxes_NV5.shape[:2], side, side, 3), np.float32)
    for index, boxes_V5, out_VSS3 in zip(index_N.tolist(), boxes_NV5.tolist(), out_NVSS3, strict=True):
        picture_HW3 = np.asarray(samples.picture(index))
        for (top, left, height, width, _), out_SS3 in zip(boxes_V5, out_VSS3, strict=True):
            reach = max(height, width) // side + 2
            around = ((reach, reach), (reach, reach), (0, 0))
            padded = np.pad(picture_HW3[top : top + height, left : left + width], around, mode="edge")
            box = (reach, reach, reach + width, reach + height)
            out_SS3[:] = Image.fromarray(padded).resize((side, side), Image.Resampling.BILINEAR, box)
    return out_NVSS3


def rgb_of(y: NDArray[np.float32], u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """JFIF's inverse of ITU-R BT.601, channels last."""
    u, v = u - 128, v - 128
    return np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], axis=-1)


def _crops_of(pictures: list[Image.Image], boxes_NV5: NDArray[np.int32], side: int) -> NDArray[np.float32]:
    """(N, V, S, S) for pictures of one band, with three channels at the end for those of three."""
    crops = [
        resized_crop(picture, top, left, height, width, [side, side], InterpolationMode.BILINEAR)
        for picture, boxes_V5 in zip(pictures, boxes_NV5.tolist(), strict=True)
        for top, left, height, width, _ in boxes_V5
    ]
    out = np.stack([np.asarray(crop, np.float32) for crop in crops])
    return out.reshape(*boxes_NV5.shape[:2], *out.shape[1:])


RESIZED: Mapping[str, Reference] = {
    "pixels": by_pil,
    "planes": by_pil_in_planes,
    "clamped": by_pil,
    "repeated": by_pil_repeating,
    "bordered": by_pil,
}
"""References of resizing by their names in the table of limits."""
DALI_GRAPH = "dali's graph for a GPU, on the CPU"


@dataclass(frozen=True)
class Subject:
    """Crops to be compared."""

    backend: Backend
    resized_as: tuple[str, ...]
    """Names of :data:`RESIZED`: its own way and, where that is another, torchvision's."""


SUBJECTS: Mapping[str, Subject] = {
    "folder": Subject("folder", ("pixels",)),
    "ffcv": Subject("ffcv", ("planes", "clamped")),
    "dali": Subject("dali", ("pixels",)),
    DALI_GRAPH: Subject("dali", ("repeated", "bordered")),
}
"""Every backend, and the way the dali backend takes on a GPU."""
