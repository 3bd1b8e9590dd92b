import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dataset_tools.commands import open_source
from dataset_tools.sources import FolderSource, Source
from dataset_tools.tar_source import TarSource
from dataset_tools.tars import scan_tar

Encode = Callable[..., bytes]


def pack(path: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of the files in the order given, with a folder entry before them."""
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def files_of(root: Path) -> list[tuple[str, bytes]]:
    """All files below a folder, in an arbitrary order."""
    files = [(str(p.relative_to(root)), p.read_bytes()) for p in root.rglob("*") if p.is_file()]
    return sorted(files, key=lambda item: zlib.crc32(item[1]))


def assert_same(tar: Source, folder: Source) -> None:
    assert (tar.classes, len(tar), tar.fingerprint()) == (folder.classes, len(folder), folder.fingerprint())
    for i in range(len(folder)):
        assert tar.read(i) == folder.read(i)
        assert tar.path(i) == folder.path(i)


@pytest.fixture
def large_tree(tree: Path, encode: Encode) -> Path:
    """The tree with names that are hard to sort and to store."""
    for name in (
        "cats/a/z.jpg",
        "cats/a.b/y.png",
        "dogs/" + "x" * 120 + ".jpg",
        "ante/ü b.jpg",
        "cats/B.jpg",
    ):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(encode(20 + len(name), 20))
    (tree / "cats" / os.fsdecode(b"\xff.jpg")).write_bytes(b"no utf-8")
    (tree / "cats" / ".hidden.jpg").write_bytes(b"hidden")
    (tree / "cats" / "notes.txt").write_bytes(b"no picture")
    return tree


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_tar_reads_as_the_unpacked_folder(
    large_tree: Path, tmp_path: Path, form: int, labelled: bool
) -> None:
    tar = pack(tmp_path / "x.tar", files_of(large_tree), form)
    assert_same(TarSource(tar, labelled=labelled), FolderSource(large_tree, labelled=labelled))


def test_a_tar_of_tars_reads_as_the_unpacked_folders(large_tree: Path, tmp_path: Path) -> None:
    inner = []
    for name in ("dogs", "cats", "ante"):
        path = pack(tmp_path / f"{name}.tar", files_of(large_tree / name))
        inner.append((f"./{name}.tar", path.read_bytes()))
    source = TarSource(pack(tmp_path / "train.tar", inner))
    assert_same(source, FolderSource(large_tree))
    assert source.name == "train.tar"


def test_loose_images_have_the_labels_of_the_labels_file(tmp_path: Path) -> None:
    tar = pack(tmp_path / "val.tar", [(f"val_{i:02}.JPEG", bytes([i])) for i in (3, 0, 2, 1)])
    assert TarSource(tar).classes == ()
    (tmp_path / "labels.txt").write_text("wolf\nant\nwolf\nbee\n")
    source = open_source(tar, labels_file=tmp_path / "labels.txt")
    assert source.classes == ("ant", "bee", "wolf")
    assert [(s.path, s.payload, s.label) for s in map(source.read, range(4))] == [
        ("val_00.JPEG", b"\0", 2),
        ("val_01.JPEG", b"\1", 0),
        ("val_02.JPEG", b"\2", 2),
        ("val_03.JPEG", b"\3", 1),
    ]  # fmt: skip


def test_the_last_member_of_a_name_counts_as_in_unpacking(tmp_path: Path) -> None:
    source = TarSource(pack(tmp_path / "x.tar", [("a.jpg", b"old"), ("b.jpg", b"b"), ("./a.jpg", b"new")]))
    assert [source.read(i).payload for i in range(len(source))] == [b"new", b"b"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([("a.txt", b"x")], "no images in"),
        ([("a.jpg", b"x"), ("c/b.jpg", b"x")], r"1 loose images \(first: a.jpg\) and others in folders"),
        ([("train/a.jpg", b"x"), ("val/b.jpg", b"x")], r"splits, not classes \(train, val\)"),
        ([("../a.jpg", b"x")], "lies outside"),
        ([("a.tar", b"")], "a.tar is no whole tar"),
    ],
)
def test_unusable_contents_are_errors(tmp_path: Path, files: list[tuple[str, bytes]], words: str) -> None:
    tar = pack(tmp_path / "x.tar", files)
    with pytest.raises(ValueError, match=words) as caught:
        TarSource(tar)
    assert str(tar) in str(caught.value)


def test_tars_among_images_are_refused(tree: Path, tmp_path: Path) -> None:
    inner = pack(tmp_path / "i.tar", [("a.jpg", b"x")]).read_bytes()
    with pytest.raises(ValueError, match=r"holds tars \(such as i.tar\) and images \(such as b.jpg\)"):
        TarSource(pack(tmp_path / "x.tar", [("i.tar", inner), ("b.jpg", b"x")]))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_refused_by_name(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("c/link.jpg")
        info.type, info.linkname = kind, "c/a.jpg"
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"c/link.jpg is a link .* --hard-dereference"):
        TarSource(tmp_path / "x.tar")


def test_every_truncated_tar_is_an_error(tmp_path: Path) -> None:
    """Except if only zeros of the last record are missing."""
    tar = pack(tmp_path / "x.tar", [(f"c/{i}.jpg", bytes([i]) * 700) for i in range(3)])
    whole = tar.read_bytes()
    end = max(member.offset + 1024 for member in scan_tar(tar))
    for keep in (*range(1, end + 1, 256), end + 511):
        tar.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"is no whole tar|is cut short"):
            TarSource(tar)
    tar.write_bytes(whole[: end + 512])
    assert len(TarSource(tar)) == 3


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    tar = pack(tmp_path / "x.tar", [(f"c/{i}.jpg", bytes([i]) * 700) for i in range(3)])
    content = bytearray(tar.read_bytes())
    second = [member.offset for member in scan_tar(tar)][1]
    content[second - 300] ^= 0xFF
    tar.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        TarSource(tar)


def test_a_cut_inner_tar_is_named(tmp_path: Path) -> None:
    inner = pack(tmp_path / "i.tar", [("a.jpg", b"x" * 999), ("b.jpg", b"x" * 999)]).read_bytes()
    with pytest.raises(ValueError, match=r"x\.tar: n01\.tar (ends at byte|ends within|is no whole tar)"):
        TarSource(pack(tmp_path / "x.tar", [("n01.tar", inner[:2600]), ("n02.tar", inner)]))


def test_compressed_tars_and_other_files_are_refused(tmp_path: Path) -> None:
    plain = pack(tmp_path / "x.tar", [("a.jpg", b"x")])
    (tmp_path / "y.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(ValueError, match=r"compressed with gzip: .* unpack it to a plain \.tar"):
        open_source(tmp_path / "y.tar.gz")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"is a file but not a \.tar"):
        open_source(tmp_path / "a.zip")
    with pytest.raises(ValueError, match=r"tars .* without an index"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        open_source(tmp_path / "none")


@pytest.mark.parametrize(("text", "words"), [("a\n", "1 lines for 2"), ("a\n\n", "line 2 is empty")])
def test_labels_must_fit(tmp_path: Path, text: str, words: str) -> None:
    tar = pack(tmp_path / "x.tar", [("a.jpg", b"x"), ("b.jpg", b"x")])
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        TarSource(tar, labels_file=tmp_path / "labels.txt")
    (tmp_path / "labels.txt").write_text("a\nb\n")
    filed = pack(tmp_path / "y.tar", [("c/a.jpg", b"x"), ("c/b.jpg", b"x")])
    with pytest.raises(ValueError, match="label it again"):
        TarSource(filed, labels_file=tmp_path / "labels.txt")


def test_a_tar_cut_after_it_was_opened_is_a_read_error(tmp_path: Path) -> None:
    tar = pack(tmp_path / "x.tar", [("a.jpg", b"x" * 2000)])
    source = TarSource(tar)
    os.truncate(tar, 2000)
    with pytest.raises(OSError, match="ends within"):
        source.read(0)
