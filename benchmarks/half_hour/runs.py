"""Real runs: train_pretrain.py in a process of its own, stopped by SIGTERM in the middle and resumed.

Rates and waiting are those of the run's own metrics.jsonl, without the first steps after each start. How long
the GPU is idle comes from NVIDIA's management library, where nvidia-ml-py is installed.
"""

import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.half_hour.plan import Row, Setup, row
from benchmarks.peers.contract import image_files
from benchmarks.timing import sampling, summary

_ROOT = Path(__file__).resolve().parents[2]
_WARM_UP_STEPS = 10
_POLL_S = 0.05
_UTILIZATION_EVERY_S = 0.2
_LOG_TAIL = 300
_NEVER = 1_000_000
_STOPPED = re.compile(r"stopped after step (\d+) of (\d+)")


def real_runs(setup: Setup) -> dict[str, Row]:
    """Eager, as a CUDA graph, with both graph and compilation, and compiled alone."""
    costs_s = {"eager": 80, "--cuda-graph": 80, "--compile --cuda-graph": 200, "--compile": 200}
    return {
        name: row(setup, cost_s, _train, name, needs_gpu=name != "eager") for name, cost_s in costs_s.items()
    }


def _train(setup: Setup, way: str) -> dict[str, Any]:
    """Train from start to end, stopped and resumed once."""
    size, out = setup.size, Path(setup.out).resolve() / "train"
    log, metrics = out.with_suffix(".log"), out / "metrics.jsonl"
    shutil.rmtree(out, ignore_errors=True)
    command = [*_command(setup, out), *([] if way == "eager" else way.split())]
    first = _start(command, log)
    try:
        _wait_for_step(metrics, 2 * _WARM_UP_STEPS, first)
        with sampling(partial(torch.cuda.utilization, setup.on), _UTILIZATION_EVERY_S) as busy_percent:
            _wait_for_step(metrics, size.train_steps // 2, first)
        first.send_signal(signal.SIGTERM)
        code, said = first.wait(), _text_of(log)
        stopped = _STOPPED.search(said)
        if code or not stopped:
            raise ValueError(
                f"the run did not stop at SIGTERM; it ended with code {code}: {said[-_LOG_TAIL:]}"
            )
        stopped_at, steps = int(stopped[1]), int(stopped[2])
        if code := _start([*command, "--resume"], log).wait():
            raise ValueError(f"the resumed run ended with code {code}: {_text_of(log)[-_LOG_TAIL:]}")
        rows = [line for line in map(json.loads, metrics.read_text().splitlines()) if line["kind"] == "step"]
    finally:
        shutil.rmtree(out, ignore_errors=True)
    check_continuous(rows, steps)
    figures = steady(rows, (0, stopped_at), size.batch_size)
    if busy_percent:
        figures["gpu_idle_percent"] = round(100 - statistics.fmean(busy_percent), 1)
    return figures | {"stopped_at": stopped_at, "steps": steps, "loss": round(rows[-1]["loss"], 4)}


def _command(setup: Setup, out: Path) -> list[object]:
    size, images = setup.size, setup.images
    count = size.num_entries if images.long else len(image_files(Path(images.folder)))
    flags = {
        **{"--out": out, "--device": setup.device, "--arch": size.arch, "--crop-px": size.crop_px},
        **{"--batch-size": size.batch_size, "--moco-k": size.queue_len, "--log-every-s": size.log_every_s},
        "--epochs": -(-size.train_steps // (count // size.batch_size)),
        **{"--save-every-epochs": _NEVER, "--knn-every-epochs": _NEVER, "--knn-bank": size.batch_size},
    }
    # The images of a tiny run are too small for the usual number of cells of a mask.
    flags |= {"--grid-size": 4} if setup.tiny else {}
    return [Path(images.path()).resolve(), *(word for pair in flags.items() for word in pair)]


def _start(command: Sequence[object], log: Path) -> "subprocess.Popen[bytes]":
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "train_pretrain.py", *map(str, command)]
    with log.open("wb") as file:
        return subprocess.Popen(words, cwd=_ROOT, stdout=file, stderr=subprocess.STDOUT)


def _text_of(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())


def _wait_for_step(metrics: Path, step: int, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the run has logged this step, or has ended."""
    while process.poll() is None:
        text = metrics.read_text() if metrics.is_file() else ""
        whole = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if whole and whole[-1]["step"] >= step:
            return
        time.sleep(_POLL_S)


def check_continuous(rows: Iterable[Mapping[str, Any]], steps: int) -> None:
    """Raise ValueError unless the rows of both halves cover every step once."""
    expected = 0
    for found in rows:
        if found["first_step"] != expected:
            raise ValueError(f"the log continues at step {found['first_step']}, expected step {expected}")
        expected = found["step"] + 1
    if expected != steps:
        raise ValueError(f"the log ends after {expected} steps of {steps}")


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
