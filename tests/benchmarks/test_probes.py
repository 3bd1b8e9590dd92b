"""The comparison of the two probes on little data, and its table in the docs."""

import json
from pathlib import Path

import pytest

from benchmarks.evidence import Evidence
from benchmarks.evidence import main as gather
from benchmarks.probes import Probes, main
from benchmarks.run_options import TABLES_PAGE, block_of, table_block

ROOT = Path(__file__).resolve().parents[2]


def test_both_probes_run_once(tmp_path: Path, programs: list[list[str]]) -> None:
    gather(
        Evidence(
            epochs=1, seeds=(0,), methods=("random",), out=tmp_path / "runs", data=tmp_path, fashion=1200
        )
    )
    programs.clear()
    page = (ROOT / TABLES_PAGE).read_bytes()
    config = Probes(
        encoders=("random-0",),
        evidence=tmp_path / "runs",
        out=tmp_path / "probes",
        data=tmp_path,
        fashion=1200,
        epochs=1,
        json=tmp_path / "probes.json",
    )
    main(config)
    assert [program[0] for program in programs] == ["train_lincls.py"] * 2
    assert main(config)["probes"] == json.loads((tmp_path / "probes.json").read_text())["probes"]
    assert len(programs) == 2
    row = json.loads((tmp_path / "probes.json").read_text())["probes"]["random-0"]
    published = json.loads((tmp_path / "probes" / "random-0" / "result.json").read_text())
    assert row["published"]["linear_top1"] == published["linear_top1"] > 0
    assert row["cached"]["linear_top1"] == max(s["top1"] for s in row["cached"]["settings"])
    assert (ROOT / TABLES_PAGE).read_bytes() == page  # a quick run does not rewrite it
    with pytest.raises(ValueError, match=r"there is no .*moco-0.*make evidence"):
        main(Probes(evidence=tmp_path / "runs", encoders=("moco-0",), data=tmp_path, fashion=1200))


def test_table() -> None:
    settings = [
        {"lr": 3.0, "weight_decay": 1e-5, "top1": 0.815},
        {"lr": 30.0, "weight_decay": 1e-5, "top1": 0.7},
        {"lr": 30.0, "weight_decay": 0.0, "top1": 0.79},
    ]
    row = {
        "published": {"linear_top1": 0.8, "linear_best_top1": 0.81, "seconds": 1234.0},
        "cached": {
            "linear_top1": 0.815,
            "linear_lr": 3.0,
            "linear_weight_decay": 1e-5,
            "seconds": 20.4,
            "settings": settings,
        },
    }
    text = table_block(
        {
            "benchmark": "probes",
            "probes": {"moco-0": row},
            "config": {"pictures": 60000, "epochs": 100},
            "environment": {"processor": "A CPU", "cores": 2},
        }
    )
    assert (
        "| moco-0 | 80.00 % | 79.00 % | 81.50 % (lr 3, weight decay 1e-05) | +1.50 | 1,234 s | 20 s |" in text
    )
    assert "+1.50 … +1.50 points" in text and "A CPU, 2 cores" in text


def test_the_page_shows_the_measured_figures() -> None:
    figures = ROOT / "benchmarks" / "results" / "probes.json"
    expected = table_block(json.loads(figures.read_text())) if figures.is_file() else "\n"
    assert block_of("probes").current(ROOT / TABLES_PAGE) == expected
    assert Probes.epochs == 100
