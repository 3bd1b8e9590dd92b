"""Opening a set of shards: what the index says, and which damage is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_tools.convert import Sharding, convert
from dataset_tools.sources import FolderSource
from pipelines.sets import manifest as module
from pipelines.sets.manifest import Manifest
from pipelines.sets.shards import (
    INDEX_DTYPE,
    dali_index_path,
    is_shard_set,
    open_shards,
    positions_by_shard,
    set_digest,
)


@pytest.fixture(scope="module")
def made(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The forty images in four shards."""
    out = tmp_path_factory.mktemp("shards") / "pictures.shards"
    convert(FolderSource(picture_folder), out, sharding=Sharding(11, 1), workers=1)
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "x.shards"))


def test_image_i_is_the_ith_of_the_source(made: Path, picture_folder: Path) -> None:
    source, shards = FolderSource(picture_folder), open_shards(made)
    assert is_shard_set(made)
    assert not is_shard_set(picture_folder)
    assert len(shards) == len(source) == 40
    for i in range(40):
        sample = source.read(i)
        assert shards.payload(i).tobytes() == sample.payload
        assert shards.index["label"][i] == sample.label
        assert shards.member_name(i) == sample.path.replace(".JPEG", ".jpg")
    assert shards.manifest.sha256 == set_digest(shards.shards, shards.index)


def test_pictures_on_disk_lists_every_image_once_in_the_order_of_the_tars(made: Path) -> None:
    shards = open_shards(made)
    rows = positions_by_shard(shards.shards, shards.index)
    assert [len(r) for r in rows] == [11, 11, 11, 7]
    assert sorted(np.concatenate(rows).tolist()) == list(range(40))
    for number, found in enumerate(rows):
        assert (shards.index["shard"][found] == number).all()
        assert (np.diff(shards.index["offset"][found].astype(np.int64)) > 0).all()


def test_the_digest_does_not_depend_on_blocks(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = open_shards(made)
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert set_digest(shards.shards, shards.index) == shards.manifest.sha256
    assert len(open_shards(made)) == 40


def change(folder: Path, **changes: Any) -> None:
    """Change keys of the manifest."""
    content = json.loads((folder / "set.json").read_text())
    (folder / "set.json").write_text(json.dumps(content | changes))


def shard_with(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """The manifest's shards, with the first one changed."""
    first, *others = json.loads((folder / "set.json").read_text())["shards"]
    return [first | changes, *others]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda s: (s / "set.json").unlink(), "has no set.json; index the shards with"),
        (lambda s: (s / "set.json").rename(s / "convert.json"), "incomplete, .* run the conversion again"),
        (lambda s: (s / "000002.tar").unlink(), "000002.tar is missing"),
        (lambda s: (s / "000002.tar").write_bytes(b""), "has 0 bytes, the manifest says"),
        (lambda s: (s / "index.npy").unlink(), "index.npy is missing"),
        (lambda s: (s / "index.npy").write_bytes(b""), "is not a complete index"),
        (lambda s: np.save(s / "index.npy", np.array([{}], object)), "is not a complete index"),
        (lambda s: np.save(s / "index.npy", np.zeros((2, 2))), "not an index"),
        (
            lambda s: np.save(s / "index.npy", np.load(s / "index.npy")[:-1]),
            "has 39 images, the manifest says 40",
        ),
        (lambda s: change(s, format="beton"), "names no shards"),
        (lambda s: change(s, shards=[]), "names no shards"),
        (lambda s: change(s, shards=[3]), "a shard is 3"),
        (lambda s: change(s, shards=shard_with(s, name="../000000.tar")), "is not a file in the folder"),
        (lambda s: change(s, shards=shard_with(s, name="/etc/passwd")), "is not a file in the folder"),
        (lambda s: change(s, shards=shard_with(s, name="")), "is not a file in the folder"),
        (lambda s: change(s, shards=shard_with(s, name="..")), "is not a file in the folder"),
        (lambda s: change(s, shards=shard_with(s, name="000001.tar")), "names a shard twice"),
        (lambda s: change(s, shards=shard_with(s, count="11")), "count of a shard is '11'"),
        (lambda s: change(s, shards=shard_with(s, count=True)), "count of a shard is True"),
        (lambda s: change(s, shards=shard_with(s, num_bytes=-1)), "num_bytes of a shard is -1"),
        (lambda s: change(s, shards=shard_with(s, colour=1)), "a shard is .* expected"),
        (lambda s: change(s, shards=shard_with(s, count=12)), "40 in all and 41 in its shards"),
        (lambda s: change(s, classes=["bird"]), "does not fit the shards"),
        (lambda s: change(s, classes=["bird", 3]), "a class name is not text"),
    ],
)
def test_damage_is_an_error_that_names_the_set(
    copy: Path, harm: Callable[[Path], object], words: str
) -> None:
    harm(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        open_shards(copy)
    assert str(copy) in str(caught.value)


def test_wrong_counts_with_the_right_sum_are_refused(copy: Path) -> None:
    first, second, *others = json.loads((copy / "set.json").read_text())["shards"]
    change(copy, shards=[first | {"count": 10}, second | {"count": 12}, *others])
    with pytest.raises(ValueError, match=r"has 11 images in 000000\.tar, the manifest says 10"):
        open_shards(copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [("offset", 0), ("offset", 513), ("offset", 1 << 40), ("offset", (1 << 64) - 512), ("num_bytes", 0),
     ("num_bytes", (1 << 32) - 1), ("shard", 4), ("label", 2), ("label", -2), ("width", 0), ("height", 0)],
)  # fmt: skip
@pytest.mark.parametrize("picture", [0, 39])
def test_a_record_that_does_not_fit_is_named(copy: Path, field: str, value: int, picture: int) -> None:
    index = np.load(copy / "index.npy")
    index[field][picture] = value
    np.save(copy / "index.npy", index)
    with pytest.raises(ValueError, match=rf"the record of image {picture} is .* does not fit the shards"):
        open_shards(copy)


def test_a_tar_cut_after_opening_is_a_read_error(copy: Path) -> None:
    shards = open_shards(copy)
    last = int(positions_by_shard(shards.shards, shards.index)[0][-1])
    (copy / "000000.tar").write_bytes(
        (copy / "000000.tar").read_bytes()[: int(shards.index["offset"][last]) + 9]
    )
    with pytest.raises(OSError, match=rf"000000\.tar ends within image {last}; see what is whole with"):
        shards.payload(last)


def test_names_are_none_without_an_index_that_has_them(copy: Path) -> None:
    shards = open_shards(copy)
    idx = dali_index_path(shards.tar_path(int(shards.index["shard"][0])))
    text = idx.read_bytes()
    for other in (text.replace(b"v1.2", b"v1.1"), b"", b"v1.2 0\n", text[:20]):
        idx.write_bytes(other)
        assert shards.member_name(0) is None
    idx.unlink()
    assert shards.member_name(0) is None


def test_a_size_is_not_taken_for_an_offset(copy: Path) -> None:
    shards = open_shards(copy)
    offset = int(shards.index["offset"][0])
    idx = dali_index_path(shards.tar_path(int(shards.index["shard"][0])))
    idx.write_bytes(
        b"v1.2 2\njpg 512 %d wrong.jpg\njpg %d 3 right.jpg cls 9 9 right.cls\n" % (offset, offset)
    )
    assert shards.member_name(0) == "right.jpg"


def test_records_are_packed_and_the_manifest_is_read_back(made: Path) -> None:
    assert INDEX_DTYPE.itemsize == 24
    manifest = Manifest.read(made)
    assert manifest is not None
    assert manifest.format == "shards"
    assert sum(shard.count for shard in manifest.shards) == manifest.count == 40
