"""The step benchmark times the real training, and writes all figures."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import epoch
from benchmarks.epoch import OURS, OURS_ONE_BN, PLAIN, EpochSetting, Training
from benchmarks.published import plain_mixmask
from benchmarks.sample_sets import SampleSet
from benchmarks.step import Size, StepBenchmark, build_step, main
from models.batch import NUM_MIXTURES, Method
from models.encoders import build_encoder
from models.moco import MoCo
from pipelines import Batch, Mixture
from pipelines.randomness import Draw

TINY = EpochSetting("resnet10w16", crop_px=32, pictures=40, batch_size=8, epochs=1, queue_len=64)


@pytest.mark.parametrize("method", NUM_MIXTURES)
def test_both_formulations_take_the_same_steps(method: Method) -> None:
    size = Size(batch_size=4, queue_len=10, turns=1, seconds=0.1)
    ours, naive = (build_step(formulation, method, size) for formulation in ("ours", "naive"))
    for _ in range(3):
        torch.testing.assert_close(ours(), naive(), rtol=1e-5, atol=1e-5)


def test_the_clock_does_not_change_a_step() -> None:
    """The hooks of the clock change no weight and no loss."""
    generator = torch.Generator().manual_seed(0)
    query, key, mixed = torch.randn(3, 8, 3, 16, 16, generator=generator)
    row = torch.arange(8)
    batch = Batch(query, key, (Mixture(mixed, row.flip(0), torch.full((8,), 0.3)),), row, row)
    clocked = MoCo(
        lambda norm_layer: build_encoder("resnet10w16", norm_layer=norm_layer),
        method="mixmask",
        queue_len=32,
        bn_splits=2,
    )
    usual = copy.deepcopy(clocked)
    training = Training(clocked, lambda number: [batch])
    optimizer = torch.optim.SGD(usual.encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        loss = usual(batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(training.step(batch), loss.detach())
    for name, tensor in usual.state_dict().items():
        torch.testing.assert_close(clocked.state_dict()[name], tensor)
    assert all(seconds > 0 for seconds in training.seconds.values())


@pytest.fixture
def tests_images(picture_folder: Path, beton: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark takes the tests' images instead of making its own."""

    class Sets:
        def __init__(self, data: Path, num: int, progress: Callable[[str], None]) -> None:
            self.pass_through = SampleSet(picture_folder, beton, shards, "made for tests")

    monkeypatch.setattr(epoch, "SampleSets", Sets)


@pytest.mark.usefixtures("tests_images")
def test_a_quick_run_has_all_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "step.json"
    small = dataclasses.replace(TINY, crop_px=16, bn_splits=2)
    monkeypatch.setattr("benchmarks.step.EPOCHS", [TINY, small])
    config = StepBenchmark(
        quick=True,
        json=out,
        methods=("mixmask",),
        batch_size=8,
        queue_len=256,
        turns=2,
        seconds=0.05,
    )
    result = main(config)
    assert json.loads(out.read_text()) == result
    assert result["benchmark"] == "step" and result["environment"]["cores"] >= 1
    assert result["config"]["queue_len"] == 256
    _check_step(result["step"])
    assert [setting["crop_px"] for setting in result["epoch"]["settings"]] == [32, 16]
    for setting in result["epoch"]["settings"]:
        _check_setting(setting)
    first = result["epoch"]["settings"][0]
    assert result["epoch"]["speedup"] == first["speedup"]
    assert result["epoch"]["split"][OURS] == first["rows"][OURS]["split"]


def _check_step(step: dict[str, Any]) -> None:
    figures = step["methods"]["mixmask"]
    for name in ("ours", "naive"):
        assert len(figures[name]["turns"]) == 2
        assert 0 < figures[name]["low"] <= figures[name]["median"] <= figures[name]["high"]
        # Gradients of the head alone take 512² + 512 · 128 floats.
        assert figures[name]["peak_memory_mib"] > 1
    for key in ("time_vs_naive", "peak_memory_vs_naive"):
        assert step[key] == figures[key] > 0


def _check_setting(setting: dict[str, Any]) -> None:
    assert list(setting["rows"]) == [PLAIN, OURS, OURS_ONE_BN]
    for row in setting["rows"].values():
        assert len(row["turns"]) == 1
        assert set(row["split"]) == {"data", "encoder", "loss"}
        assert all(seconds >= 0 for seconds in row["split"].values())
        assert sum(row["split"].values()) == pytest.approx(row["median"], abs=0.02)
        # Two terms of cross-entropy over 65 logits.
        assert 4 < row["loss"] < 2 * 10
    assert setting["speedup"] > 0 and setting["speedup_one_bn"] > 0


def test_a_published_batch_is_mixed_by_one_mask_of_rectangles() -> None:
    query = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 32, 32)
    for seed in range(20):
        batch = plain_mixmask(query, query, EpochSetting().recipe.mixing, Draw(0, seed, np.arange(1)))
        (mixture,) = batch.mixtures
        own = mixture.images == query
        assert torch.equal(own | (mixture.images == query.flip(0)), torch.ones_like(own))
        assert mixture.lam.tolist() == pytest.approx([own[0, 0].float().mean().item()] * 4)
        assert 0.5 <= mixture.lam[0] < 1
        assert torch.equal(mixture.partner, torch.tensor([3, 2, 1, 0]))


def test_settings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="batch of 1"):
        StepBenchmark(batch_size=1).size()


def test_a_quick_run_never_replaces_a_full_runs_figures(tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text('{"quick": false}')
    with pytest.raises(ValueError, match="holds a full run's figures"):
        main(StepBenchmark(quick=True, json=tmp_path / "step.json"))
