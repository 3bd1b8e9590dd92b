"""Three short parts: the tests that need a GPU, the limits of the hardware, and its JPEG decoder."""

import importlib.util
import itertools
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import torch

from benchmarks.half_hour.plan import Row, Setup, peak_mib, rates, row
from benchmarks.peers.contract import image_files
from training.precision import settings_of_training

_ROOT = Path(__file__).resolve().parents[2]
_MIB = 2**20


def gpu_tests(setup: Setup) -> dict[str, Row]:
    """The test files that hold tests marked gpu, one row each."""
    files = sorted((_ROOT / "tests").rglob("test_*.py"))
    marked = [str(file.relative_to(_ROOT)) for file in files if "mark.gpu" in file.read_text()]
    return {name: row(setup, 25, _run_tests, name) for name in (marked[:1] if setup.tiny else marked)}


def _run_tests(setup: Setup, file: str) -> dict[str, Any]:
    if importlib.util.find_spec("pytest") is None:
        raise ImportError("pytest is not installed; pip install pytest")
    report = Path(setup.out).resolve() / "tests.xml"
    report.unlink(missing_ok=True)
    options = ("-m", "gpu", "-p", "no:cacheprovider", "-q", f"--junitxml={report}")
    command = [sys.executable, "-m", "pytest", *options, file]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stdout + done.stderr)
    if not report.is_file():
        raise ValueError(f"pytest ended with code {done.returncode}: {' '.join(done.stdout.split()[-40:])}")
    return counts(report)


def counts(report: Path) -> dict[str, Any]:
    """Count the tests of a JUnit file by outcome, and name those that failed."""
    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ET.parse(report).getroot().iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        found[outcome].append(case.get("name", ""))
    return {**{outcome: len(names) for outcome, names in found.items()}, "failures": found["failed"]}


def ceilings(setup: Setup) -> dict[str, Row]:
    """What no step and no loader can exceed: bandwidths and matrix products."""
    return {
        "device copy, read and written": row(setup, 5, _copy, "device", "device"),
        "matrix product, bf16": row(setup, 5, _product, "bfloat16"),
        "matrix product, fp32 without TF32": row(setup, 8, _product, "float32"),
        "pinned upload": row(setup, 5, _copy, "host", "device", needs_gpu=True),
        "pinned download": row(setup, 5, _copy, "device", "host", needs_gpu=True),
    }


def _copy(setup: Setup, source: str, target: str) -> dict[str, Any]:
    """Measure bytes per second; a copy within the device counts both what it reads and what it writes."""
    num = setup.size.copy_mib * _MIB
    source_C, target_C = (
        torch.zeros(num, dtype=torch.uint8, device=setup.on)
        if place == "device"
        else torch.zeros(num, dtype=torch.uint8, pin_memory=True)
        for place in (source, target)
    )
    gigabytes = num / 1e9 * (2 if source == target else 1)
    return rates(lambda: target_C.copy_(source_C, non_blocking=True), gigabytes, setup, "GB/s")


def _product(setup: Setup, dtype: str) -> dict[str, Any]:
    """Measure operations per second of a square matrix product, with the settings of training."""
    side = setup.size.matrix_side
    a, b, out = (torch.randn(side, side, device=setup.on).to(getattr(torch, dtype)) for _ in range(3))
    with settings_of_training():
        return rates(lambda: torch.mm(a, b, out=out), 2 * side**3 / 1e12, setup, "TFLOP/s")


def nvjpeg(setup: Setup) -> dict[str, Row]:
    """torchvision's decoder on the GPU, by itself."""
    name = f"torchvision.io.decode_jpeg, lists of {setup.size.batch_size}"
    return {name: row(setup, 10, _decode, needs_gpu=True)}


def _decode(setup: Setup) -> dict[str, Any]:
    from torchvision import io

    if not setup.images.folder:
        raise ImportError(f"{setup.images.beton} is there without its folder of JPEG files; copy that too")
    num = setup.size.batch_size
    encoded = [io.read_file(str(file)) for file in image_files(Path(setup.images.folder))[: 4 * num]]
    lists = itertools.cycle([encoded[first : first + num] for first in range(0, len(encoded) - num + 1, num)])

    def decode() -> None:
        io.decode_jpeg(next(lists), mode=io.ImageReadMode.RGB, device=setup.on)

    return peak_mib(setup, lambda: rates(decode, num, setup, "images/s"))
