"""DALI as a decoder: crops on the device, bad images, errors. What all backends share is in test_loader."""

import ctypes
import io
import mmap
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dataset_tools.convert import convert
from dataset_tools.index_shards import index_shards
from dataset_tools.normalise import Normalising
from dataset_tools.sources import FolderSource
from pipelines import DALIOptions, Recipe, build_loader, open_set
from pipelines.decode.dali import DALIDecoder, DALIDeviceDecoder
from pipelines.decode.dali_operators import GraphPool
from pipelines.decode.pillow import decode_image
from pipelines.kernels.resample import crop_image
from pipelines.loader import ViewLoader
from pipelines.recipe import Mixing
from pipelines.workers import LoaderConfig
from tests.conftest import photograph_like

pytestmark = pytest.mark.needs("nvidia.dali")
CPU = torch.device("cpu")
RECIPE = Recipe(crop_px=48, mixing=Mixing(method="both"))


def _on_device(path: Path, options: DALIOptions | None = None) -> ViewLoader:
    """A loader as on a GPU, with its graphs on the host: whole batches, DALI's operators, torch's stage."""
    images = open_set(path)
    decoder = DALIDeviceDecoder(images, CPU, 2, options or DALIOptions())
    return ViewLoader(images, decoder, RECIPE, LoaderConfig(batch_size=8, device=CPU, num_threads=2, seed=3))


def _off(got: NDArray[np.uint8], expected: NDArray[np.uint8]) -> NDArray[np.int64]:
    off: NDArray[np.int64] = np.abs(got.astype(np.int64) - expected)
    return off


@pytest.mark.parametrize("region_decode", [False, True])
def test_operators_on_the_device_cut_the_same_boxes(region_decode: bool, beton: Path) -> None:
    loader = _on_device(beton, DALIOptions(region_decode=region_decode))
    reference = build_loader(beton, RECIPE, "dali", batch_size=8, seed=3)
    for crops, expected in zip(loader.crops(), reference.crops(), strict=True):
        assert torch.equal(crops.index, expected.index)
        off = _off(crops.views.numpy(), expected.views.numpy())
        # At borders DALI repeats the edge of an image, which PIL leaves out.
        assert off.mean() < 0.2 and (off > 2).mean() < 0.02 and off.max() <= 24


def test_batches_made_on_the_device_equal_the_hosts(beton: Path) -> None:
    one_level = 1 / 255 / min(RECIPE.std)
    reference = build_loader(beton, RECIPE, "dali", batch_size=8, seed=3)
    for batch, expected in zip(_on_device(beton), reference, strict=True):
        assert torch.equal(batch.index, expected.index) and torch.equal(batch.label, expected.label)
        assert (batch.query - expected.query).abs().mean() < one_level
        for mixture, other in zip(batch.mixtures, expected.mixtures, strict=True):
            assert torch.equal(mixture.partner, other.partner) and torch.equal(mixture.lam, other.lam)
            assert (mixture.images - other.images).abs().mean() < one_level


def _damage(beton: Path, target: Path) -> Path:
    """A copy in which the second half of image 7 is zero."""
    for file in beton.parent.glob("pictures.*"):
        shutil.copy(file, target.with_suffix(file.suffix))
    (payload,) = open_set(target).fetch(np.array([7]))
    content = target.read_bytes()
    start = content.index(payload.tobytes())
    half = len(payload) // 2
    target.write_bytes(content[: start + half] + bytes(len(payload) - half) + content[start + len(payload) :])
    return target


def test_a_damaged_image_does_not_change_others_of_its_batch_on_the_device(
    beton: Path, tmp_path: Path
) -> None:
    loader, sound = _on_device(_damage(beton, tmp_path / "damaged.beton")), _on_device(beton)
    views = {int(i): view for b in sound for i, view in zip(b.index, b.query, strict=True)}
    for batch in loader:
        for i, view in zip(batch.index, batch.query, strict=True):
            # A replacement is at another place of its batch, where batched products sum in another order.
            torch.testing.assert_close(view, views[int(i)])
    assert {i: fault.replaced_by for i, fault in loader.faults.items()} == {7: 8}


def test_an_error_that_no_image_explains_is_raised(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_set(beton)
    decoder = DALIDeviceDecoder(images, CPU, 1, DALIOptions())
    encoded = images.fetch(np.arange(2))

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(decoder, "_crop_by_graph", fail)
    boxes = np.tile(np.array([0, 0, 30, 30, 0], np.int32), (2, 1, 1))
    with pytest.raises(RuntimeError, match=r"cannot crop 2 images of .*out of memory"):
        decoder.crop_on_device(encoded, boxes, torch.zeros((2, 1, 16, 16, 3), dtype=torch.uint8))


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _pack(folder: Path, contents: dict[str, bytes], extensions: tuple[str, ...]) -> Path:
    """Foreign shards may contain anything."""
    with tarfile.open(folder / "000.tar", "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index_shards(folder, extensions=extensions)
    return folder


def test_files_of_other_kinds_decode_as_pil_does(tmp_path: Path) -> None:
    picture, square = photograph_like(5, 90, 60), photograph_like(6, 64, 64)
    kinds = {
        "a.png": _encoded(picture, "PNG"),
        "b.webp": _encoded(picture, "WEBP", quality=90),
        "d.jpg": _encoded(picture.convert("CMYK"), "JPEG"),
        "e.jpg": _encoded(picture.convert("L"), "JPEG"),
    }
    for orientation in range(1, 9):
        turned = Image.Exif()
        turned[0x0112] = orientation
        kinds[f"turned{orientation}.jpg"] = _encoded(picture, "JPEG", exif=turned)
        kinds[f"square{orientation}.jpg"] = _encoded(square, "JPEG", exif=turned)
    num = len(kinds)
    _pack(tmp_path, kinds, ("png", "webp", "jpg"))
    for backend in ("dali", "ffcv"):
        loader = build_loader(tmp_path, RECIPE, backend, batch_size=5)  # type: ignore[arg-type]
        encoded = loader.set.fetch(np.arange(num))
        zeros = np.zeros((num, 2), np.int64)
        boxes = np.concatenate([zeros, encoded.size_N2, zeros[:, :1]], 1)
        out = np.zeros((num, 1, 48, 48, 3), np.uint8)
        assert loader.decoder.crop(encoded, boxes[:, None].astype(np.int32), out).all()
        for n, name in enumerate(kinds):
            whole = decode_image(encoded.part(slice(n, n + 1)))
            assert whole is not None
            expected = Image.fromarray(whole).resize((48, 48), Image.Resampling.BILINEAR)
            assert _off(out[n, 0], np.asarray(expected)).mean() < 0.6, (backend, name)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("region_decode", [False, True])
def test_an_image_of_another_size_than_the_index_says_is_bad(
    on_device: bool, region_decode: bool, shards: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy.shards")
    index = np.load(copy / "index.npy")
    index["width"][5] -= 20
    index["height"][9] += 20
    np.save(copy / "index.npy", index)
    options = DALIOptions(region_decode=region_decode)
    loader = _on_device(copy, options) if on_device else build_loader(copy, RECIPE, "dali", batch_size=8)
    for _ in range(2):  # the second time they are known to be bad
        list(loader)
        assert {i: fault.replaced_by for i, fault in loader.faults.items()} == {5: 6, 9: 10}


def test_images_known_to_be_bad_are_not_tried_again(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = build_loader(_damage(beton, tmp_path / "damaged.beton"), RECIPE, "dali", batch_size=8, seed=3)
    first = list(loader)
    seen: list[int] = []
    fetch = loader.set.fetch

    def spy(index_N: NDArray[np.int64]) -> object:
        seen.extend(index_N.tolist())
        return fetch(index_N)

    monkeypatch.setattr(loader.set, "fetch", spy)
    again = list(loader)
    assert len(seen) == 40 and 7 not in seen
    assert all(torch.equal(a.query, b.query) for a, b in zip(first, again, strict=True))


def test_errors_of_dali_that_no_image_causes_are_raised(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_set(beton)
    decoder, encoded = DALIDecoder(images), images.fetch(np.arange(2))
    boxes = np.tile(np.array([0, 0, 30, 30, 0], np.int32), (2, 1, 1))
    out = np.zeros((2, 1, 16, 16, 3), np.uint8)
    assert decoder.crop(encoded, boxes, out).all()

    def fail(*_: object) -> None:
        raise RuntimeError("no image's fault")

    monkeypatch.setattr("pipelines.decode.dali.crop_image", fail)
    with pytest.raises(RuntimeError, match="no image's fault"):
        decoder.crop(encoded, boxes, out)


@pytest.mark.needs()  # nothing
def test_a_graph_that_has_raised_or_is_too_small_is_not_used_again() -> None:
    built: list[int] = []

    def build(size: int) -> object:
        built.append(size)
        return object()

    graphs = GraphPool(build)
    with graphs.take(4) as first:
        pass
    with graphs.take(3) as again:
        assert again is first
    with pytest.raises(RuntimeError), graphs.take(4) as again:
        assert again is first
        raise RuntimeError
    with graphs.take(4) as other:
        assert other is not first
    with graphs.take(9):
        pass
    assert built == [4, 4, 9]
    process = graphs._process
    graphs._process = -1  # as after a fork
    with graphs.take(2):
        assert built == [4, 4, 9, 9]
    assert graphs._process == process


@pytest.mark.needs()  # nothing
def test_cropping_does_not_read_past_the_image() -> None:
    """The image ends at the end of a page, and the next page is not readable."""
    page = mmap.PAGESIZE
    for height, width in ((40, 31), (9, 7), (64, 64)):
        size = 3 * height * width
        room = mmap.mmap(-1, -(-size // page) * page + page)
        memory = np.frombuffer(room, np.uint8)
        guard = memory.ctypes.data + len(memory) - page
        assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(guard), page, 0) == 0
        picture = memory[len(memory) - page - size : len(memory) - page].reshape(height, width, 3)
        picture[:] = np.asarray(photograph_like(1, width, height))
        out = np.zeros((1, 24, 24, 3), np.uint8)
        crop_image(picture, np.array([[0, 0, height, width, 0]], np.int32), out)
        expected = Image.fromarray(picture).resize((24, 24), Image.Resampling.BILINEAR)
        assert _off(out[0], np.asarray(expected)).max() <= 1


def test_sets_without_jpegs_are_refused(picture_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "raw.beton"
    convert(FolderSource(picture_folder), path, Normalising(tier="raw", short_side=32))
    with pytest.raises(ValueError, match=r"DALI decodes only the tier jpeg .*choose backend ffcv"):
        build_loader(path, RECIPE, "dali", batch_size=8)


@pytest.mark.needs()  # nothing
@pytest.mark.parametrize(
    ("options", "message"),
    [({"hw_decoder_load": 1.5}, r"hw_decoder_load is 1\.5"), ({"hybrid_huffman_threshold": -1}, "is -1")],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DALIOptions(**options)  # type: ignore[arg-type]


@pytest.mark.needs()  # nothing
def test_options_that_would_be_ignored_are_refused(beton: Path) -> None:
    with pytest.raises(ValueError, match="the backend is ffcv"):
        build_loader(beton, RECIPE, "ffcv", batch_size=8, dali=DALIOptions(region_decode=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("region_decode", [False, True])
def test_crops_of_a_gpu_are_near_the_hosts(region_decode: bool, beton: Path) -> None:
    options = DALIOptions(region_decode=region_decode)
    on_gpu = build_loader(beton, RECIPE, "dali", batch_size=8, seed=3, device="cuda", dali=options)
    on_host = build_loader(beton, RECIPE, "dali", batch_size=8, seed=3)
    for crops, expected in zip(on_gpu.crops(), on_host.crops(), strict=True):
        assert crops.views.device.type == "cuda"
        off = _off(crops.views.cpu().numpy(), expected.views.numpy())
        assert off.mean() < 2
