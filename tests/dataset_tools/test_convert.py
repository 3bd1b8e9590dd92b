import io
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset_tools.convert import convert
from dataset_tools.normalise import Normalising
from dataset_tools.sources import FolderSource, Sample
from dataset_tools.stats import stats
from dataset_tools.verify import verify
from pipelines.decode.jpeg import Jpeg, encode_planes
from pipelines.sets.beton import MODE_YUV420, open_beton
from pipelines.sets.manifest import Manifest, Tier, read_source_path, skipped_path
from tests.processes import started

ROOT = Path(__file__).resolve().parents[2]


def outputs(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("set."))


def test_tree_is_stored_byte_for_byte(tree: Path, tmp_path: Path) -> None:
    source = FolderSource(tree)
    calls: list[None] = []
    converted = convert(source, tmp_path / "set.beton", progress=lambda: calls.append(None))
    beton = open_beton(tmp_path / "set.beton")
    assert len(calls) == len(beton) == 5
    for i in range(5):
        assert beton.payload(i).tobytes() == source.read(i).payload
        assert read_source_path(tmp_path / "set.beton", i) == source.path(i)
    assert beton.labels.tolist() == [0, 0, 0, 1, 1]
    assert beton.metadata["f0"]["width"].tolist() == [60, 61, 62, 63, 64]
    assert beton.metadata["f0"]["height"].tolist() == [40, 41, 42, 43, 44]
    manifest = Manifest.read(tmp_path / "set.beton")
    assert manifest == converted.manifest
    assert (manifest.classes, manifest.source, manifest.replaced) == (("cats", "dogs"), "images", {})
    assert outputs(tmp_path) == ["set.beton", "set.json", "set.paths"]


def test_planes_are_stored_as_decoded(tree: Path, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    """Folder → set → payload; the luma is compared with Pillow's."""
    (tree / "dogs" / "png.png").write_bytes(encode(33, 21, kind="PNG"))
    (tree / "dogs" / "one.jpg").write_bytes(encode(1, 1, subsampling=2))
    converted = convert(FolderSource(tree), tmp_path / "set.beton", Normalising(tier="yuv420"), workers=2)
    assert converted.manifest.tier == "yuv420"
    assert converted.manifest.replaced == {"transcoded: PNG": 1}
    beton = open_beton(tmp_path / "set.beton")
    assert verify(tmp_path / "set.beton").ok
    assert stats(tmp_path / "set.beton").tier == "yuv420"
    for i in range(7):
        payload = (tree / str(read_source_path(tmp_path / "set.beton", i))).read_bytes()
        with Image.open(io.BytesIO(payload)) as image:
            image.draft("YCbCr", image.size)
            width, height = image.size
            expected = np.asarray(image.convert("YCbCr"))[:, :, 0].astype(int)
            exact = image.format == "JPEG"
            planes = Jpeg(payload).planes() if exact else encode_planes(np.asarray(image))
        record = beton.metadata["f0"][i]
        assert (record["mode"], record["width"], record["height"]) == (MODE_YUV420, width, height)
        assert beton.payload(i).tobytes() == planes.packed().tobytes()
        luma = beton.payload(i)[: width * height].reshape(height, width)
        assert np.abs(luma - expected).max() <= (0 if exact else 1)


def test_settings_record_the_options(tree: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"short_side": 30, "recompress": True, "quality": 70}
    made = convert(FolderSource(tree), tmp_path / "set.beton", Normalising(**options)).manifest
    assert made.settings == {
        "tier": "jpeg", "verify": True, "max_side": None, "max_bad": 0.01, **options
    }  # fmt: skip
    assert made.replaced == {"transcoded: reduced to a short side of 30 px": 5}
    assert Manifest.read(tmp_path / "set.beton") == made
    assert open_beton(tmp_path / "set.beton").metadata["f0"]["height"].tolist() == [30] * 5


@pytest.mark.parametrize("tier", ["jpeg", "yuv420", "raw"])
def test_workers_do_not_change_a_byte_of_any_tier(tree: Path, tmp_path: Path, tier: Tier) -> None:
    for workers in (1, 3):
        how = Normalising(tier, short_side=35)
        convert(FolderSource(tree), tmp_path / f"set.{workers}.beton", how, workers=workers)
    assert (tmp_path / "set.1.beton").read_bytes() == (tmp_path / "set.3.beton").read_bytes()


def spoil(tree: Path, encode: Callable[..., bytes]) -> None:
    """Add one image of each bad or unusual kind to the five good ones."""
    (tree / "cats" / "b1.jpg").write_bytes(encode()[:-40])
    (tree / "cats" / "b2.jpg").write_bytes(b"hello")
    (tree / "dogs" / "png.JPEG").write_bytes(encode(kind="PNG"))
    (tree / "dogs" / "cmyk.jpg").write_bytes(encode(mode="CMYK"))
    (tree / "dogs" / "grey.jpg").write_bytes(encode(mode="L"))
    (tree / "dogs" / "one.jpg").write_bytes(encode(1, 1))
    (tree / "dogs" / "gone.jpg").symlink_to("nowhere")


def test_bad_and_unusual_images_are_counted_and_listed(
    tree: Path, tmp_path: Path, encode: Callable[..., bytes]
) -> None:
    spoil(tree, encode)
    converted = convert(FolderSource(tree), tmp_path / "set.beton", max_bad=0.5)
    assert converted.manifest.replaced == {
        "skipped: cannot be read": 1,
        "skipped: not a picture": 1,
        "skipped: truncated": 1,
        "transcoded: CMYK JPEG": 1,
        "transcoded: PNG": 1,
        "transcoded: greyscale JPEG": 1,
    }
    assert converted.manifest.count == 9
    assert [line.split(":")[0] for line in converted.skipped] == [
        "cats/b1.jpg",
        "cats/b2.jpg",
        "dogs/gone.jpg",
    ]
    assert skipped_path(tmp_path / "set.beton").read_text().splitlines() == list(converted.skipped)
    assert verify(tmp_path / "set.beton").ok
    beton = open_beton(tmp_path / "set.beton")
    one = next(i for i in range(9) if read_source_path(tmp_path / "set.beton", i) == "dogs/one.jpg")
    assert beton.metadata["f0"][one].tolist()[1:3] == (1, 1)


def test_more_than_twenty_skipped_are_all_in_the_file(tree: Path, tmp_path: Path) -> None:
    for i in range(25):
        (tree / "cats" / f"bad{i:02d}.jpg").write_bytes(b"bad")
    converted = convert(FolderSource(tree), tmp_path / "set.beton", max_bad=1)
    assert (len(converted.skipped), converted.num_skipped) == (20, 25)
    assert len(skipped_path(tmp_path / "set.beton").read_text().splitlines()) == 25


def test_the_list_of_skipped_images_goes_with_its_set(tree: Path, tmp_path: Path) -> None:
    (tree / "cats" / "bad.jpg").write_bytes(b"bad")
    convert(FolderSource(tree), tmp_path / "set.beton", max_bad=1)
    (tree / "cats" / "bad.jpg").unlink()
    convert(FolderSource(tree), tmp_path / "set.beton", overwrite=True)
    assert outputs(tmp_path) == ["set.beton", "set.json", "set.paths"]


def test_workers_do_not_change_a_byte(tree: Path, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    spoil(tree, encode)
    for workers in (1, 2, 5):
        convert(FolderSource(tree), tmp_path / f"set.{workers}.beton", workers=workers, max_bad=1)
    first, *others = [(tmp_path / f"set.{workers}.beton").read_bytes() for workers in (1, 2, 5)]
    assert all(other == first for other in others)


def test_the_first_bad_image_may_be_an_error(tree: Path, tmp_path: Path) -> None:
    (tree / "cats" / "b1.jpg").write_bytes(b"bad")
    with pytest.raises(ValueError, match=r"the last is cats/b1\.jpg: not a picture"):
        convert(FolderSource(tree), tmp_path / "set.beton", max_bad=0)
    assert outputs(tmp_path) == []


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(b"bad")
    with pytest.raises(ValueError, match=r"none of the 3 images of in can be used: 0\.jpg: not a picture"):
        convert(FolderSource(tmp_path / "in"), tmp_path / "set.beton", max_bad=1)
    assert outputs(tmp_path) == []


def test_existing_set_is_kept(tree: Path, tmp_path: Path) -> None:
    convert(FolderSource(tree), tmp_path / "set.beton")
    before = (tmp_path / "set.beton").read_bytes()
    with pytest.raises(FileExistsError, match="add --overwrite"):
        convert(FolderSource(tree), tmp_path / "set.beton")
    (tree / "cats" / "a.jpg").write_bytes(b"bad")
    with pytest.raises(ValueError, match="cannot be used"):
        convert(FolderSource(tree), tmp_path / "set.beton", overwrite=True, max_bad=0)
    assert (tmp_path / "set.beton").read_bytes() == before
    assert verify(tmp_path / "set.beton").ok
    convert(FolderSource(tree), tmp_path / "set.beton", overwrite=True, max_bad=0.2)
    assert len(open_beton(tmp_path / "set.beton")) == 4


@pytest.mark.parametrize(
    ("options", "words"), [({"workers": 0}, "workers is 0"), ({"max_bad": 1.5}, "max_bad is 1.5")]
)
def test_options_are_checked(tree: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        convert(FolderSource(tree), tmp_path / "set.beton", **options)
    assert outputs(tmp_path) == []


class Failing:
    """Raises at the third image, like a defect or Ctrl-C."""

    name = "failing"
    classes = ()

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __len__(self) -> int:
        return 100

    def path(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Sample:
        if index == 2:
            raise self.error
        return Sample(np.zeros((4, 4, 3), np.uint8), -1, str(index))


@pytest.mark.parametrize("error", [RuntimeError("defect"), KeyboardInterrupt()])
def test_error_in_a_worker_ends_the_conversion(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        convert(Failing(error), tmp_path / "set.beton", Normalising(tier="raw"), workers=2)
    assert outputs(tmp_path) == []


SLOW = """
import sys, time, pathlib
from dataset_tools.convert import convert
from dataset_tools.sources import FolderSource

class Slow(FolderSource):
    def __len__(self):
        return 10_000
    def read(self, index):
        time.sleep(0.02)
        return super().read(0)
    def path(self, index):
        return super().path(0)

convert(Slow(sys.argv[1]), sys.argv[2])
"""


def test_ctrl_c_leaves_nothing(tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW, str(tree), str(tmp_path / "set.beton")]
    with started(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "set.beton.partial").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert outputs(tmp_path), "the conversion never started"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert outputs(tmp_path) == []


@pytest.mark.needs("ffcv")
def test_stock_ffcv_loader_reads_it(tree: Path, tmp_path: Path) -> None:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    convert(FolderSource(tree), tmp_path / "set.beton")
    loader = Loader(
        str(tmp_path / "set.beton"),
        batch_size=2,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": [CenterCropRGBImageDecoder((40, 40), 1.0)], "label": [IntDecoder()]},
    )
    images, labels = zip(*((image.copy(), label.copy()) for image, label in loader), strict=True)
    assert np.concatenate(labels).ravel().tolist() == [0, 0, 0, 1, 1]
    with Image.open(tree / "cats" / "a.jpg") as first:
        expected = np.asarray(first.crop((10, 0, 50, 40)), np.int16)
    # Pillow and FFCV use two builds of libjpeg-turbo with different rounding in the inverse transform.
    assert np.abs(np.concatenate(images)[0] - expected).max() <= 4
