"""The race: all start alike, what is written follows from what was measured, a missing rival is named."""

import dataclasses
import importlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import race, race_ours
from benchmarks.race import Race
from benchmarks.race_figures import LIGHTLY, LIGHTLY_AT_BEST, MIXMASK, OURS, figures
from benchmarks.race_ours import Setting
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
    """A folder with both compiled sets: stripes whose width tells the class, and noise."""
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    pairs = {}
    for split, count in (("train", 300), ("test", 60)):
        labels = (np.arange(count) % 4).astype(np.uint8)
        stripes = (np.arange(28) // (1 + labels[:, None]) % 2)[:, None, :] * 160
        pictures = (stripes + rng.integers(0, 90, (count, 28, 28))).astype(np.uint8)
        pairs[split] = IdxPair(
            _write_idx(folder / f"{split}-images", pictures), _write_idx(folder / f"{split}-labels", labels)
        )
    compile_fashion_mnist(folder, pairs, workers=1)
    return folder


def test_setting_is_the_preset() -> None:
    """Benchmarks may not import presets, so the numbers stand twice; here they are held together."""
    preset, setting = fashion(Path("x.beton")), Setting()
    assert dataclasses.replace(setting.recipe, mixing=setting.mixing) == preset.recipe()
    names = {"dim": "moco_dim", "queue_len": "moco_k", "momentum": "moco_m", "temperature": "moco_t"}
    for field in dataclasses.fields(Setting):
        if field.name != "recipe":
            expected = getattr(preset, names.get(field.name, field.name))
            assert getattr(setting, field.name) == expected, field.name
    assert preset.mlp and preset.cos and preset.splits(1) == setting.bn_splits


def test_learning_rate_follows_the_wall_time() -> None:
    assert race_ours._lr_after(0.0, 4.0, 0.06) == 0.06
    assert race_ours._lr_after(1.0, 4.0, 0.06) == pytest.approx(0.03 * (1 + math.cos(math.pi / 4)))
    assert race_ours._lr_after(3.9999, 4.0, 0.06) < 1e-6


def test_tiny_race(tiny_fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightly")
    # Processes of a DataLoader take seconds to start.
    monkeypatch.setattr("benchmarks.race_lightly.documented_hands", lambda: (0, 2))
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
    assert result["config"]["bn_splits"] == Setting.bn_splits and result["config"]["recipe"]["crop_px"] == 32


def test_both_models_start_alike_and_minimise_the_same_loss(tiny_fashion: Path) -> None:
    pytest.importorskip("lightly")
    from benchmarks.race_lightly import LightlyMoCo, documented, lightly

    setting = Setting(bn_splits=1)
    mine = race_ours.ours("moco", setting, tiny_fashion / "fashion-mnist-train.beton", 3)
    theirs = lightly(setting, tiny_fashion / "fashion-mnist-train.beton", (0, 1), 3)
    queue_KD = torch.nn.functional.normalize(torch.randn(setting.queue_len, setting.dim), dim=1)
    assert isinstance(theirs.model, LightlyMoCo)
    other = lightly(documented(setting), tiny_fashion / "fashion-mnist-train.beton", (0, 1), 3).encoder
    for name, tensor in theirs.encoder.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    theirs.model.criterion.memory_bank.bank.copy_(queue_KD)
    mine.model.get_buffer("queue_KD").copy_(queue_KD)
    query_N3SS, key_N3SS = torch.randn(2, 8, 3, 32, 32)
    nothing = torch.zeros(8, dtype=torch.int64)
    for _ in range(2):  # the second time with the first keys in the queue
        expected = theirs.loss([query_N3SS, key_N3SS])
        torch.testing.assert_close(mine.loss(Batch(query_N3SS, key_N3SS, (), nothing, nothing)), expected)


def test_lightly_is_given_the_recipe() -> None:
    pytest.importorskip("lightly")
    from benchmarks.race_lightly import transform_of

    recipe = Setting().recipe
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


def test_documented_views_are_those_of_the_transform_as_it_comes() -> None:
    pytest.importorskip("lightly")
    from lightly.transforms import MoCoV2Transform

    from benchmarks.race_lightly import documented, transform_of

    setting = documented(Setting())
    (asked, _), (comes, _) = transform_of(setting.recipe).transforms, MoCoV2Transform(32).transforms
    told, expected = (
        re.sub(" object at 0x[0-9a-f]+", "", repr(view)) for view in (asked.transform, comes.transform)
    )
    assert told == expected and "RandomResizedCrop" in told and "Normalize" in told
    blurs = [next(t for t in v.transform.transforms if hasattr(t, "sigmas")) for v in (asked, comes)]
    assert (blurs[0].prob, blurs[0].sigmas) == (blurs[1].prob, blurs[1].sigmas)
    assert dataclasses.replace(setting, recipe=Setting().recipe) == Setting()
    assert setting.recipe.center_share == 1


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


def test_refuses_what_is_no_race(tiny_fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
