"""The loader benchmark's arithmetic: turns, ratios, sets, the JSON."""

import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import benchmarks.loader as program
from benchmarks import sample_sets as sample_sets_module
from benchmarks import stages, timing
from benchmarks.loader import LoaderBenchmark, main
from benchmarks.peers.contract import (
    DALI_ONCE,
    DALI_TWICE,
    DECODE_LIMIT,
    FFCV,
    OURS,
    OURS_DALI,
    OURS_ON_SHARDS,
    OURS_STREAM,
    SPDL_FFMPEG,
    SPDL_TORCHVISION,
    TORCHVISION_PIL,
    TORCHVISION_V2,
)
from benchmarks.ratios import (
    COMPILED,
    CONVERT_FFCV,
    CONVERT_OURS,
    EAGER,
    FUSED,
    RAW_FFCV,
    RAW_JPEG,
    RAW_OURS,
    ratios,
)
from benchmarks.run_options import Scale
from benchmarks.sample_sets import QUALITY, REENCODED_SIDE_PX, SampleSet, SampleSets, reencode
from benchmarks.timing import Runner, Turns, summary, take_turns
from dataset_tools.commands import Convert
from dataset_tools.convert import Sharding, convert
from dataset_tools.sources import FolderSource
from pipelines.sets.manifest import Manifest
from tests.benchmarks.conftest import Sets
from tests.conftest import photograph_like


def _rows(**medians: float) -> dict[str, dict[str, Any]]:
    return {name: {"median": median} for name, median in medians.items()}


def test_ratios_are_of_medians_and_of_the_faster_of_two_ways() -> None:
    crops = {
        OURS: 1500.0,
        TORCHVISION_PIL: 250.0,
        TORCHVISION_V2: 750.0,
        FFCV: 600.0,
        DALI_ONCE: 500.0,
        DALI_TWICE: 400.0,
        SPDL_FFMPEG: 300.0,
        SPDL_TORCHVISION: 1000.0,
        DECODE_LIMIT: 2000.0,
    }
    recipe = {OURS: 1000.0, TORCHVISION_PIL: 125.0, DALI_ONCE: 200.0}
    tables = {
        "reencoded": {"crops": _rows(**crops), "recipe": _rows(**recipe)},
        # The ratios are of the main set; this one must not matter.
        "pass_through": {"crops": _rows(**dict.fromkeys(crops, 1.0))},
        "raw": {
            RAW_OURS: {"median": 4000.0, "bytes": 50},
            RAW_JPEG: {"median": 1600.0, "bytes": 30},
            RAW_FFCV: {"median": 800.0, "bytes": 100},
        },
        "scaling": _rows(**{"1": 800.0, "8": 5600.0}),
        "convert": _rows(**{CONVERT_OURS: 1600.0, CONVERT_FFCV: 400.0}),
        "photometric": _rows(**{FUSED: 6000.0, COMPILED: 1000.0, EAGER: 100.0}),
    }
    assert ratios(tables) == {
        "crops": {
            "vs_ffcv_decode_per_view": 2.5,
            "vs_dali_cpu": 3.0,
            "vs_torchvision_pil": 6.0,
            "vs_torchvision_v2": 2.0,
            "vs_spdl": 1.5,
            "fraction_of_decode_limit": 0.75,
        },
        "recipe": {"vs_dali_cpu": 5.0, "vs_torchvision_pil": 8.0},
        "raw_tier": {"vs_ffcv_raw": 5.0, "vs_jpeg_tier": 2.5, "bytes_vs_ffcv_raw": 0.5},
        "scaling": {"threads_8_over_1": 7.0},
        "convert": {"vs_ffcv_writer": 4.0},
        "photometric": {"vs_compiled_torch": 6.0},
    }


def test_our_other_backends_have_ratios_of_their_own_and_change_no_other() -> None:
    ours_only = {OURS: 1500.0, DALI_ONCE: 500.0, DALI_TWICE: 400.0}
    ways = {OURS_ON_SHARDS: 1200.0, OURS_DALI: 1000.0, OURS_STREAM: 900.0}
    before = ratios({"reencoded": {"crops": _rows(**ours_only), "recipe": _rows(**ours_only)}})
    crops, recipe = ours_only | ways, ours_only | {OURS_DALI: 750.0}
    after = ratios({"reencoded": {"crops": _rows(**crops), "recipe": _rows(**recipe)}})
    assert after.pop("dali_backend") == {
        "crops_vs_dali_cpu": 2.0,
        "recipe_vs_dali_cpu": 1.5,
        "own_reader_over_own_order": 0.9,
        "shards_over_beton": 0.8,
    }
    assert after == before == {"crops": {"vs_dali_cpu": 3.0}, "recipe": {"vs_dali_cpu": 3.0}}


def test_ratios_of_what_was_not_measured_are_absent() -> None:
    tables = {"reencoded": {"crops": _rows(**{OURS: 10.0, FFCV: 5.0})}, "scaling": _rows(**{"1": 3.0})}
    assert ratios(tables) == {"crops": {"vs_ffcv_decode_per_view": 2.0}}
    assert ratios({}) == {}


class _Batches:
    """Batches without end; each call is appended to a log."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def __iter__(self) -> Iterator[object]:
        return self

    def __next__(self) -> object:
        self._log.append(self._name)
        return None

    def close(self) -> None:
        self._log.append(f"{self._name} closed")


def test_turns_alternate_drain_queues_and_end_with_whole_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    # The clock advances one second per reading; a turn of two seconds reads it at its start and twice more.
    clock, slept = itertools.count(), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    runners = {
        "a": Runner(lambda: _Batches("a", log), items=10, queued=3, round=2),
        "b": Runner(lambda: _Batches("b", log), items=4),
    }
    reported: list[str] = []
    turns = Turns(2, 2.0)
    rates = take_turns(runners, turns, reported.append)
    # a: two rounds of two batches of ten in two seconds; b: two batches of four.
    assert rates == {"a": [20.0, 20.0], "b": [4.0, 4.0]}
    opening, warm_up, turn = ["a", "b"], ["a"] * (3 + 2) + ["b"], ["a"] * (3 + 4) + ["b"] * 2
    assert log == [*opening, *warm_up, *turn, *turn, "b closed", "a closed"]
    assert slept[0] > 3 * 10 / 20 and slept[1] == 0
    assert len(reported) == timing.num_steps(runners, turns)
    with pytest.raises(ValueError, match="measure nothing"):
        Turns(0, 1.0)


def test_a_turn_ends_when_the_device_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    runner = Runner(lambda: _Batches("a", log), items=10, queued=1, settle=lambda: log.append("settled"))
    (rate,) = take_turns({"a": runner}, Turns(1, 2.0), lambda name: None)["a"]
    # Two batches of ten by the second reading of the clock, and one second more until all is done.
    assert rate == 2 * 10 / 3
    # Queued batches are taken, and the device is waited for, before the clock starts.
    assert log[-6:] == ["a", "settled", "a", "a", "settled", "a closed"]


def test_summary_keeps_every_turn() -> None:
    assert summary([3.0, 1.0, 2.004]) == {"median": 2.0, "low": 1.0, "high": 3.0, "turns": [3.0, 1.0, 2.0]}


def test_given_options_override_the_defaults_of_quick_and_full() -> None:
    quick = Scale(pictures=128, batch_size=16, turns=2, seconds=0.5)
    assert LoaderBenchmark().scale() == Scale(pictures=2000, batch_size=64, turns=5, seconds=4.0)
    assert LoaderBenchmark(quick=True).scale() == quick
    given = LoaderBenchmark(quick=True, turns=3, seconds=0.1).scale()
    assert given == replace(quick, turns=3, seconds=0.1)
    with pytest.raises(ValueError, match=r"batch of 9 pictures .* set of 8"):
        LoaderBenchmark(pictures=8, batch_size=9).scale()


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    root = tmp_path / "photographs"
    (root / "train" / "bird").mkdir(parents=True)
    for name, size in (("small", (300, 200)), ("large", (640, 480))):
        photograph_like(1, *size).save(root / "train" / "bird" / f"{name}.JPEG", quality=97)
    (root / "photographs.json").write_text('{"count": 2, "seed": 0}\n')
    return root


def test_images_are_reencoded_by_pil_once(photographs: Path) -> None:
    target = reencode(photographs, photographs.with_name("again"))
    for name, size in (("small", (300, 200)), ("large", (REENCODED_SIDE_PX, 375))):
        with Image.open(target / "train" / "bird" / f"{name}.JPEG") as image:
            assert image.size == size
            expected = io.BytesIO()
            photograph_like(1, *size).save(expected, "JPEG", quality=QUALITY, subsampling="4:2:0")
            with Image.open(expected) as other:
                assert image.quantization == other.quantization
                assert [layer[1:3] for layer in image.layer] == [layer[1:3] for layer in other.layer]
    marker = target / "reencoded.json"
    made = marker.stat().st_mtime_ns
    assert reencode(photographs, target) == target and marker.stat().st_mtime_ns == made
    (photographs / "photographs.json").write_text('{"count": 2, "seed": 1}\n')
    assert reencode(photographs, target) == target and marker.stat().st_mtime_ns > made


def test_failed_reencoding_leaves_no_files(photographs: Path) -> None:
    (photographs / "train" / "bird" / "torn.JPEG").write_bytes(b"\xff\xd8\xff torn")
    with pytest.raises(OSError, match="torn"):
        reencode(photographs, photographs.with_name("again"))
    assert [path.name for path in photographs.parent.iterdir()] == ["photographs"]


def test_sets_are_compiled_into_a_file_and_shards_once(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def compiled(command: str, source: Path, target: Path, *options: object) -> None:
        made.append(target.name)
        sharding = Sharding(shard_size=8) if target.suffix == ".shards" else None
        convert(FolderSource(source), target, workers=1, overwrite=True, sharding=sharding)

    monkeypatch.setattr(sample_sets_module, "dataset_tools", compiled)

    def reencoded() -> SampleSet:
        return SampleSets(photographs.parent, 2, lambda what: None).reencoded

    pictures = reencoded()
    assert made == ["photographs-q86.beton", "photographs-q86.shards"]
    manifests = [Manifest.read(path) for path in (pictures.beton, pictures.shards)]
    assert [manifest and manifest.format for manifest in manifests] == ["beton", "shards"]
    reencoded()
    assert len(made) == 2
    os.utime(pictures.shards / "set.json", (0, 0))  # older than the pictures
    reencoded()
    assert made[2:] == ["photographs-q86.shards"]


def test_our_converter_prints_its_pace_as_the_benchmark_parses_it(
    picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Convert(picture_folder, tmp_path / "x.beton", workers=1).run()
    (pace,) = stages._PACE.findall(capsys.readouterr().out)
    assert float(pace.replace(",", "")) > 0


@pytest.mark.needs("nvidia.dali", "simplejpeg")
def test_the_json_has_the_keys_that_reports_read(
    sample_sets: Callable[..., Sets], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "SampleSets", sample_sets)
    out = tmp_path / "results" / "loader.json"
    config = LoaderBenchmark(
        json=out,
        data=tmp_path,
        pictures=40,
        batch_size=8,
        turns=1,
        seconds=0.01,
        threads=1,
        peers=("ours-dali", "decode"),
        parts=("reencoded-crops", "scaling", "stages"),
    )
    returned = main(config)
    result = json.loads(out.read_text())
    assert result == json.loads(json.dumps(returned))
    assert result["benchmark"] == "loader" and result["quick"] is False
    assert result["config"].keys() == {"threads", "batch_size", "crop_px", "turns", "seconds"}
    assert result["environment"]["versions"].keys() >= {"nvidia-dali-cuda130", "spdl", "simplejpeg"}
    assert result["sets"]["reencoded"].keys() >= {"pictures", "mean_kb", "how"}
    assert result["sets"]["reencoded"]["pictures"] == 40
    rows = result["tables"]["reencoded"]["crops"]
    assert rows.keys() == {OURS, OURS_ON_SHARDS, OURS_DALI, OURS_STREAM, DECODE_LIMIT}
    rate = {"median", "low", "high", "turns"}
    assert all(
        row.keys() >= {*rate, "antialiased", "mean_error", "max_error", "configured"} for row in rows.values()
    )
    assert all(row["mean_error"] < 1 for name, row in rows.items() if name != DECODE_LIMIT)
    assert rows[DECODE_LIMIT]["mean_error"] is None
    assert result["tables"]["scaling"].keys() == {"1"} and result["tables"]["scaling"]["1"].keys() == rate
    assert result["stages"] and all(micros > 0 for micros in result["stages"].values())
    assert result["crops"].keys() == {"fraction_of_decode_limit"} and "scaling" not in result
    assert result["dali_backend"].keys() == {"own_reader_over_own_order", "shards_over_beton"}
    assert result["left_out"]["recipe"].keys() == {DECODE_LIMIT}
