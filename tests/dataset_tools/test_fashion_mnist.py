import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from dataset_tools import fashion_mnist
from dataset_tools.fashion_mnist import (
    DEBIAN_FOLDER,
    IdxSource,
    compile_fashion_mnist,
    find_split,
    locate,
)
from dataset_tools.verify import verify
from pipelines.sets.beton import open_beton


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Both splits with 7 and 3 images of 28 × 28 px."""
    folder = tmp_path / "idx"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 7), ("t10k", 3)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        images = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + pixels.tobytes()
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, count) + labels.tobytes())
        )
    return folder


def test_both_splits_are_compiled_raw(idx_folder: Path, tmp_path: Path) -> None:
    pairs = locate(folder=idx_folder)
    outcome = compile_fashion_mnist(tmp_path / "out", pairs)
    assert [path.name for path in outcome] == ["fashion-mnist-train.beton", "fashion-mnist-test.beton"]
    for split, count in (("train", 7), ("test", 3)):
        path = tmp_path / "out" / f"fashion-mnist-{split}.beton"
        source = IdxSource(pairs[split].images, pairs[split].labels)
        beton = open_beton(path)
        assert len(beton) == count
        for i in range(count):
            sample = source.read(i)
            assert isinstance(sample.payload, np.ndarray)
            assert beton.payload(i).tobytes() == sample.payload.tobytes()
            assert beton.labels[i] == sample.label
        manifest = outcome[path].manifest
        assert (manifest.tier, manifest.replaced, manifest.classes[9]) == ("raw", {}, "Ankle boot")
        assert verify(path).ok


def test_existing_sets_are_refused_before_any_work(idx_folder: Path, tmp_path: Path) -> None:
    pairs = locate(folder=idx_folder)
    (tmp_path / "fashion-mnist-test.beton").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="fashion-mnist-test"):
        compile_fashion_mnist(tmp_path, pairs)
    assert not (tmp_path / "fashion-mnist-train.beton").exists()
    compile_fashion_mnist(tmp_path, pairs, overwrite=True)
    assert len(open_beton(tmp_path / "fashion-mnist-test.beton")) == 3


def test_plain_files_are_found_too(idx_folder: Path) -> None:
    for file in list(idx_folder.iterdir()):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    pair = find_split(idx_folder, "test")
    assert pair is not None
    assert pair.images.name == "t10k-images-idx3-ubyte"
    assert find_split(idx_folder / "none", "test") is None
    with pytest.raises(ValueError, match="split is 'val'"):
        find_split(idx_folder, "val")


def test_earlier_download_is_used(idx_folder: Path, tmp_path: Path) -> None:
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.parent.mkdir(parents=True)
    idx_folder.rename(raw)
    assert locate(tmp_path / "data", folder=tmp_path / "none")["train"].images.parent == raw


def test_failed_download_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    with pytest.raises(RuntimeError, match="apt-get install dataset-fashion-mnist"):
        locate(tmp_path / "data", folder=tmp_path / "none")


@pytest.mark.skipif(
    find_split(DEBIAN_FOLDER, "test") is None, reason="dataset-fashion-mnist is not installed"
)
def test_debians_files_have_the_known_labels() -> None:
    pair = fashion_mnist.find_split(DEBIAN_FOLDER, "test")
    assert pair is not None
    source = IdxSource(pair.images, pair.labels)
    labels = [source.read(i).label for i in range(len(source))]
    assert np.bincount(labels).tolist() == [1000] * 10
    assert source.classes[labels[0]] == "Ankle boot"
