"""The demo in half a minute: the same programs, in one process, on fewer images."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.report.__main__ import ReportConfig
from benchmarks.report.__main__ import main as draw
from examples.demo import Demo, main

KEYS = {
    *("knn_top1_random", "knn_top1_mixmask", "linear_top1_random", "linear_top1_mixmask"),
    *("loader_samples_per_s", "torchvision_samples_per_s", "data_wait_fraction"),
}


@pytest.mark.slow
def test_demo_runs_every_step(tmp_path: Path, programs: list[list[str]]) -> None:
    out = tmp_path / "demo"
    main(Demo(out=out, data=tmp_path / "data", photographs=96, fashion=1200, epochs=1, loader_seconds=0.5))
    assert len(programs) == 9
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= KEYS
    # Chance is 0.1. Whether pretraining beats the random encoder is checked by the full demo only.
    assert all(0.3 < summary[key] < 1 for key in KEYS if "top1" in key)
    assert 0 <= summary["data_wait_fraction"] < 1
    assert summary["loader_samples_per_s"] > 0 and summary["torchvision_samples_per_s"] > 0
    with Image.open(out / "preview.png") as sheet:
        assert min(sheet.size) > 900

    report = tmp_path / "report.html"
    draw(ReportConfig(results=out, demo=out, out=report))
    page = report.read_text()
    assert "torchvision + PIL" in page and 'class="fill' in page
    assert not re.search(r'(src|href)="?https?:', page), "the page must need no network"
