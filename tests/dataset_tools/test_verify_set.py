import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dataset_tools.convert import convert
from dataset_tools.normalise import Normalising
from dataset_tools.sources import FolderSource
from dataset_tools.stats import stats
from dataset_tools.verify import verify
from pipelines.sets.beton import open_beton


@pytest.fixture
def beton(tree: Path, tmp_path: Path) -> Path:
    convert(FolderSource(tree), tmp_path / "set.beton")
    return tmp_path / "set.beton"


def flip(path: Path, position: int, value: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[position] = content[position] ^ 0xFF if value is None else value
    path.write_bytes(content)


def test_undamaged_set_passes(beton: Path) -> None:
    report = verify(beton, workers=2)
    assert report.ok
    assert (report.count, report.num_bytes, report.has_manifest) == (5, beton.stat().st_size, True)


def test_every_flipped_payload_byte_is_found(beton: Path) -> None:
    opened = open_beton(beton)
    start, size = int(opened.metadata["f0"]["data_ptr"][2]), int(opened.sizes[2])
    for position in (start, start + size // 2, start + size - 1):
        flip(beton, position)
        assert any("hash" in problem for problem in verify(beton).problems)
        flip(beton, position)
    assert verify(beton).ok


def test_broken_image_is_named_with_its_source(beton: Path) -> None:
    start = int(open_beton(beton).metadata["f0"]["data_ptr"][4])
    flip(beton, start)
    (bad,) = verify(beton).bad
    assert (bad.index, bad.source_path) == (4, "dogs/deep/b.JPG")
    assert bad.reason.startswith("damaged")


def test_damage_to_planes_is_found(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.beton"
    convert(FolderSource(tree), path, Normalising(tier="yuv420"))
    opened = open_beton(path)
    flip(path, int(opened.pointers[1]))
    (problem,) = verify(path).problems
    assert "hash" in problem
    flip(path, int(opened.pointers[1]))
    assert verify(path).ok
    # The height of the last image: two bytes at offset 3 of its record of 24 bytes.
    flip(path, int(opened.pointers[0]) - 24 + 3)
    (problem,) = verify(path).problems
    assert "image 4 of" in problem
    assert "mode 2, cannot have" in problem


def test_a_manifest_of_another_tier_is_found(beton: Path) -> None:
    manifest = json.loads(beton.with_suffix(".json").read_text())
    beton.with_suffix(".json").write_text(json.dumps(manifest | {"tier": "yuv420"}))
    (problem,) = verify(beton).problems
    assert problem == "the images are of tier jpeg, the manifest says yuv420"


@pytest.mark.parametrize("keep", [0, 10, 100, 2000, -1, -24, -25])
def test_cut_file_is_found(beton: Path, keep: int) -> None:
    beton.write_bytes(beton.read_bytes()[:keep])
    report = verify(beton)
    assert not report.ok
    assert str(beton) in report.problems[-1]
    with pytest.raises(ValueError, match=str(beton)):
        stats(beton)


def test_lengthened_file_is_found(beton: Path) -> None:
    beton.write_bytes(beton.read_bytes() + bytes(24))
    assert any("the manifest says" in problem for problem in verify(beton).problems)


HEADER_AND_TABLES = [
    (0, "not a .beton file of version 2"),
    (2, "fields|metadata"),
    (4, "power of two"),
    (8, "metadata of"),
    (16, "allocation table"),
    (24, "has the fields"),
]


@pytest.mark.parametrize(("position", "words"), HEADER_AND_TABLES)
def test_damaged_header_is_an_error(beton: Path, position: int, words: str) -> None:
    flip(beton, position)
    with pytest.raises(ValueError, match=words):
        open_beton(beton)
    assert not verify(beton).ok


def test_every_flipped_byte_of_the_tables_is_found(beton: Path) -> None:
    """A flipped byte of header, field types, metadata or allocation table is reported and never raises."""
    opened = open_beton(beton)
    count, end = len(opened), beton.stat().st_size
    first = int(opened.metadata["f0"]["data_ptr"][0])
    # Within a record, bytes 13 … 15 pad the image's 13 bytes to the label's alignment.
    records = [first - 24 * (count - i) + byte for i in range(count) for byte in (*range(13), *range(16, 24))]
    # In the table, only FFCV's process cache reads sample_id.
    table = [end - 24 * (count - i) + byte for i in range(count) for byte in range(8, 24)]
    whole = beton.read_bytes()
    for position in (*range(24), *records, *table):
        flip(beton, position)
        assert not verify(beton, workers=1).ok, f"byte {position} of {end}"
        beton.write_bytes(whole)


def test_foreign_manifest_is_found(beton: Path) -> None:
    manifest = json.loads(beton.with_suffix(".json").read_text())
    for change, words in (
        ({"count": 4}, "holds 5 images, the manifest says 4"),
        ({"num_bytes": 7}, "the manifest says 7"),
        ({"sha256": "0" * 64}, "the hash of the contents is"),
        ({"classes": ["cats"]}, "names 1 classes"),
    ):
        beton.with_suffix(".json").write_text(json.dumps(manifest | change))
        (problem,) = verify(beton).problems
        assert words in problem
    beton.with_suffix(".json").write_text("{")
    assert "not valid JSON" in verify(beton).problems[0]
    beton.with_suffix(".json").unlink()
    report = verify(beton)
    assert report.ok
    assert not report.has_manifest


def test_a_missing_file_is_an_error_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make convert"):
        verify(tmp_path / "none.beton")


def test_stats_count(beton: Path, tree: Path) -> None:
    found = stats(beton)
    sizes = [
        (tree / p).stat().st_size
        for p in ("cats/a.jpg", "cats/b.JPEG", "cats/c.jpeg", "dogs/a.jpg", "dogs/deep/b.JPG")
    ]
    assert found.per_class == (("cats", 3), ("dogs", 2))
    assert (found.count, found.tier, found.num_bytes) == (5, "jpeg", beton.stat().st_size)
    assert (found.width_px, found.height_px) == ((60, 62.0, 64), (40, 42.0, 44))
    assert found.payload_bytes_mean == pytest.approx(np.mean(sizes))
    assert found.payload_bytes_median == np.median(sizes)


def test_stats_without_manifest_or_labels(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(encode())
    convert(FolderSource(tmp_path / "flat"), tmp_path / "set.beton")
    (tmp_path / "set.json").unlink()
    assert stats(tmp_path / "set.beton").per_class == (("unlabelled", 1),)
