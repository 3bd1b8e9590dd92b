"""The evidence on little data: what it writes, and that it runs nothing twice."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from benchmarks.evidence import PROBES, Evidence, main


def test_every_run_is_made_once_and_summarised(tmp_path: Path, programs: list[list[str]]) -> None:
    config = Evidence(
        epochs=1,
        seeds=(0, 1),
        methods=("random", "mixmask"),
        out=tmp_path / "runs",
        data=tmp_path,
        fashion=1200,
        json=tmp_path / "evidence.json",
    )
    main(config)
    assert [program[0] for program in programs] == ["-m", *["train_pretrain.py", "train_lincls.py"] * 4]
    result = json.loads((tmp_path / "evidence.json").read_text())
    for method in config.methods:
        summary = result["evidence"][method]
        assert [run["seed"] for run in summary["runs"]] == [0, 1]
        for name in PROBES:
            first, second = (run[name] for run in summary["runs"])
            assert 0.1 < min(first, second) <= max(first, second) < 1
            assert summary[name]["mean"] == pytest.approx((first + second) / 2, abs=1e-5)
            assert summary[name]["std"] == pytest.approx(abs(first - second) / math.sqrt(2), abs=1e-5)
    (epoch,) = result["evidence"]["mixmask"]["runs"][0]["curve"]
    assert epoch["epoch"] == 1 and 0 < epoch["knn_top1"] < 1 and epoch["loss"] > epoch["loss_clean"] > 0
    assert result["evidence"]["random"]["runs"][0]["curve"] == []

    # One run's folder is missing, another run was not probed yet; only these two continue.
    shutil.rmtree(tmp_path / "runs" / "random-1")
    (tmp_path / "runs" / "mixmask-0" / "run.json").unlink()
    programs.clear()
    again = main(config)
    assert [program[0] for program in programs] == [
        "train_lincls.py",
        "train_pretrain.py",
        "train_lincls.py",
    ]
    assert again["evidence"] == json.loads(json.dumps(result["evidence"]))


def test_a_folder_of_other_runs_is_refused(tmp_path: Path, programs: list[list[str]]) -> None:
    config = Evidence(epochs=1, seeds=(0,), methods=("random",), out=tmp_path, data=tmp_path, fashion=1200)
    main(config)
    with pytest.raises(ValueError, match=r"random-0 holds a run of other settings \(epochs was 1, is 2\)"):
        main(dataclasses.replace(config, epochs=2))
    (tmp_path / "random-0" / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"random-0 does not say what it holds, in settings\.json"):
        main(config)
    with pytest.raises(ValueError, match="take methods of random, moco"):
        Evidence(methods=("mscn",))
