"""The demo in a minute: the same programs on little data."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    *("knn_top1_random", "knn_top1_mixmask", "linear_top1_random", "linear_top1_mixmask"),
    *("loader_samples_per_s", "torchvision_samples_per_s", "data_wait_fraction"),
}


@pytest.mark.slow
def test_demo_goes_the_whole_way(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    small = ["--photographs", "96", "--fashion", "3000", "--epochs", "1", "--loader-seconds", "0.5"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.demo",
            *small,
            "--out",
            str(out),
            "--data",
            str(tmp_path / "data"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= KEYS
    # Ten classes: chance is 0.1. So short a training need not beat the random encoder; the whole demo must.
    assert all(0.3 < summary[key] < 1 for key in KEYS if "top1" in key)
    assert 0 <= summary["data_wait_fraction"] < 1
    assert summary["loader_samples_per_s"] > 0 and summary["torchvision_samples_per_s"] > 0
    with Image.open(out / "preview.png") as sheet:
        assert min(sheet.size) > 900

    report = tmp_path / "report.html"
    command = ["-m", "benchmarks.report", "--demo", str(out), "--results", str(out), "--out", str(report)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, timeout=60)
    page = report.read_text()
    assert "torchvision + PIL" in page and "<svg" in page
    assert not re.search(r'(src|href)="?https?:', page), "the page must need no network"
