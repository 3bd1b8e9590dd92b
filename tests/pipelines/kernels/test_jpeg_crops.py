"""The kernel of the ffcv backend against PIL: every kind of image in one call."""

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.memory import status_mib
from dataset_tools.beton_writer import BetonWriter
from dataset_tools.convert import convert
from dataset_tools.normalise import Normalising
from dataset_tools.sources import FolderSource
from pipelines import PictureSet, open_set
from pipelines.decode.pillow import decode_image
from pipelines.decode.turbo import TurboDecoder
from tests.conftest import photograph_like

SIDE = 40


def _encode(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92, **options)
    return file.getvalue()


def _kinds() -> dict[str, bytes]:
    photo = photograph_like(1, 91, 67)
    even = photograph_like(2, 96, 64)
    kinds = {f"{name} odd": _encode(photo, subsampling=name) for name in ("4:4:4", "4:2:2", "4:2:0")}
    kinds |= {f"{name} even": _encode(even, subsampling=name) for name in ("4:4:4", "4:2:2", "4:2:0")}
    turned = _encode(photo.transpose(Image.Transpose.TRANSPOSE), subsampling="4:2:2")
    kinds["4:4:0"] = _encode_440(photo)
    kinds["4:2:2 upright"] = turned
    kinds["progressive"] = _encode(photo, progressive=True)
    kinds["restart markers"] = _encode(photo, restart_marker_blocks=2)
    kinds["grey"] = _encode(photo.convert("L"))
    kinds["few pixels"] = _encode(photograph_like(3, 7, 5), subsampling="4:2:0")
    kinds["one pixel"] = _encode(Image.new("RGB", (1, 1), (200, 30, 60)))
    kinds["RGB inside"] = _encode(photo, keep_rgb=True)
    return kinds


def _encode_440(photo: Image.Image) -> bytes:
    """A JPEG at 4:4:0: chroma rows are halved, columns are not. Pillow cannot write one; libturbojpeg can."""
    import ctypes

    from pipelines.kernels.turbojpeg import TJPF_RGB, TJSAMP_440, library

    lib = library()
    lib.tjCompress2.argtypes = [
        *[ctypes.c_void_p] * 2, *[ctypes.c_int] * 4, *[ctypes.c_void_p] * 2, *[ctypes.c_int] * 3
    ]  # fmt: skip
    pixels = np.ascontiguousarray(np.asarray(photo))
    height, width, _ = pixels.shape
    out = np.zeros(1 << 20, np.uint8)
    address, size = ctypes.c_void_p(out.ctypes.data), ctypes.c_ulong(out.size)
    handle = ctypes.c_void_p(lib.tjInitCompress())
    no_realloc = 1024
    code = lib.tjCompress2(
        handle, pixels.ctypes.data, width, 0, height, TJPF_RGB,
        ctypes.byref(address), ctypes.byref(size), TJSAMP_440, 92, no_realloc,
    )  # fmt: skip
    lib.tjDestroy(handle)
    assert code == 0
    return out[: size.value].tobytes()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A compiled set of every kind of JPEG, stored unchanged."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.beton"
    kinds = _kinds()
    with BetonWriter(path, capacity=len(kinds)) as writer:
        for name, payload in kinds.items():
            width, height = Image.open(io.BytesIO(payload)).size
            writer.add(payload, label=-1, width=width, height=height, source_path=name)
        writer.commit(source="test")
    return path, kinds


def _boxes(images: PictureSet) -> NDArray[np.int32]:
    """Two boxes for each image: the whole of it, and a part of it flipped."""
    sizes = images.fetch(np.arange(images.count)).size_N2
    part = np.stack([sizes // 5, sizes - sizes // 5 - sizes // 7], axis=1).reshape(-1, 4)
    whole = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
    boxes = np.stack([np.pad(whole, ((0, 0), (0, 1))), np.pad(part, ((0, 0), (0, 1)), constant_values=1)], 1)
    return boxes.astype(np.int32)


def _by_pil(pixels: NDArray[np.uint8], box: NDArray[np.int32]) -> NDArray[np.uint8]:
    top, left, height, width, mirrored = (int(x) for x in box)
    crop = Image.fromarray(pixels[top : top + height, left : left + width])
    view = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return view[:, ::-1] if mirrored else view


@pytest.mark.parametrize("reading", ["map", "read"])
def test_every_kind_of_jpeg_in_one_call(reading: str, mixed: tuple[Path, dict[str, bytes]]) -> None:
    path, kinds = mixed
    images = open_set(path, reading)
    boxes = _boxes(images)
    out = np.zeros((images.count, 2, SIDE, SIDE, 3), np.uint8)
    assert TurboDecoder().crop(images.fetch(np.arange(images.count)), boxes, out).all()
    for n, (name, payload) in enumerate(kinds.items()):
        pixels = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
        for v in range(2):
            off = np.abs(out[n, v].astype(int) - _by_pil(pixels, boxes[n, v]))
            assert off.mean() < 0.6 and (off > 3).mean() < 0.01, (name, v, off.mean(), off.max())


@pytest.mark.parametrize("reading", ["map", "read"])
@pytest.mark.parametrize("tier", ["raw", "yuv420"])
def test_tiers_without_a_jpeg(reading: str, tier: str, picture_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.beton"
    convert(FolderSource(picture_folder), path, Normalising(tier, short_side=61))
    images = open_set(path, reading)
    boxes = _boxes(images)
    out = np.zeros((images.count, 2, SIDE, SIDE, 3), np.uint8)
    assert TurboDecoder().crop(images.fetch(np.arange(images.count)), boxes, out).all()
    for n in range(images.count):
        pixels = decode_image(images.fetch(np.array([n])))
        assert pixels is not None
        for v in range(2):
            off = np.abs(out[n, v].astype(int) - _by_pil(pixels, boxes[n, v]))
            assert off.mean() < 0.6 and (off > 3).mean() < 0.01, (n, v, off.mean(), off.max())


def test_a_record_of_an_impossible_size_costs_no_memory(mixed: tuple[Path, dict[str, bytes]]) -> None:
    """Memory is allocated only after the image's own header agrees with the index."""
    images = open_set(mixed[0])
    encoded = images.fetch(np.arange(2))
    encoded.size_N2[1] = 65_535, 65_535
    before = status_mib("VmPeak")
    out = np.zeros((2, 2, SIDE, SIDE, 3), np.uint8)
    # The boxes fit the image; only the record is wrong.
    sound = TurboDecoder().crop(encoded, _boxes(images)[:1].repeat(2, axis=0), out)
    assert sound[0]
    assert status_mib("VmPeak") - before < 500


def test_calls_leak_no_memory(mixed: tuple[Path, dict[str, bytes]]) -> None:
    images, decoder = open_set(mixed[0]), TurboDecoder()
    encoded, boxes = images.fetch(np.arange(4)), _boxes(images)[:4]
    out = np.zeros((4, 2, SIDE, SIDE, 3), np.uint8)
    for _ in range(200):
        decoder.crop(encoded, boxes, out)
    before = status_mib("RssAnon")
    for _ in range(2000):
        decoder.crop(encoded, boxes, out)
    assert status_mib("RssAnon") - before < 1
