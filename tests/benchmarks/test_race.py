"""The race: all entries start from the same weights, and the JSON follows from what was measured."""

import dataclasses
import importlib
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import race
from benchmarks.race import LIGHTLY, LIGHTLY_AT_BEST, MIXMASK, OURS, Race, figures, with_method
from dataset_tools.fashion_mnist import IdxPair, compile_fashion_mnist
from pipelines import Batch
from presets import fashion


def _write_idx(path: Path, content: NDArray[np.uint8]) -> Path:
    path.write_bytes(
        bytes([0, 0, 8, content.ndim]) + np.array(content.shape, ">i4").tobytes() + content.tobytes()
    )
    return path


@pytest.fixture(scope="session")
def tiny_fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both compiled sets: stripes with a width per class, and noise."""
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    pairs = {}
    for split, count in (("train", 300), ("test", 60)):
        labels = (np.arange(count) % 4).astype(np.uint8)
        stripes = (np.arange(28) // (1 + labels[:, None]) % 2)[:, None, :] * 160
        images = (stripes + rng.integers(0, 90, (count, 28, 28))).astype(np.uint8)
        pairs[split] = IdxPair(
            _write_idx(folder / f"{split}-images", images), _write_idx(folder / f"{split}-labels", labels)
        )
    compile_fashion_mnist(folder, pairs, workers=1)
    return folder


def test_learning_rate_follows_the_wall_time() -> None:
    assert race._lr_after(0.0, 4.0, 0.06) == 0.06
    assert race._lr_after(1.0, 4.0, 0.06) == pytest.approx(0.03 * (1 + math.cos(math.pi / 4)))
    assert race._lr_after(3.9999, 4.0, 0.06) < 1e-6


def test_tiny_race(tiny_fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightly")
    # Processes of a DataLoader take seconds to start.
    monkeypatch.setattr("benchmarks.race_lightly.documented_division", lambda: (0, 2))
    out = tmp_path / "race.json"
    race.main(Race(seconds=0.5, data=tiny_fashion, json=out, hands=(0, 1)))
    result = json.loads(out.read_text())
    measured = result["race"]
    runners = measured["runners"]
    assert set(runners) == {OURS, MIXMASK, LIGHTLY, LIGHTLY_AT_BEST}
    # The same weights at the start, seen through the same normalisation.
    assert len({row["knn_before"] for name, row in runners.items() if name != LIGHTLY}) == 1
    for row in runners.values():
        assert row["seconds"] >= 0.5 and row["samples"] >= 128 and row["samples"] % 128 == 0
        assert row["samples_per_s"] == pytest.approx(row["samples"] / row["seconds"])
        assert 0.25 < row["knn_after"] <= 1
        assert row["spread"] is None and row["configured"]
    speed = runners[OURS]["samples_per_s"] / runners[LIGHTLY]["samples_per_s"]
    assert measured["samples_per_s_vs_lightly"] == pytest.approx(speed)
    assert result["environment"]["versions"]["lightly"]
    _check_preset(result["config"])


def _check_preset(config: dict[str, Any]) -> None:
    """The settings in the JSON are those of the preset."""
    preset = fashion(Path("x.beton"))
    recipe = with_method(preset, "moco").recipe()
    assert config["recipe"] == json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert config["mixing"] == dataclasses.asdict(preset.mixing)
    names = {"dim": "moco_dim", "queue_len": "moco_k", "momentum": "moco_m", "temperature": "moco_t"}
    same = ("arch", "bn_splits", "batch_size", "lr", "sgd_momentum", "weight_decay")
    for key, name in (names | {name: name for name in same}).items():
        assert config[key] == getattr(preset, name), key
    assert preset.mlp and preset.cos and preset.splits(1) == config["bn_splits"]
    assert config["recipe"]["crop_px"] == 32


def test_both_models_start_from_the_same_weights_and_compute_the_same_loss(tiny_fashion: Path) -> None:
    pytest.importorskip("lightly")
    from benchmarks import race_lightly

    preset = dataclasses.replace(fashion(tiny_fashion / "fashion-mnist-train.beton"), bn_splits=1)
    mine = race.ours(with_method(preset, "moco"), 3)
    theirs = race.lightly(race_lightly, preset, (0, 1), 3)
    queue_KD = torch.nn.functional.normalize(torch.randn(preset.moco_k, preset.moco_dim), dim=1)
    assert isinstance(theirs.model, race_lightly.LightlyMoCo)
    other = race.lightly(race_lightly, race_lightly.documented(preset), (0, 1), 3).model.encoder_q
    for name, tensor in theirs.model.encoder_q.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    theirs.model.criterion.memory_bank.bank.copy_(queue_KD)
    mine.model.get_buffer("queue_KD").copy_(queue_KD)
    query_N3SS, key_N3SS = torch.randn(2, 8, 3, 32, 32)
    nothing = torch.zeros(8, dtype=torch.int64)
    for _ in range(2):  # the second time with the first keys in the queue
        expected, _ = theirs.model([query_N3SS, key_N3SS])
        loss, _ = mine.model(Batch(query_N3SS, key_N3SS, (), nothing, nothing))
        torch.testing.assert_close(loss, expected)


def test_lightly_gets_the_numbers_of_the_recipe() -> None:
    pytest.importorskip("lightly")
    from benchmarks.race_lightly import transform_of

    recipe = fashion(Path("x.beton")).recipe()
    view, same = transform_of(recipe).transforms
    assert view is same
    crop, flip, upright, turn, jitter, grey, blur, _, normalise = view.transform.transforms
    assert (crop.size, crop.scale, crop.ratio) == ((32, 32), recipe.crop_scale, recipe.crop_ratio)
    assert (flip.p, upright.p, turn.prob) == (0.5, 0.0, 0.0)
    assert (jitter.p, grey.p, blur.prob) == (0.8, 0.2, 0.0)
    (colours,) = jitter.transforms
    assert colours.brightness == colours.contrast == colours.saturation == pytest.approx((0.6, 1.4))
    assert colours.hue == pytest.approx((-0.1, 0.1))
    assert tuple(normalise.mean) == recipe.mean and tuple(normalise.std) == recipe.std


def test_documented_views_are_the_defaults_of_the_transform() -> None:
    pytest.importorskip("lightly")
    from lightly.transforms import MoCoV2Transform

    from benchmarks.race_lightly import documented, transform_of

    preset = fashion(Path("x.beton"))
    changed = documented(preset)
    (ours, _), (default, _) = transform_of(changed.recipe()).transforms, MoCoV2Transform(32).transforms
    got, expected = (
        re.sub(" object at 0x[0-9a-f]+", "", repr(view)) for view in (ours.transform, default.transform)
    )
    assert got == expected and "RandomResizedCrop" in got and "Normalize" in got
    blurs = [next(t for t in v.transform.transforms if hasattr(t, "sigmas")) for v in (ours, default)]
    assert (blurs[0].prob, blurs[0].sigmas) == (blurs[1].prob, blurs[1].sigmas)
    assert dataclasses.replace(changed, views=preset.views) == preset
    assert changed.recipe().center_share == 1


def test_figures_over_seeds() -> None:
    def run(rate: float, after: float) -> dict[str, float]:
        return {
            "samples_per_s": rate,
            "samples": 2 * rate,
            "seconds": 2.0,
            "knn_before": 0.6,
            "knn_whole_before": 0.7,
            "knn_whole_after": after + 0.1,
            "knn_after": after,
        }

    runs = {
        OURS: [run(900, 0.80), run(1100, 0.82)],
        MIXMASK: [run(500, 0.79), run(500, 0.79)],
        LIGHTLY: [run(240, 0.72), run(260, 0.74)],
        LIGHTLY_AT_BEST: [run(400, 0.75), run(400, 0.75)],
    }
    found = figures(runs, dict.fromkeys(runs, "so"))
    assert found["samples_per_s_vs_lightly"] == 4 and found["mixmask_samples_per_s_vs_lightly"] == 2
    assert found["samples_per_s_vs_lightly_at_best"] == 2.5
    assert found["knn_gain_over_lightly"] == pytest.approx(8)
    assert found["knn_gain_over_lightly_at_best_whole_bank"] == pytest.approx(6)
    assert found["mixmask_knn_gain_over_lightly"] == pytest.approx(6)
    assert found["runners"][OURS]["spread"]["knn_after"] == pytest.approx(0.02 / 2**0.5)


def test_settings_that_measure_nothing_are_refused(
    tiny_fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in (Race(seconds=0.0), Race(seeds=()), Race(hands=(-1, 1))):
        with pytest.raises(ValueError, match="make no race"):
            race.main(config)
    full = tmp_path / "race.json"
    full.write_text('{"quick": false}')
    with pytest.raises(ValueError, match="full run's figures"):
        race.main(Race(quick=True, json=full, data=tiny_fashion))
    monkeypatch.delitem(sys.modules, "benchmarks.race_lightly", raising=False)
    monkeypatch.delattr(importlib.import_module("benchmarks"), "race_lightly", raising=False)
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    with pytest.raises(ImportError, match=r"lightly.*`make setup` installs it"):
        race.main(Race(data=tiny_fashion))
