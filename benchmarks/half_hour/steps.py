"""The training step by itself: ours in every mode, the published formulation, memory, and profiles.

The batch is random and always the same, so no loader is needed. The published formulation is a plain loop in
its own fp32, with torch's defaults, which let convolutions use TF32, and in bf16; ours is bf16.

Shape letters: N batch, S side.
"""

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.half_hour.plan import Row, Setup, peak_mib, published_name, rates, row
from benchmarks.published import PlainMoCo
from models.batch import NUM_MIXTURES, Batch, Method, Mixture, tensors_of
from models.encoders import build_encoder
from models.moco import MoCo
from training.optim import sgd
from training.precision import Precision, PrecisionName, settings_of_training
from training.step import WARM_UP_STEPS, TrainStep

Mode = Literal["eager", "graph", "compiled", "compiled graph"]
METHODS: tuple[Method, ...] = ("mixmask", "both", "moco")
_SPLITS = {"8 groups": 8, "plain BN": 1}
_PUBLISHED: tuple[PrecisionName, ...] = ("bf16", "fp32")
_PROFILED_STEPS = 3
_TOP_KERNELS = 10
_LEAST_STEPS = WARM_UP_STEPS + 3
_LR, _MOMENTUM, _WEIGHT_DECAY = 0.03, 0.9, 1e-4


def step(setup: Setup) -> dict[str, Row]:
    """Eager steps and graphs, the published formulation, profiles; compiled steps last, which cost most."""

    def ways(mode: Mode, cost_s: float) -> dict[str, Row]:
        on_gpu = mode != "eager"
        return {
            f"{method}, {name}, {mode}": row(setup, cost_s, _ours, method, splits, mode, needs_gpu=on_gpu)
            for name, splits in _SPLITS.items()
            for method in METHODS
        }

    published = {
        published_name(method, precision): row(setup, 25, _published, method, precision)
        for precision in _PUBLISHED
        for method in METHODS
    }
    modes: tuple[Mode, ...] = ("eager", "graph")
    profiles = {
        f"profile of mixmask, 8 groups, {mode}": row(setup, 25, _profile, mode, needs_gpu=mode != "eager")
        for mode in modes
    }
    compiled = ways("compiled graph", 150) | ways("compiled", 150)
    return ways("eager", 20) | ways("graph", 20) | published | profiles | compiled


def random_batch(
    setup: Setup, method: Method, layout: torch.memory_format, dtype: torch.dtype = torch.float32
) -> Batch:
    """Return random images (N, 3, S, S) on the device; mixtures pair the batch with its reverse."""
    size = setup.size
    shape = (size.batch_size, 3, size.crop_px, size.crop_px)
    key, query, *mixed = (
        torch.randn(shape, device=setup.on).to(dtype).contiguous(memory_format=layout)
        for _ in range(2 + NUM_MIXTURES[method])
    )
    row_N = torch.arange(size.batch_size, device=setup.on)
    lam_N = torch.full_like(row_N, 0.5, dtype=torch.float32)
    mixtures = tuple(Mixture(images, row_N.flip(0), lam_N) for images in mixed)
    return Batch(query, key, mixtures, row_N, torch.full_like(row_N, -1))


def build_step(
    setup: Setup, method: Method, splits: int, mode: Mode, precision: PrecisionName = "auto"
) -> tuple[MoCo, Callable[[], object]]:
    """Return our model, freshly initialised, and a function that trains it by one step."""
    torch.manual_seed(0)
    encoder = functools.partial(build_encoder, setup.size.arch)
    model = MoCo(encoder, method=method, queue_len=setup.size.queue_len, bn_splits=splits).to(setup.on)
    model.to(memory_format=torch.channels_last)
    if mode.startswith("compiled"):
        model.compile_for_training()
    optimizer = sgd(model.encoder_q, _LR, _MOMENTUM, _WEIGHT_DECAY)
    chosen = Precision.choose(precision, setup.on)
    train = TrainStep(model, optimizer, chosen, tensors_of=tensors_of if mode.endswith("graph") else None)
    # Two in turn, so that a graph's static batch is filled anew at each step, as in training.
    batches = itertools.cycle(
        [random_batch(setup, method, torch.channels_last, chosen.dtype) for _ in range(2)]
    )
    return model, lambda: train(next(batches))


def _published_step(setup: Setup, method: Method, precision: PrecisionName) -> Callable[[], object]:
    torch.manual_seed(0)
    encoder = functools.partial(build_encoder, setup.size.arch)
    model = PlainMoCo(encoder, method=method, queue_len=setup.size.queue_len).to(setup.on)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, _LR, _MOMENTUM, weight_decay=_WEIGHT_DECAY)
    batch = random_batch(setup, method, torch.contiguous_format)
    autocast = Precision.choose(precision, setup.on).autocast

    def train() -> None:
        with autocast():
            loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return train


def _rate(setup: Setup, build: Callable[[], Callable[[], object]]) -> dict[str, Any]:
    num = setup.size.batch_size
    figures = peak_mib(setup, lambda: rates(build(), num, setup, least=_LEAST_STEPS))
    return figures | {"step_ms": round(1e3 * num / figures["median"], 3)}


def _ours(setup: Setup, method: Method, splits: int, mode: Mode) -> dict[str, Any]:
    with settings_of_training():
        return _rate(setup, lambda: build_step(setup, method, splits, mode)[1])


def _published(setup: Setup, method: Method, precision: PrecisionName) -> dict[str, Any]:
    # The published programs search for the fastest convolutions too, and leave TF32 at its default.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        return _rate(setup, lambda: _published_step(setup, method, precision))


def _profile(setup: Setup, mode: Mode) -> dict[str, Any]:
    """Measure how long the GPU ran nothing, and which kernels took most time, over three steps.

    On a CPU torch's operators are listed in place of kernels, and there is no idle time.
    """
    on_gpu = setup.device == "cuda"
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    trace = Path(setup.out) / f"trace-{mode}.json"
    with settings_of_training():
        _, train = build_step(setup, "mixmask", 8, mode)
        figures = _rate(setup, lambda: train)
        with torch.profiler.profile(
            activities=[activity],
            schedule=torch.profiler.schedule(wait=0, warmup=2, active=_PROFILED_STEPS, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
        ) as profiler:
            for number in range(2 + _PROFILED_STEPS):
                train()
                # Before the steps that count, and before the trace is written at the end of the last one.
                if number in (1, 1 + _PROFILED_STEPS):
                    setup.settle()
                profiler.step()
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat") in kinds]
    idle = {"gpu_idle_percent": round(100 * idle_share(spans(events)), 2)} if on_gpu else {}
    return {"step_ms": figures["step_ms"], **idle, "kernels": top_kernels(events)}


def spans(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return start and end of each event of a trace, in µs."""
    return [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events]


def idle_share(intervals: Sequence[tuple[float, float]]) -> float:
    """Return the share of the time between the first start and the last end that no interval covers."""
    if not intervals:
        raise ValueError("the profiler recorded nothing on the device; CUPTI may be missing or not allowed")
    first = end = min(start for start, _ in intervals)
    idle = 0.0
    for start, stop in sorted(intervals):
        idle += max(0.0, start - end)
        end = max(end, stop)
    return idle / (end - first) if end > first else 0.0


def top_kernels(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return name, ms per step and share of the ten that took most time."""
    took_us: Counter[str] = Counter()
    for event in events:
        took_us[event["name"]] += event["dur"]
    return [
        {
            "name": name,
            "ms": round(us / 1e3 / _PROFILED_STEPS, 4),
            "percent": round(100 * us / took_us.total(), 2),
        }
        for name, us in took_us.most_common(_TOP_KERNELS)
    ]
