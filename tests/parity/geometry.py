"""Decoding, resizing and flipping: every backend's crops compared with those of Pillow and torchvision.

Shape letters: N images, V views of a call, S side in pixels.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, resized_crop

from benchmarks.peers.ours import decoder_crops
from pipelines import Backend, DALIOptions, open_set
from pipelines.decode import Decoder
from pipelines.decode.choose import open_decoder
from pipelines.decode.dali import DALIDeviceDecoder
from tests.parity.comparisons import MEASURES, Errors, Row
from tests.parity.samples import Samples

Crops = NDArray[np.uint8]
Cropper = Callable[[NDArray[np.int64], NDArray[np.int32], int], Crops]
"""(N,) positions, (N, 2, 5) boxes, S → (N, 2, S, S, 3) crops."""
Reference = Callable[[Samples, NDArray[np.int64], NDArray[np.int32], int], NDArray[np.float32]]

DALI_GRAPH = "dali's graph for a GPU, on the CPU"
_DECODED_PX = 64
"""Side of the pieces that are cut without resizing."""
_DECODED_PAIRS = 4
_RESIZED_PX = (32, 96, 224)
_RESIZED_PAIRS = 2
_MIN_BOX_PX = 9
_FLIPPED_PX = 64


@dataclass(frozen=True)
class Subject:
    """A source of crops to compare."""

    backend: Backend
    resized_as: tuple[str, ...]
    """Names in :data:`RESIZED`: the exact formula of the backend and, where it differs, torchvision's."""


SUBJECTS: Mapping[str, Subject] = {
    "folder": Subject("folder", ("pixels",)),
    "ffcv": Subject("ffcv", ("planes", "clamped")),
    "dali": Subject("dali", ("pixels",)),
    DALI_GRAPH: Subject("dali", ("repeated", "bordered")),
}
"""Every backend, and the operators that the dali backend uses on a GPU."""


def cropper_of(path: Path, subject: str) -> Cropper:
    """Return a function that crops with a backend's decoder.

    Args:
        path: A set that the backend reads.
        subject: A name in :data:`SUBJECTS`.

    Raises:
        ImportError: If a package of the backend is missing.
        ValueError: From the returned function, if it cannot decode an image.
    """
    images, cpu = open_set(path), torch.device("cpu")
    decoder: Decoder
    device: torch.device | None
    if subject == DALI_GRAPH:
        decoder, device = DALIDeviceDecoder(images, cpu, 1, DALIOptions()), cpu
    else:
        decoder, device = open_decoder(SUBJECTS[subject].backend, images, cpu, 1), None

    def crops(index_N: NDArray[np.int64], boxes_NV5: NDArray[np.int32], side: int) -> Crops:
        out_NVSS3, ok_N = decoder_crops(images, decoder, index_N, boxes_NV5, side, device)
        if not ok_N.all():
            names = ", ".join(images.name(int(index)) for index in index_N[~ok_N])
            raise ValueError(f"{subject} cannot decode {names} of {path}, Pillow can")
        return out_NVSS3

    return crops


def rows(subject: str, crops: Cropper, samples: Samples) -> Iterator[Row]:
    """Decode each kind of JPEG, shrink and enlarge, flip; ``subject`` is a name in :data:`SUBJECTS`."""
    yield from decode_rows(subject, crops, samples)
    for against in SUBJECTS[subject].resized_as:
        yield from resize_rows(subject, crops, samples, against)
    yield flip_row(subject, crops, samples)


def decode_rows(backend: str, crops: Cropper, samples: Samples, **labels: Any) -> Iterator[Row]:
    """Cut pieces without resizing them; ``labels`` are ``how`` and ``used`` of the rows, here and below."""
    rng, size_N2 = np.random.default_rng(0), _sizes(samples)
    for kind, indices in samples.kinds().items():
        errors, index_N = Errors(), np.array(indices)
        for _ in range(_DECODED_PAIRS):
            boxes_NV5 = _windows(rng, size_N2[index_N], _DECODED_PX)
            expected = _by_pil(samples, index_N, boxes_NV5, _DECODED_PX)
            errors.add(crops(index_N, boxes_NV5, _DECODED_PX), expected)
        yield errors.row(MEASURES[f"decode {kind}"], backend, **labels)


def resize_rows(backend: str, crops: Cropper, samples: Samples, against: str, **labels: Any) -> Iterator[Row]:
    """Resize boxes of many sizes; both sides shrink or both grow."""
    rng = np.random.default_rng(1)
    # Grey images are left out: the converter re-encodes them.
    index_N = np.array([i for kind, found in samples.kinds().items() if kind != "grey" for i in found])
    size_N2 = _sizes(samples)[index_N]
    for direction in ("shrinking", "enlarging"):
        errors = Errors()
        for side in _RESIZED_PX:
            for _ in range(_RESIZED_PAIRS):
                boxes_NV5 = _random_boxes(rng, size_N2, side, shrinking=direction == "shrinking")
                expected = RESIZED[against](samples, index_N, boxes_NV5, side)
                errors.add(crops(index_N, boxes_NV5, side), expected)
        yield errors.row(MEASURES[f"resize, {direction} / {against}"], backend, **labels)


def flip_row(backend: str, crops: Cropper, samples: Samples, **labels: Any) -> Row:
    """Compare flipped crops with the mirror images of crops that are not flipped."""
    errors, index_N = Errors(), np.arange(len(samples.names))
    boxes_NV5 = _random_boxes(np.random.default_rng(2), _sizes(samples), _FLIPPED_PX, shrinking=True)
    plain = crops(index_N, boxes_NV5, _FLIPPED_PX)
    boxes_NV5[..., 4] = 1
    errors.add(crops(index_N, boxes_NV5, _FLIPPED_PX), plain[:, :, :, ::-1])
    return errors.row(MEASURES["flip"], backend, **labels)


def _sizes(samples: Samples) -> NDArray[np.int64]:
    """(N, 2) heights and widths."""
    return np.array([samples.image(i).size[::-1] for i in range(len(samples.names))])


def _windows(rng: np.random.Generator, size_N2: NDArray[np.int64], side: int) -> NDArray[np.int32]:
    """(N, 2, 5) boxes of S × S pixels at random places; one in three at the last row and column."""
    boxes_NV5 = np.full((len(size_N2), 2, 5), side, np.int32)
    room_N12 = size_N2[:, None] - side
    boxes_NV5[..., :2] = rng.integers(0, room_N12 + 1, (len(size_N2), 2, 2))
    at_end_NV1 = rng.random((len(size_N2), 2, 1)) < 1 / 3
    boxes_NV5[..., :2] = np.where(at_end_NV1, room_N12, boxes_NV5[..., :2])
    boxes_NV5[..., 4] = 0
    return boxes_NV5


def _random_boxes(
    rng: np.random.Generator, size_N2: NDArray[np.int64], side: int, *, shrinking: bool
) -> NDArray[np.int32]:
    """(N, 2, 5) boxes with both sides above S, or both below; of an image too small for that, the whole."""
    shape = (len(size_N2), 2, 2)
    most = np.broadcast_to(size_N2[:, None], shape)
    low, high = (np.minimum(side, most), most) if shrinking else (_MIN_BOX_PX, np.minimum(side, most))
    boxes_NV5 = np.zeros((len(size_N2), 2, 5), np.int32)
    boxes_NV5[..., 2:4] = rng.integers(low, high + 1, shape)
    boxes_NV5[..., :2] = rng.integers(0, most - boxes_NV5[..., 2:4] + 1, shape)
    return boxes_NV5


def _by_pil(
    samples: Samples, index_N: NDArray[np.int64], boxes_NV5: NDArray[np.int32], side: int
) -> NDArray[np.float32]:
    """(N, V, S, S, 3) grey levels: Pillow's decoder, torchvision's ``resized_crop`` on Pillow images."""
    return _crops_of([samples.image(index) for index in index_N.tolist()], boxes_NV5, side)


def _by_pil_in_planes(
    samples: Samples, index_N: NDArray[np.int64], boxes_NV5: NDArray[np.int32], side: int
) -> NDArray[np.float32]:
    """(N, V, S, S, 3) grey levels: the same in floats, with the colours converted after resizing."""
    planes = [[band.convert("F") for band in samples.planes(index).split()] for index in index_N.tolist()]
    y, u, v = (_crops_of([image[band] for image in planes], boxes_NV5, side) for band in range(3))
    u, v = u - 128, v - 128
    # JFIF's inverse of ITU-R BT.601.
    rgb = np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], axis=-1)
    return rgb.clip(0, 255)


def _by_pil_repeating(
    samples: Samples, index_N: NDArray[np.int64], boxes_NV5: NDArray[np.int32], side: int
) -> NDArray[np.float32]:
    """(N, V, S, S, 3) grey levels: the border's pixels are repeated where the filter reaches beyond a box."""
    out_NVSS3 = np.empty((*boxes_NV5.shape[:2], side, side, 3), np.float32)
    for index, boxes_V5, out_VSS3 in zip(index_N.tolist(), boxes_NV5.tolist(), out_NVSS3, strict=True):
        image_HW3 = np.asarray(samples.image(index))
        for (top, left, height, width, _), out_SS3 in zip(boxes_V5, out_VSS3, strict=True):
            reach = max(height, width) // side + 2
            around = ((reach, reach), (reach, reach), (0, 0))
            padded = np.pad(image_HW3[top : top + height, left : left + width], around, mode="edge")
            box = (reach, reach, reach + width, reach + height)
            out_SS3[:] = Image.fromarray(padded).resize((side, side), Image.Resampling.BILINEAR, box)
    return out_NVSS3


def _crops_of(images: list[Image.Image], boxes_NV5: NDArray[np.int32], side: int) -> NDArray[np.float32]:
    """(N, V, S, S) for images of one band, (N, V, S, S, 3) for those of three."""
    crops = [
        resized_crop(image, top, left, height, width, [side, side], InterpolationMode.BILINEAR)
        for image, boxes_V5 in zip(images, boxes_NV5.tolist(), strict=True)
        for top, left, height, width, _ in boxes_V5
    ]
    out = np.stack([np.asarray(crop, np.float32) for crop in crops])
    return out.reshape(*boxes_NV5.shape[:2], *out.shape[1:])


RESIZED: Mapping[str, Reference] = {
    "pixels": _by_pil,
    "planes": _by_pil_in_planes,
    "clamped": _by_pil,
    "repeated": _by_pil_repeating,
    "bordered": _by_pil,
}
"""References of resizing by their names in the table of comparisons."""
