import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_tools.photographs import _add_noise, draw_photograph, make_photographs, source_files
from dataset_tools.sources import FolderSource

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_same_seed_gives_the_same_bytes_for_any_workers(tmp_path: Path) -> None:
    for name, seed, workers in (("a", 3, 1), ("b", 3, 3), ("c", 4, 2)):
        make_photographs(tmp_path / name, count=24, val=5, seed=seed, workers=workers)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    a, c = content(tmp_path / "a"), content(tmp_path / "c")
    assert a.keys() == c.keys()
    assert not set(a.values()) & set(c.values())
    assert len(set(a.values())) == 24 + 5 + 1, "no two images are alike"


def test_a_larger_set_starts_with_the_same_images(tmp_path: Path) -> None:
    make_photographs(tmp_path / "few", count=10, val=0)
    make_photographs(tmp_path / "many", count=20, val=3)
    few, many = content(tmp_path / "few"), content(tmp_path / "many")
    assert {k: v for k, v in few.items() if k.endswith(".JPEG")}.items() <= many.items()


def test_tree_looks_like_imagenet(tmp_path: Path) -> None:
    made = make_photographs(tmp_path / "set", count=190, val=19)
    train = FolderSource(tmp_path / "set" / "train")
    assert train.classes == tuple(sorted(source_files()))
    assert np.bincount([train.read(i).label for i in range(len(train))]).tolist() == [10] * 19
    assert len(FolderSource(tmp_path / "set" / "val")) == 19
    sizes = []
    for path in (tmp_path / "set").rglob("*.JPEG"):
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert 300 <= min(image.size) <= max(image.size) <= 640
            assert image.layer[0][1:3] == (2, 2), "4:2:0"  # type: ignore[attr-defined]
        sizes.append(path.stat().st_size)
    assert sum(sizes) == made.num_bytes
    assert 100_000 < np.mean(sizes) < 120_000, "about 110 KB, as ImageNet's"


def test_complete_set_is_kept(tmp_path: Path) -> None:
    first = make_photographs(tmp_path / "set", count=4, val=1)
    assert not first.already_there
    (tmp_path / "set" / "mark").write_text("mine")
    again = make_photographs(tmp_path / "set", count=4, val=1)
    assert again.already_there
    assert (again.counts, again.num_bytes) == (first.counts, first.num_bytes)
    assert (tmp_path / "set" / "mark").exists()


def test_other_options_need_overwrite(tmp_path: Path) -> None:
    make_photographs(tmp_path / "set", count=4, val=1)
    with pytest.raises(FileExistsError, match="add --overwrite"):
        make_photographs(tmp_path / "set", count=5, val=1)
    make_photographs(tmp_path / "set", count=5, val=1, overwrite=True)
    assert json.loads((tmp_path / "set" / "photographs.json").read_text())["count"] == 5
    assert len(list((tmp_path / "set").rglob("*.JPEG"))) == 6


def test_foreign_folder_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="not a sample set"):
            make_photographs(tmp_path / "mine", count=2, val=0, overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_interruption_leaves_nothing(tmp_path: Path) -> None:
    calls = 0

    def interrupt() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_photographs(tmp_path / "set", count=40, val=0, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_counts_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count is 0"):
        make_photographs(tmp_path / "set", count=0)


def test_grey_sources_come_out_coloured() -> None:
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1)))
    jpegs = [draw_photograph(ramp, np.random.default_rng(seed)) for seed in range(8)]
    spread = [np.ptp(np.asarray(Image.open(io.BytesIO(jpeg)), np.int16), axis=2).mean() for jpeg in jpegs]
    assert np.mean(spread) > 10


def test_noise_grows_with_light() -> None:
    flat = np.repeat(np.repeat(np.array([[20, 120, 220]], np.uint8), 200, 0), 100, 1)[:, :, None].repeat(3, 2)
    deviations = []
    for seed in range(6):
        noisy = _add_noise(flat, np.random.default_rng(seed)).astype(float) - flat
        deviations.append([noisy[:, i : i + 100].std() for i in (0, 100, 200)])
    dark, middle, light = np.mean(deviations, axis=0)
    assert 2 < dark < middle < light < 20
