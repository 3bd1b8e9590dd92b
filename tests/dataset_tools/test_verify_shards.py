import json
import os
from pathlib import Path

import numpy as np
import pytest

from dataset_tools.__main__ import main
from dataset_tools.convert import Sharding, convert
from dataset_tools.sources import FolderSource
from dataset_tools.stats import stats
from dataset_tools.verify import verify
from pipelines.sets.shards import open_shards

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def shards(tree: Path, tmp_path: Path) -> Path:
    """Five images in three shards."""
    convert(FolderSource(tree), tmp_path / "x.shards", sharding=Sharding(2, 3))
    return tmp_path / "x.shards"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def test_an_undamaged_set_passes(shards: Path) -> None:
    (shards / "notes.txt").write_text("a foreign file")
    calls: list[None] = []
    report = verify(shards, workers=2, progress=lambda: calls.append(None))
    assert report.ok
    assert (report.count, report.tier, report.has_manifest, len(calls)) == (5, "jpeg", True, 5)
    assert report.num_bytes == sum(tar.stat().st_size for tar in shards.glob("*.tar"))


def test_a_corrupt_image_is_named_with_shard_and_member(shards: Path, capsys: Capture) -> None:
    opened = open_shards(shards)
    record = opened.index[3]
    tar = opened.tar_path(int(record["shard"]))
    content = bytearray(tar.read_bytes())
    start, size = int(record["offset"]), int(record["num_bytes"])
    content[start + size // 2 : start + size] = bytes(size - size // 2)
    tar.write_bytes(content)
    assert main(["verify", str(shards)]) == 1
    out = capsys.readouterr().out
    assert f"image 3 ({tar.name}: dogs/a.jpg): damaged" in out
    assert f"the hash of {tar} is" in out
    assert "1 of 5 images bad" in out


def test_every_kind_of_byte_of_a_tar_is_checked(shards: Path) -> None:
    """Every flipped byte of a tar is found: images, headers, names, padding and the end mark."""
    tar = shards / "000000.tar"
    size = tar.stat().st_size
    for position in (*range(0, size, 397), size - 1):
        flip(tar, position)
        report = verify(shards, workers=1)
        assert any(str(tar) in problem for problem in report.problems), f"byte {position}"
        flip(tar, position)
    assert verify(shards).ok


@pytest.mark.parametrize("keep", [0, 100, 512, 3000, -10240, -1])
def test_a_cut_tar_is_named(shards: Path, keep: int) -> None:
    tar = shards / "000001.tar"
    tar.write_bytes(tar.read_bytes()[:keep])
    report = verify(shards)
    assert f"{tar} has {tar.stat().st_size} bytes, the manifest says" in report.problems[0]
    assert len(report.problems) <= 2
    assert all(bad.source_path and bad.source_path.startswith(tar.name) for bad in report.bad)


def test_a_missing_tar_is_named_and_the_others_are_checked(shards: Path) -> None:
    (shards / "000000.tar").unlink()
    flip(shards / "000002.tar", int(open_index(shards)["offset"][open_index(shards)["shard"] == 2][0]))
    report = verify(shards)
    assert "000000.tar is missing" in report.problems[0]
    assert any(f"the hash of {shards / '000002.tar'} is" in problem for problem in report.problems)
    assert len(report.bad) == 1


def open_index(shards: Path) -> np.ndarray:
    index: np.ndarray = np.load(shards / "index.npy")
    return index


def test_an_idx_must_exist_and_match_its_tar(shards: Path, capsys: Capture) -> None:
    (shards / "000001.idx").write_bytes((shards / "000000.idx").read_bytes())
    (shards / "000002.idx").unlink()
    assert main(["verify", str(shards)]) == 1
    out = capsys.readouterr().out
    assert f"{shards / '000001.idx'} does not match 000001.tar: line 2 is " in out
    assert f"{shards / '000002.idx'} is missing" in out
    assert f"write it again with `python -m dataset_tools index {shards} --dali-only`" in out
    assert main(["index", str(shards), "--dali-only"]) == 0
    assert verify(shards).ok


def test_every_entry_of_an_idx_is_checked(shards: Path) -> None:
    idx = shards / "000000.idx"
    for position in range(0, idx.stat().st_size, 3):
        flip(idx, position)
        assert len(verify(shards, workers=1).problems) == 1, f"byte {position}"
        flip(idx, position)


def test_an_index_of_another_set_is_found(shards: Path, tree: Path, tmp_path: Path) -> None:
    convert(FolderSource(tree), tmp_path / "y.shards", sharding=Sharding(2, 4))
    (shards / "index.npy").write_bytes((tmp_path / "y.shards" / "index.npy").read_bytes())
    problems = verify(shards).problems
    assert any("index.npy" in p or "the index is of another set" in p for p in problems)


@pytest.mark.parametrize("field", ["offset", "num_bytes", "shard", "label", "width", "height"])
def test_a_changed_record_is_found(shards: Path, field: str) -> None:
    index = open_index(shards)
    index[field][0] += {"offset": 512, "shard": 1}.get(field, 1)
    np.save(shards / "index.npy", index)
    report = verify(shards)
    assert not report.ok
    if field in ("offset", "num_bytes", "width", "height"):
        assert [bad.index for bad in report.bad] == [0] or "index.npy" in report.problems[0]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda s: (s / "index.npy").unlink(), "index.npy is missing; index the shards with"),
        (lambda s: (s / "index.npy").write_bytes(b""), "not a complete index"),
        (lambda s: os.truncate(s / "index.npy", 200), "not a complete index"),
        (lambda s: np.save(s / "index.npy", np.zeros(5)), "not an index"),
        (lambda s: (s / "set.json").write_text("{"), "not valid JSON"),
        (
            lambda s: (s / "set.json").write_text(json.dumps(manifest_of(s) | {"shards": []})),
            "names no shards",
        ),
        (
            lambda s: (s / "set.json").write_text(json.dumps(manifest_of(s) | {"num_bytes": 1})),
            "manifest says 1",
        ),
        (
            lambda s: (s / "set.json").write_text(json.dumps(manifest_of(s) | {"classes": ["a"]})),
            "does not fit",
        ),
    ],
)
def test_damaged_tables_are_reported(shards: Path, harm: object, words: str) -> None:
    assert callable(harm)
    harm(shards)
    report = verify(shards)
    assert words in report.problems[0]


def manifest_of(shards: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((shards / "set.json").read_text())
    return content


def test_a_folder_that_is_not_a_set_is_an_error(tree: Path, capsys: Capture) -> None:
    assert main(["verify", str(tree)]) == 2
    assert "has no set.json" in capsys.readouterr().err
    assert main(["stats", str(tree)]) == 2


def test_stats_of_shards(shards: Path, tree: Path, capsys: Capture) -> None:
    found = stats(shards)
    assert found.per_class == (("cats", 3), ("dogs", 2))
    assert (found.count, found.tier, found.layout) == (5, "jpeg", "3 shards")
    assert (found.width_px, found.height_px) == ((60, 62.0, 64), (40, 42.0, 44))
    assert found.payload_bytes_mean == np.mean([p.stat().st_size for p in tree.rglob("*") if p.is_file()])
    assert main(["stats", str(shards)]) == 0
    assert "3 shards" in capsys.readouterr().out
