"""The GPU benchmark where there is none: it refuses; and all but the GPU, with the CPU in its place."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import benchmarks.gpu as program
from benchmarks import gpu_memory
from benchmarks.gpu import GPUBenchmark, main
from benchmarks.loader_tables import print_gpu_tables
from benchmarks.peers.contract import DALI_GPU_ONCE, TORCHVISION_GPU, Job
from benchmarks.report.results import read_gpu
from benchmarks.run_options import Scale
from engine import cli
from pipelines.recipe import moco_v2
from tests.benchmarks.conftest import Sets
from tests.benchmarks.test_report import gpu_json


def test_without_a_gpu_it_refuses_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "gpu.json"
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: main(GPUBenchmark(json=out, data=tmp_path)))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sees no GPU" in line and "make bench" in line
    assert list(tmp_path.iterdir()) == [], "nothing is made before"


def test_batches_are_those_of_a_gpu() -> None:
    assert GPUBenchmark().scale() == Scale(pictures=2000, batch_size=256, turns=5, seconds=4.0)
    assert GPUBenchmark(quick=True).scale() == Scale(pictures=128, batch_size=32, turns=2, seconds=0.5)


@pytest.mark.needs("nvidia.dali")
def test_a_run_with_the_cpu_in_place_of_the_gpu(
    sample_sets: Callable[..., Sets], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def memory(sources: Any, peer: str, work: str, job: Job, device: torch.device) -> dict[str, float]:
        asked.append((peer, work))
        return {"torch_mib": 12.5, "gpu_mib": 100.0}

    monkeypatch.setattr(program, "the_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(program, "environment", lambda: gpu_json()["environment"])
    monkeypatch.setattr(program, "SampleSets", sample_sets)
    monkeypatch.setattr(program, "CROP_PX", 32)
    monkeypatch.setattr(gpu_memory, "measure", memory)
    out = tmp_path / "gpu.json"
    sizes: dict[str, Any] = {"pictures": 40, "batch_size": 8, "turns": 1, "seconds": 0.01, "threads": 1}
    returned = main(GPUBenchmark(json=out, peers=("torchvision", "dali"), **sizes))
    assert json.loads(out.read_text()) == json.loads(json.dumps(returned))
    figures = read_gpu(out)
    assert figures.tables.keys() == {"crops", "recipe"} and not figures.quick
    for work, rates in figures.tables.items():
        assert rates.keys() >= {TORCHVISION_GPU, DALI_GPU_ONCE} and len(rates) == 3
        for rate in rates.values():
            assert rate.median > 0 and rate.configured and (rate.torch_mib, rate.gpu_mib) == (12.5, 100.0)
            assert rate.cpu_share is not None and rate.cpu_share > 0
            assert (rate.mean_error is not None) == (work == "crops")
            assert (rate.name, work) in asked
    with pytest.raises(ValueError, match="holds a full run's figures"):
        main(GPUBenchmark(json=out, quick=True))


def test_memory_is_the_least_that_was_free_less_than_before(
    picture_folder: Path, beton: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mib = 2**20
    # Before it is opened, after each batch, at the end; in the middle it needs most.
    free = iter([900, *[800] * 7, 650, *[800] * 8, 790])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free) * mib, 1000 * mib))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 40 * mib)
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    job = Job(picture_folder, beton, shards, moco_v2(16), 4, 1)
    taken = gpu_memory._measure(("torchvision",), TORCHVISION_GPU, "crops", job, torch.device("cpu"))
    assert taken == {"torch_mib": 40.0, "gpu_mib": 250.0}
    assert next(free, None) is None, "it looks after every batch"


def test_the_terminal_shows_all_that_was_measured() -> None:
    told = io.StringIO()
    print_gpu_tables(Console(file=told, width=200), gpu_json())
    text = told.getvalue()
    assert "crops on Test GPU; 16 threads" in text and "recipe on Test GPU" in text
    for cell in ("12000", "31%", "1536", "2048", "0.31", "17.00"):
        assert cell in text
