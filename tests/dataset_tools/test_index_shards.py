import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset_tools import index_shards as module
from dataset_tools.__main__ import main
from dataset_tools.convert import Sharding, convert
from dataset_tools.index_shards import index_shards
from dataset_tools.sources import FolderSource, ShardSource
from dataset_tools.verify import verify
from pipelines.decode.pillow import EXIF_ORIENTATION
from pipelines.sets.shards import open_shards
from tests.dataset_tools.test_tar_source import pack

Encode = Callable[..., bytes]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def foreign(tmp_path: Path, encode: Encode) -> Path:
    """Two shards of other programs: upper case, json and cls, other files, a sample without an image."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    rotated = io.BytesIO()
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.new("RGB", (30, 20), (200, 10, 10)).save(rotated, "JPEG", exif=exif)
    pack(folder / "b.tar", [
        ("k1.JPG", encode(50, 40)), ("k1.json", b'{"label": 2, "caption": "x"}'), ("k1.txt", b"x"),
        ("deep/k2.txt", b"text only"), ("deep/k2.cls", b"1"),
        ("deep/k3.jpg", rotated.getvalue()), ("deep/k3.cls", b"1\n"),
    ])  # fmt: skip
    pack(
        folder / "a.tar",
        [(".hidden.jpg", b"x"), ("README", b"x"), ("k0.jpg", encode(60, 41)), ("k0.json", b"{}")],
    )
    return folder


def test_images_sizes_and_labels_are_found(foreign: Path, encode: Encode) -> None:
    before = {path: path.read_bytes() for path in foreign.glob("*.tar")}
    done = index_shards(foreign, workers=2)
    shards = open_shards(foreign)
    assert [(shard.name, shard.count) for shard in shards.shards] == [("a.tar", 1), ("b.tar", 2)]
    assert shards.index["label"].tolist() == [-1, 2, 1]
    assert list(zip(shards.index["width"].tolist(), shards.index["height"].tolist(), strict=True)) == [
        (60, 41), (50, 40), (20, 30),
    ]  # fmt: skip
    assert shards.payload(1).tobytes() == encode(50, 40)
    assert shards.member_name(2) == "deep/k3.jpg"
    assert shards.manifest.classes == ("0", "1", "2")
    assert (done.skipped, done.idx_written) == (("b.tar: deep/k2: no picture",), 2)
    assert shards.manifest.replaced == {"skipped: no picture": 1}
    assert {path: path.read_bytes() for path in foreign.glob("*.tar")} == before
    assert verify(foreign).ok
    source = ShardSource(foreign)
    assert [(source.path(i), source.label(i)) for i in range(3)] == [
        ("a.tar/k0.jpg", -1), ("b.tar/k1.JPG", 2), ("b.tar/deep/k3.jpg", 1),
    ]  # fmt: skip


def test_dalis_index_has_only_the_images_in_the_set(foreign: Path) -> None:
    index_shards(foreign)
    assert [line.split(b" ")[-1] for line in (foreign / "b.idx").read_bytes().splitlines()] == [
        b"2", b"k1.txt", b"deep/k3.cls",
    ]  # fmt: skip


def test_correct_indices_are_not_written_again(foreign: Path) -> None:
    index_shards(foreign)
    written = (foreign / "a.idx").stat().st_mtime_ns
    (foreign / "b.idx").write_bytes(b"v1.2 0\n")
    done = index_shards(foreign)
    assert done.idx_written == 1
    assert (foreign / "a.idx").stat().st_mtime_ns == written
    assert verify(foreign).ok


def test_dali_reads_names_with_white_space(tmp_path: Path, encode: Encode) -> None:
    dali = pytest.importorskip("nvidia.dali")
    images = [encode(30 + i, 20) for i in range(3)]
    pack(tmp_path / "x.tar", [(f"a {i}.jpg", image) for i, image in enumerate(images)])
    index_shards(tmp_path)

    @dali.pipeline_def(batch_size=3, num_threads=1, device_id=None)
    def reader() -> Any:
        return dali.fn.readers.webdataset(
            paths=[str(tmp_path / "x.tar")], index_paths=[str(tmp_path / "x.idx")], ext=["jpg"]
        )

    pipeline = reader()
    pipeline.build()
    (read,) = pipeline.run()
    assert [bytes(read.at(i)) for i in range(3)] == images
    assert open_shards(tmp_path).member_name(1) is None


def test_the_index_of_other_programs_tars_is_that_of_wds2idx(tmp_path: Path, encode: Encode) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    files = [(f"{i:03}.{ext}", encode(20 + i, 20)) for i in range(3) for ext in ("cls2", "jpg", "seg.png")]
    pack(tmp_path / "x.tar", files)
    index_shards(tmp_path)
    with wds2idx.IndexCreator(str(tmp_path / "x.tar"), str(tmp_path / "theirs"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "x.idx").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_indexing_a_converted_set_renumbers_it_and_prints_so(
    tree: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "x.shards"
    convert(FolderSource(tree), out, sharding=Sharding(2, 3))
    before = open_shards(out)
    by_source = [before.payload(i).tobytes() for i in range(5)]
    on_disk = np.lexsort((before.index["offset"], before.index["shard"]))
    assert on_disk.tolist() != list(range(5))
    (out / "set.json").write_text("{")
    (out / "index.npy").unlink()
    assert main(["index", str(out)]) == 0
    assert "in the order of the tars" not in capsys.readouterr().out, "the manifest with this fact is lost"
    convert(FolderSource(tree), tmp_path / "y.shards", sharding=Sharding(2, 3))
    assert main(["index", str(tmp_path / "y.shards")]) == 0
    printed = capsys.readouterr().out
    assert "its images are now numbered in the order of the tars" in printed
    assert f"Next: make pretrain DATA={tmp_path / 'y.shards'}" in printed
    for folder, classes in ((out, ("0", "1")), (tmp_path / "y.shards", ("cats", "dogs"))):
        again = open_shards(folder)
        assert [again.payload(i).tobytes() for i in range(5)] == [by_source[i] for i in on_disk]
        assert again.manifest.classes == classes


def test_dali_only_writes_missing_and_wrong_dali_indices(tree: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "x.shards"
    convert(FolderSource(tree), out, sharding=Sharding(2))
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "000001.idx").unlink()
    (out / "000002.idx").write_bytes(whole["000000.idx"])
    assert main(["index", str(out), "--dali-only"]) == 0
    assert "2 DALI indices written" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_class_names_may_be_given(foreign: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "names").write_text("ant\nbee\ncow\n")
    assert main(["index", str(foreign), "--classes", str(tmp_path / "names")]) == 0
    assert open_shards(foreign).manifest.classes == ("ant", "bee", "cow")
    (tmp_path / "names").write_text("ant\nbee\n")
    assert main(["index", str(foreign), "--classes", str(tmp_path / "names")]) == 2
    assert "2 classes are named, " in capsys.readouterr().err
    assert main(["index", str(foreign), "--no-labels"]) == 0
    shards = open_shards(foreign)
    assert shards.index["label"].tolist() == [-1, -1, -1]
    assert shards.manifest.classes == ()


@pytest.mark.parametrize(
    "label", [("cls", b"cat"), ("cls", b""), ("cls", b"1_0"), ("cls", b"-2"), ("cls", b"9999999999"),
              ("json", b'{"label": "cat"}'), ("json", b'{"label": true}'), ("json", b"["), ("json", b"[1]")]
)  # fmt: skip
def test_a_label_that_is_not_a_number_is_an_error_with_the_sample(
    tmp_path: Path, encode: Encode, label: tuple[str, bytes]
) -> None:
    pack(tmp_path / "x.tar", [("k.jpg", encode()), (f"k.{label[0]}", label[1])])
    with pytest.raises(ValueError, match=rf"x\.tar: k\.{label[0]} of the sample k holds no class number"):
        index_shards(tmp_path)
    assert not (tmp_path / "set.json").exists()


def test_other_kinds_of_images_must_be_listed(tmp_path: Path, encode: Encode, capsys: Capture) -> None:
    pack(
        tmp_path / "x.tar",
        [("a.jpg", encode()), ("b.webp", encode(kind="WEBP")), ("c.PNG", encode(kind="PNG"))],
    )
    assert main(["index", str(tmp_path)]) == 2
    assert "the sample b has the image b.webp, others have jpg; name all kinds with --ext jpg webp" in (
        capsys.readouterr().err
    )
    assert main(["index", str(tmp_path), "--ext", "jpg", "webp", ".png"]) == 0
    assert len(open_shards(tmp_path)) == 3
    assert verify(tmp_path).ok


def test_images_of_unknown_size_are_left_out_and_listed(
    tmp_path: Path, encode: Encode, capsys: Capture
) -> None:
    pack(tmp_path / "x.tar", [("a.jpg", b"bad"), ("b.jpg", encode())])
    pack(tmp_path / "y.tar", [("c.jpg", b"bad")])
    assert main(["index", str(tmp_path)]) == 2
    assert "2 of 3 images of " in capsys.readouterr().err
    assert not (tmp_path / "set.json").exists()
    assert main(["index", str(tmp_path), "--max-bad", "0.7"]) == 0
    out = capsys.readouterr().out
    assert "2 skipped: no readable size" in out
    assert "  x.tar: a: no readable size" in out
    assert [shard.name for shard in open_shards(tmp_path).shards] == ["x.tar"]
    assert (tmp_path / "skipped.txt").read_text().splitlines() == [
        "x.tar: a: no readable size", "y.tar: c: no readable size",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, b"", "holds no .tar files"),
        ("x.tar.gz", b"\x1f\x8b", "is compressed"),
        ("x.tar", b"\x1f\x8b" + bytes(1000), "compressed with gzip"),
        ("x.tar", b"", "no whole tar"),
        ("x.tar", bytes(10240), "no images in the tars"),
        ("x.tar", b"text" * 1000, "no whole tar"),
    ],
)
def test_unusable_folders_are_errors(tmp_path: Path, name: str | None, content: bytes, words: str) -> None:
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        index_shards(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        index_shards(tmp_path / "none")


def test_a_folder_that_cannot_be_written_is_an_error_before_the_work(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(module, "_read_tar", None)
    with pytest.raises(
        OSError, match=r"cannot be written \(Permission denied\); indices are stored next to the tars"
    ):
        index_shards(foreign)


def test_huge_labels_are_taken_for_a_mistake(tmp_path: Path, encode: Encode) -> None:
    pack(tmp_path / "x.tar", [("a.jpg", encode()), ("a.json", json.dumps({"label": 2**30}).encode())])
    with pytest.raises(ValueError, match="would make 1073741825 classes"):
        index_shards(tmp_path)
