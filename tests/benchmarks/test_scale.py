"""The scale benchmark: its synthetic sets are valid, and its figures complete."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import scale
from benchmarks.scale import MEASURES, Scale
from benchmarks.synthetic import write_synthetic
from dataset_tools.beton_writer import BetonWriter
from pipelines import build_loader
from pipelines.recipe import moco_v2
from pipelines.sets.beton import matching_manifest, open_beton


@pytest.mark.parametrize(("count", "payloads"), [(1, 1), (7, 7), (1000, 7), (5, 7)])
def test_a_synthetic_set_is_a_set_of_the_sources_pictures(
    beton: Path, tmp_path: Path, count: int, payloads: int
) -> None:
    source, made = open_beton(beton), tmp_path / "made.beton"
    index_bytes = write_synthetic(source, made, count=count, payloads=payloads)
    opened = open_beton(made)  # checks every address against the allocation table and the pages
    assert len(opened) == count
    manifest = matching_manifest(opened)
    assert manifest is not None and manifest.count == count
    for i in {0, count // 3, count - 1}:
        picture = i * payloads // count
        assert opened.payload(i).tobytes() == source.payload(picture).tobytes()
        assert opened.labels[i] == source.labels[picture]
        for name in ("mode", "width", "height"):
            assert opened.metadata["f0"][name][i] == source.metadata["f0"][name][picture]
    addresses = opened.metadata["f0"]["data_ptr"].astype(np.int64)
    assert (np.diff(addresses) >= 0).all()
    # 24 bytes of metadata and 24 of the allocation table for each picture.
    assert index_bytes == 48 * count


def test_payloads_stay_within_pages_and_blocks_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    # Raw images of 48 … 4,080 bytes on pages of 4,096: packed densely, most would lie across two.
    with BetonWriter(tmp_path / "source.beton", capacity=40, tier="raw", page_bytes=4096) as writer:
        for i in range(40):
            width = int(rng.integers(1, 86))
            pixels = rng.integers(0, 256, (16, width, 3), dtype=np.uint8)
            writer.add(pixels, label=i, width=width, height=16, source_path=f"{i}.png")
        writer.commit(source="noise")
    monkeypatch.setattr("pipelines.sets.manifest._BLOCK", 64)
    source, made = open_beton(tmp_path / "source.beton"), tmp_path / "made.beton"
    write_synthetic(source, made, count=150, payloads=40)
    opened = open_beton(made)  # refuses payloads across pages
    assert opened.page_bytes == 4096
    assert [opened.payload(i).tobytes() for i in range(150)] == [
        source.payload(i * 40 // 150).tobytes() for i in range(150)
    ]


def test_the_loader_reads_a_synthetic_set(beton: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.beton"
    write_synthetic(open_beton(beton), made, count=90, payloads=40)
    recipe = moco_v2(32)
    loader = build_loader(made, recipe, "ffcv", batch_size=30, seed=3, num_threads=1)
    seen = np.concatenate([batch.index.numpy() for batch in loader])
    assert sorted(seen) == list(range(90)) and not loader.faults


def test_more_payloads_than_images_are_refused(beton: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"payloads is 41; it must be in 1 … 40, the images of"):
        write_synthetic(open_beton(beton), tmp_path / "made.beton", count=90, payloads=41)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"repeats": 0}, "0 turns of sets of .* measure nothing"),
        ({"count": ()}, "give at least 1 turn, and at least one set"),
        ({"count": (639,)}, "640 images or more, 10 batches"),
        ({"photographs": Path("nowhere.beton")}, "nowhere.beton"),
    ],
)
def test_settings_that_measure_nothing_are_refused(
    beton: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises((ValueError, OSError), match=sentence):
        scale.main(dataclasses.replace(Scale(photographs=beton), **change))


def test_a_process_that_fails_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)print_turn.* ended with code 1: .*77\.beton"):
        scale._in_fresh_process(tmp_path / "77.beton", 1, 1)


def test_ratios_are_of_medians_and_none_for_zero() -> None:
    def figures(value: float) -> dict[str, Any]:
        return {name: {"median": value} for name in MEASURES} | {"index_mib": value}

    assert set(scale._ratios(figures(2), figures(5)).values()) == {2.5}
    assert set(scale._ratios(figures(0), figures(5)).values()) == {None}


@pytest.mark.slow
def test_the_whole_benchmark_on_a_small_set(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, out = tmp_path / "temporary", tmp_path / "scale.json"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    # Ten batches: as few as the benchmark takes.
    config = Scale(count=(80,), photographs=beton, repeats=1, batch_size=8, threads=1, json=out)
    result = scale.main(config)
    assert json.loads(out.read_text()) == result
    assert list(temporary.iterdir()) == [], "the synthetic set is deleted"
    assert result["benchmark"] == "scale" and result["environment"]["cores"] >= 1
    figures = result["counts"]["80"]
    for name in MEASURES:
        assert len(figures[name]["turns"]) == 1
        assert figures[name]["low"] == figures[name]["median"] == figures[name]["high"]
    assert all(figures[name]["median"] > 0 for name in MEASURES if name.endswith("_s"))
    # Four buffers of 8 × 2 views of 224 px, 2.3 MiB each, and the float views on top.
    assert figures["private_memory_mib"]["median"] > 4
    assert figures["peak_private_memory_mib"]["median"] >= figures["private_memory_mib"]["median"] - 1
    assert figures["peak_memory_mib"]["median"] >= figures["memory_mib"]["median"] - 1
    assert figures["index_mib"] == pytest.approx(48 * 80 / 2**20)
    # A set compared with itself; opening a small one may need no memory, and then there is no ratio.
    assert set(result["ratios"].values()) <= {1.0, None}
    assert result["ratios"]["open_s"] == 1
