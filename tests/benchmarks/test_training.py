"""The training benchmark on a CPU, as far as one goes; on a GPU, its captured step against the plain one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import training
from benchmarks.training import Step, TrainingBenchmark, Way, captured, main
from pipelines import Mixing, build_loader
from pipelines.recipe import moco_v2

SMALL = TrainingBenchmark(
    quick=True, pictures=40, arch="resnet10w16", crop_px=32, queue_len=64, device="cpu", threads=1
)


def test_what_a_cpu_can_do_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample_sets: Callable[..., object]
) -> None:
    monkeypatch.setattr(training, "SampleSets", sample_sets)
    file = tmp_path / "training.json"
    ways = ("fp32",)
    main(TrainingBenchmark(**{**vars(SMALL), "json": file, "ways": ways}))
    result = json.loads(file.read_text())
    assert list(result["training"]) == list(ways)
    for row in result["training"].values():
        assert row["alone"]["median"] > 0 and row["fed"]["median"] > 0
        assert 0 <= row["data_wait_percent"] <= 100
    with pytest.raises(ValueError, match=r"cannot be measured on cpu; choose of fp32, bf16"):
        main(TrainingBenchmark(**{**vars(SMALL), "ways": ("bf16, one CUDA graph",)}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_trains_as_the_plain_one(beton: Path) -> None:
    device = torch.device("cuda")
    batch = next(iter(build_loader(beton, moco_v2(32, Mixing(grid_size=4)), batch_size=8, device=device)))
    plain, graphed = (Step(Way(), SMALL, device) for _ in range(2))
    graph = captured(graphed, batch)
    graph.replay()
    for _ in range(4):
        plain(batch)
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(graphed.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
