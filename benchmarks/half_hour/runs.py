"""Real runs: train_pretrain.py in a process of its own, stopped by SIGTERM in the middle and resumed.

    python -m benchmarks.half_hour train

Rates and waiting are those of the run's own metrics.jsonl, without the first steps after each start. How long
the GPU is idle is what NVIDIA's management library says, where nvidia-ml-py is installed.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.half_hour.plan import Row, Setup, files_below, row
from benchmarks.nvml import watching
from benchmarks.timing import summary

_ROOT = Path(__file__).resolve().parents[2]
_WARM_UP_STEPS = 10
_POLL_S = 0.05
_LAST_WORDS = 300
_STOPPED = re.compile(r"stopped after step (\d+) of (\d+)")


def train(setup: Setup) -> dict[str, Row]:
    """Eager, as a CUDA graph, both with compilation and compiled alone."""
    costs_s = {"eager": 80, "--cuda-graph": 80, "--compile --cuda-graph": 200, "--compile": 200}
    return {
        name: row(setup, cost_s, _train, name, needs_gpu=name != "eager") for name, cost_s in costs_s.items()
    }


def _train(setup: Setup, way: str) -> dict[str, Any]:
    """A run from its start to its end, in two goes."""
    size, images = setup.size, setup.images
    count = size.num_entries if images.long else len(files_below(images.folder))
    out = Path(setup.out).resolve() / "train"
    shutil.rmtree(out, ignore_errors=True)
    never = 1_000_000
    flags = {
        **{"--out": out, "--device": setup.device, "--arch": size.arch, "--crop-px": size.crop_px},
        **{"--batch-size": size.batch_size, "--moco-k": size.queue_len, "--log-every-s": size.log_every_s},
        "--epochs": -(-size.train_steps // (count // size.batch_size)),
        **{"--save-every-epochs": never, "--knn-every-epochs": never, "--knn-bank": size.batch_size},
    }
    words = [] if way == "eager" else way.split()
    # As small as a tiny run's images are, mixing needs fewer cells than usual.
    words += ["--grid-size", "4"] if setup.tiny else []
    command = [Path(images.path()).resolve(), *(word for pair in flags.items() for word in pair), *words]
    metrics = out / "metrics.jsonl"
    first = _start(command, out.with_suffix(".log"))
    try:
        _wait_for_step(metrics, 2 * _WARM_UP_STEPS, first)
        with watching(setup.on) as watch:
            _wait_for_step(metrics, size.train_steps // 2, first)
        first.send_signal(signal.SIGTERM)
        stopped_at, steps = _stopped(first, out.with_suffix(".log"))
        second = _start([*command, "--resume"], out.with_suffix(".log"))
        if second.wait():
            raise ValueError(f"the resumed run ended with code {second.returncode}: {_last_words(out)}")
        rows = [line for line in map(json.loads, metrics.read_text().splitlines()) if line["kind"] == "step"]
        check_continuous(rows, steps)
        idle = {} if watch.idle_percent is None else {"gpu_idle_percent": watch.idle_percent}
        return {**steady(rows, (0, stopped_at), size.batch_size), **idle} | {
            "stopped_at": stopped_at,
            "steps": steps,
            "loss": round(rows[-1]["loss"], 4),
        }
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _start(command: Sequence[object], log: Path) -> "subprocess.Popen[bytes]":
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "train_pretrain.py", *map(str, command)]
    with log.open("wb") as file:
        return subprocess.Popen(words, cwd=_ROOT, stdout=file, stderr=subprocess.STDOUT)


def _wait_for_step(metrics: Path, step: int, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the run has logged this step, or has ended."""
    while process.poll() is None:
        text = metrics.read_text() if metrics.is_file() else ""
        whole = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if whole and whole[-1]["step"] >= step:
            return
        time.sleep(_POLL_S)


def _stopped(process: "subprocess.Popen[bytes]", log: Path) -> tuple[int, int]:
    """The step after which the run stopped, and the steps of the schedule. Raises ValueError if it failed."""
    code = process.wait()
    found = _STOPPED.search(" ".join(log.read_text(errors="replace").split()))
    if code or not found:
        raise ValueError(
            f"the run did not stop at SIGTERM but ended with code {code}: {_last_words(log.with_suffix(''))}"
        )
    return int(found[1]), int(found[2])


def _last_words(out: Path) -> str:
    return " ".join(out.with_suffix(".log").read_text(errors="replace").split())[-_LAST_WORDS:]


def check_continuous(rows: Iterable[Mapping[str, Any]], steps: int) -> None:
    """Raise ValueError unless the rows of both goes cover every step once."""
    expected = 0
    for found in rows:
        if found["first_step"] != expected:
            raise ValueError(f"the log goes on at step {found['first_step']} where {expected} should follow")
        expected = found["step"] + 1
    if expected != steps:
        raise ValueError(f"the log ends after {expected} steps of {steps}")


def steady(rows: Iterable[Mapping[str, Any]], starts: Sequence[int], batch_size: int) -> dict[str, Any]:
    """Samples per second over the rows of the log, and the share of time spent waiting for data.

    Rows that begin within ten steps of one of the ``starts`` are warm-up.
    """
    kept = [line for line in rows if all(not 0 <= line["first_step"] - at < _WARM_UP_STEPS for at in starts)]
    if not kept:
        raise ValueError("the run was over before it was warm; it needs more steps")
    seconds = [batch_size * (line["step"] - line["first_step"] + 1) / line["samples_per_s"] for line in kept]
    waited = sum(s * line["wait_percent"] for s, line in zip(seconds, kept, strict=True)) / sum(seconds)
    rate = summary([line["samples_per_s"] for line in kept])
    return {**rate, "unit": "samples/s", "wait_percent": round(waited, 2)}
