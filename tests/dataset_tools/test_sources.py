import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dataset_tools.fashion_mnist import IdxSource, read_idx
from dataset_tools.sources import FolderSource


def listing(source: FolderSource) -> list[tuple[str, int]]:
    return [(sample.path, sample.label) for sample in map(source.read, range(len(source)))]


def test_classes_are_sorted_folders_with_nested_files(tree: Path) -> None:
    (tree / "empty").mkdir()
    (tree / "notes").mkdir()
    (tree / "notes" / "readme.txt").write_text("no picture")
    source = FolderSource(tree)
    assert source.classes == ("cats", "dogs")
    assert source.name == "images"
    assert listing(source) == [
        ("cats/a.jpg", 0), ("cats/b.JPEG", 0), ("cats/c.jpeg", 0), ("dogs/a.jpg", 1), ("dogs/deep/b.JPG", 1),
    ]  # fmt: skip
    assert source.read(4).payload == (tree / "dogs/deep/b.JPG").read_bytes()


def test_same_order_as_torchvision(tree: Path) -> None:
    from torchvision.datasets import ImageFolder

    theirs = ImageFolder(str(tree))
    assert tuple(theirs.classes) == FolderSource(tree).classes
    assert [(os.path.relpath(p, tree), label) for p, label in theirs.samples] == listing(FolderSource(tree))


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "jpeg", "JPEG", "png", "bmp", "webp", "tif", "TIFF"])
def test_flat_folder_is_unlabelled(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(b"x")
    (tmp_path / "._a.jpg").write_bytes(b"left by another system")
    (tmp_path / "sub").mkdir()
    source = FolderSource(tmp_path)
    assert source.classes == ()
    assert listing(source) == [(f"a.{suffix}", -1)]


def test_no_labels_takes_everything(tree: Path) -> None:
    (tree / "loose.jpg").write_bytes(b"x")
    source = FolderSource(tree, labelled=False)
    assert source.classes == ()
    assert len(source) == 6
    assert {label for _, label in listing(source)} == {-1}


def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    for name in (b"\xff.jpg", "ü\n.jpg".encode(), b"a b.jpg"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(name)
    source = FolderSource(tmp_path)
    assert sorted(bytes(source.read(i).payload) for i in range(3)) == sorted(
        [b"\xff.jpg", "ü\n.jpg".encode(), b"a b.jpg"]
    )


def test_circular_link_ends(tree: Path) -> None:
    (tree / "cats" / "again").symlink_to(tree / "cats", target_is_directory=True)
    assert len(FolderSource(tree)) == 5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.write_text("x"), "is a file, not a folder"),
        (lambda root: root.mkdir(), "no images in .* looked for .jpg"),
        (
            lambda root: ((root / "a").mkdir(parents=True), (root / "a" / "b.txt").write_text("x")),
            "no images in",
        ),
    ],
)
def test_unusable_folder_is_an_error(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "root")
    with pytest.raises(ValueError, match=words) as caught:
        FolderSource(tmp_path / "root")
    assert str(tmp_path / "root") in str(caught.value)


def test_images_in_folders_and_outside_are_refused(tree: Path) -> None:
    (tree / "loose.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"1 images itself \(first: loose.jpg\) and 2 sub-folders"):
        FolderSource(tree)


def test_folder_of_splits_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "cats").mkdir(parents=True)
        (tmp_path / split / "cats" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"splits, not classes \(train, val\)"):
        FolderSource(tmp_path)
    assert FolderSource(tmp_path / "train").classes == ("cats",)


# ------------------------------------------------------------------------------------------------------------
# idx files


def idx(array: np.ndarray) -> bytes:
    return (
        struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    )


GREY = np.arange(3 * 4 * 5).reshape(3, 4, 5)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_becomes_rgb(tmp_path: Path, suffix: str) -> None:
    pack = gzip.compress if suffix else bytes
    images, labels = tmp_path / f"i{suffix}", tmp_path / f"l{suffix}"
    images.write_bytes(pack(idx(GREY)))
    labels.write_bytes(pack(idx(np.array([2, 0, 1]))))
    source = IdxSource(images, labels, classes=("a", "b", "c"))
    assert len(source) == 3
    assert source.classes == ("a", "b", "c")
    sample = source.read(1)
    assert (sample.label, sample.path) == (0, f"i{suffix}#1")
    assert isinstance(sample.payload, np.ndarray)
    assert sample.payload.shape == (4, 5, 3)
    assert (sample.payload == GREY[1][:, :, None]).all()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "starts with"),
        (b"\x89PNG" + bytes(40), "starts with 89504e47"),
        (idx(GREY)[:-1], "requires 76"),
        (idx(GREY) + b"x", "has 77 bytes"),
        (idx(GREY[0]), "idx file of 3 dimensions"),
    ],
)
def test_bad_idx_is_an_error(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "i").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_idx(tmp_path / "i", num_dims=3)


def test_truncated_gzip_is_an_error(tmp_path: Path) -> None:
    whole = gzip.compress(idx(GREY))
    for name, content in (
        ("cut", whole[:-9]),
        ("no", b"hello"),
        ("flipped", whole[:12] + b"\xff\xff" + whole[14:]),
    ):
        (tmp_path / f"{name}.gz").write_bytes(content)
        with pytest.raises(ValueError, match="not a whole gzip file"):
            read_idx(tmp_path / f"{name}.gz", num_dims=3)
    with pytest.raises(ValueError, match="does not exist"):
        read_idx(tmp_path / "none", num_dims=3)


def test_idx_files_must_match(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(idx(GREY))
    (tmp_path / "l").write_bytes(idx(np.array([0, 1])))
    with pytest.raises(ValueError, match=r"3 images.* 2 labels"):
        IdxSource(tmp_path / "i", tmp_path / "l")
    (tmp_path / "l").write_bytes(idx(np.array([0, 1, 10])))
    with pytest.raises(ValueError, match="label 10, but 10 classes"):
        IdxSource(tmp_path / "i", tmp_path / "l")
