"""The loader's memory does not grow. It is measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("reading", ["map", "read"])
def test_ten_epochs_take_no_more_memory_than_two(reading: str, beton: Path, tmp_path: Path) -> None:
    figures = tmp_path / "memory.json"
    small = ("--crop-px", "96", "--batch-size", "8", "--reading", reading, "--json", str(figures))
    command = [sys.executable, "-m", "benchmarks.memory", str(beton), *small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(figures.read_text())
    assert len(result["peaks_mib"]) == 10
    assert result["growth"] <= 0.01
