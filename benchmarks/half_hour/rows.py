"""The rows of the half hour, the most important of each part first; GPU tests, ceilings and real runs."""

import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.half_hour import loading, steps
from benchmarks.half_hour.plan import PartName, Setup, published_name
from benchmarks.half_hour.worker import LOG_TAIL, Row, rates
from benchmarks.peers import contract
from benchmarks.peers.ours import GPU_VARIANTS
from benchmarks.timing import sampling, summary
from pipelines.sets.stores import open_set
from pipelines.workers import usable_cores
from training.precision import settings_of_training

_ROOT = Path(__file__).resolve().parents[2]
_WARM_UP_STEPS = 10
_POLL_S = 0.05
_UTILIZATION_EVERY_S = 0.2
_NEVER = 1_000_000


def rows_of(setup: Setup) -> dict[PartName, dict[str, Row]]:
    """Return part → name → row."""
    cores = usable_cores(0)
    threads = [num for num in (16, 8, 4) if num <= cores] or [cores]
    files = [str(file.relative_to(_ROOT)) for file in sorted((_ROOT / "tests").rglob("test_*.py"))]
    marked = [file for file in files if "mark.gpu" in (_ROOT / file).read_text()]
    ways = {"crops": 12, "recipe, eager": 12, "recipe, compiled": 30}
    by_dali = (contract.OURS_GPU_DECODES, contract.DALI_GPU_ONCE, contract.DALI_GPU_TWICE)
    dali = [(name, work) for work in contract.WORKS for name in by_dali]
    dali += [(contract.OURS_GPU_DECODES + variant, "crops") for variant in GPU_VARIANTS if variant]
    runs = {"eager": 80, "--cuda-graph": 80, "--compile --cuda-graph": 200, "--compile": 200}
    loaders = {
        f"ours, {way}, {num} threads": Row(cost_s, loading.ours, (num, way), needs_gpu="compiled" in way)
        for num in threads
        for way, cost_s in ways.items()
    }
    for work in contract.WORKS:
        peer = (contract.TORCHVISION_GPU, work, threads[0])
        loaders[f"torchvision v2 with nvJPEG, {work}, {threads[0]} threads"] = Row(20, loading.peer, peer)
    jpeg = f"torchvision.io.decode_jpeg, lists of {setup.size.batch_size}"
    parts: dict[PartName, dict[str, Row]] = {
        "check": {file: Row(25, gpu_tests, (file,)) for file in marked[: 1 if setup.tiny else None]},
        "ceilings": {
            "device copy, read and written": Row(5, _copy, ("device", "device")),
            "matrix product, bf16": Row(5, _product, (torch.bfloat16,)),
            "matrix product, fp32 without TF32": Row(8, _product, (torch.float32,)),
            "pinned upload": Row(5, _copy, ("host", "device"), needs_gpu=True),
            "pinned download": Row(5, _copy, ("device", "host"), needs_gpu=True),
        },
        "loader": loaders,
        "nvjpeg": {jpeg: Row(10, loading.nvjpeg, needs_gpu=True)},
        "step": _step_rows(),
        "train": {way: Row(cost_s, _train, (way,), way != "eager") for way, cost_s in runs.items()},
        "dali": {f"{name}, {work}": Row(25, loading.peer, (name, work, cores)) for name, work in dali},
    }
    if not setup.tiny:
        return parts
    brief = partial(replace, cost_s=1.0, grace_s=240.0)
    return {part: {name: brief(row) for name, row in rows.items()} for part, rows in parts.items()}


def _step_rows() -> dict[str, Row]:
    """Return the rows of steps; the compiled ones cost most and come last."""

    def ours(mode: steps.Mode, cost_s: float) -> dict[str, Row]:
        return {
            f"{method}, {bn}, {mode}": Row(cost_s, steps.ours, (method, num, mode), needs_gpu=mode != "eager")
            for bn, num in {"8 groups": 8, "plain BN": 1}.items()
            for method in steps.METHODS
        }

    published = {
        published_name(method, precision): Row(25, steps.published_step, (method, precision))
        for precision in ("bf16", "fp32")
        for method in steps.METHODS
    }
    profiles = {
        f"profile of mixmask, 8 groups, {mode}": Row(25, steps.profile, (mode,), needs_gpu=mode != "eager")
        for mode in ("eager", "graph")
    }
    compiled = ours("compiled graph", 150) | ours("compiled", 150)
    return ours("eager", 20) | ours("graph", 20) | published | profiles | compiled


def gpu_tests(_: Setup, file: str) -> dict[str, Any]:
    """Run the tests of a file that need a GPU; count them by outcome, and name those that failed."""
    import pytest

    names: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

    class Outcomes:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or not report.passed:
                names[report.outcome].append(report.nodeid.rpartition("::")[2])

    options = ("-m", "gpu", "-p", "no:cacheprovider", "-q")
    code = pytest.main([*options, str(_ROOT / file)], plugins=[Outcomes()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise ValueError(f"pytest ended with {code!r}; its output is in the part's log")
    return {**{outcome: len(found) for outcome, found in names.items()}, "failures": names["failed"]}


def _copy(setup: Setup, source: str, target: str) -> dict[str, Any]:
    """Measure bytes per second; a copy within the device counts both what it reads and what it writes."""
    num = setup.size.copy_mib * 2**20
    source_C, target_C = (
        torch.zeros(num, dtype=torch.uint8, device=setup.on)
        if place == "device"
        else torch.zeros(num, dtype=torch.uint8, pin_memory=True)
        for place in (source, target)
    )
    gigabytes = num / 1e9 * (2 if source == target else 1)
    return rates(lambda: target_C.copy_(source_C, non_blocking=True), gigabytes, setup, "GB/s")


def _product(setup: Setup, dtype: torch.dtype) -> dict[str, Any]:
    """Measure operations per second of a square matrix product, with the settings of training."""
    side = setup.size.matrix_side
    a, b, out = (torch.randn(side, side, device=setup.on).to(dtype) for _ in range(3))
    with settings_of_training():
        return rates(lambda: torch.mm(a, b, out=out), 2 * side**3 / 1e12, setup, "TFLOP/s")


def _train(setup: Setup, way: str) -> dict[str, Any]:
    """Run train_pretrain.py, stopped by SIGTERM in the middle and resumed.

    Rates and waiting are those of the run's own metrics.jsonl, without the first steps after each start. How
    long the GPU is idle comes from NVIDIA's management library, where nvidia-ml-py is installed.
    """
    out = setup.out.resolve() / "train"
    log, metrics = out.with_name("train_pretrain.log"), out / "metrics.jsonl"
    steps_per_epoch = open_set(setup.reads).count // setup.size.batch_size
    epochs = -(-setup.size.train_steps // steps_per_epoch)
    flags = [] if way == "eager" else way.split()
    command = [*_command(setup, out), *flags, "--epochs", str(epochs)]
    shutil.rmtree(out, ignore_errors=True)
    with log.open("wb") as file:
        first = subprocess.Popen(command, cwd=_ROOT, stdout=file, stderr=file)
        _wait_for_step(metrics, 2 * _WARM_UP_STEPS, first)
        with sampling(partial(torch.cuda.utilization, setup.on), _UTILIZATION_EVERY_S) as busy_percent:
            _wait_for_step(metrics, setup.size.train_steps // 2, first)
        first.send_signal(signal.SIGTERM)
        code, stopped_at = first.wait(), _num_logged(metrics)
        code = code or subprocess.run([*command, "--resume"], cwd=_ROOT, stdout=file, stderr=file).returncode
    num_steps = epochs * steps_per_epoch
    rows, done = _logged(metrics), _num_logged(metrics)
    if code or not 0 < stopped_at < done == num_steps:
        said = " ".join(log.read_text(errors="replace").split())[-LOG_TAIL:]
        steps_done = f"stopped after {stopped_at} steps, resumed up to {done} of {num_steps}"
        raise ValueError(f"the run ended with code {code}, {steps_done}: {said}")
    shutil.rmtree(out)
    found = steady(rows, (0, stopped_at), setup.size.batch_size)
    if busy_percent:
        found["gpu_idle_percent"] = round(100 - statistics.fmean(busy_percent), 1)
    return found | {"stopped_at": stopped_at, "steps": num_steps, "loss": round(rows[-1]["loss"], 4)}


def _command(setup: Setup, out: Path) -> list[str]:
    size = setup.size
    options = {
        **{"--out": out, "--device": setup.device, "--arch": size.arch, "--crop-px": size.crop_px},
        **{"--batch-size": size.batch_size, "--moco-k": size.queue_len, "--log-every-s": size.log_every_s},
        **{"--save-every-epochs": _NEVER, "--knn-every-epochs": _NEVER, "--knn-bank": size.batch_size},
        # The images of a tiny run are too small for the usual number of cells of a mask.
        **({"--grid-size": 4} if setup.tiny else {}),
    }
    words = [str(word) for option in options.items() for word in option]
    return [sys.executable, "train_pretrain.py", str(setup.reads.resolve()), *words]


def _logged(metrics: Path) -> list[dict[str, Any]]:
    """Return the whole rows of the log that are about steps."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["kind"] == "step"]


def _num_logged(metrics: Path) -> int:
    return sum(row["step"] - row["first_step"] + 1 for row in _logged(metrics))


def _wait_for_step(metrics: Path, step: int, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the run has logged this step, or has ended."""
    while process.poll() is None and _num_logged(metrics) <= step:
        time.sleep(_POLL_S)


def steady(rows: Iterable[Mapping[str, Any]], starts: Sequence[int], batch_size: int) -> dict[str, Any]:
    """Summarise samples per second over the rows of the log, and the share of time spent waiting for data.

    Rows that begin within ten steps of one of the ``starts`` are warm-up.
    """
    kept = [line for line in rows if all(not 0 <= line["first_step"] - at < _WARM_UP_STEPS for at in starts)]
    if not kept:
        raise ValueError("the run ended before its warm-up did; it needs more steps")
    seconds = [batch_size * (line["step"] - line["first_step"] + 1) / line["samples_per_s"] for line in kept]
    waited = statistics.fmean((line["wait_percent"] for line in kept), weights=seconds)
    rate = summary([line["samples_per_s"] for line in kept])
    return {**rate, "unit": "samples/s", "wait_percent": round(waited, 2)}
