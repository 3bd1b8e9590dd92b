"""The training step by itself: every way to compute it, its peer, its memory, and where its time goes.

    python -m benchmarks.half_hour step

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
from torch import nn

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
    """Eager steps and graphs, the published formulation, profiles; compiled steps, which cost most, last."""

    def ways(mode: Mode, cost_s: float) -> dict[str, Row]:
        return {
            f"{method}, {name}, {mode}": row(
                setup, cost_s, _ours, method, splits, mode, needs_gpu=mode != "eager"
            )
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
    """Random images (N, 3, S, S) on the device, each mixture with the batch in reverse order."""
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
    """Our model, freshly initialised, and a function that trains it by one step."""
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


def _ours(setup: Setup, method: Method, splits: int, mode: Mode) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        _, train = build_step(setup, method, splits, mode)
        return _rate(setup, train)

    with settings_of_training():
        return peak_mib(setup, measure)


def _published(setup: Setup, method: Method, precision: PrecisionName) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        torch.manual_seed(0)
        encoder = functools.partial(build_encoder, setup.size.arch)
        model: nn.Module = PlainMoCo(encoder, method=method, queue_len=setup.size.queue_len).to(setup.on)
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], _LR, _MOMENTUM, weight_decay=_WEIGHT_DECAY
        )
        batch = random_batch(setup, method, torch.contiguous_format)
        autocast = Precision.choose(precision, setup.on).autocast

        def train() -> None:
            with autocast():
                loss = model(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return _rate(setup, train)

    # The published programs search for the fastest convolutions too, and leave TF32 as it is.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        return peak_mib(setup, measure)


def _rate(setup: Setup, train: Callable[[], object]) -> dict[str, Any]:
    figures = rates(train, setup.size.batch_size, setup, least=_LEAST_STEPS)
    return figures | {"step_ms": round(1e3 * setup.size.batch_size / figures["median"], 3)}


# -------------------------------------------------------------------------------------------------- profile


def _profile(setup: Setup, mode: Mode) -> dict[str, Any]:
    """The share of time in which the GPU ran nothing, and the kernels that cost most, over three steps.

    On a CPU torch's operators stand in for kernels, and nothing is said of idleness.
    """
    on_gpu = setup.device == "cuda"
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    trace = Path(setup.out) / f"trace-{mode}.json"
    with settings_of_training():
        _, train = build_step(setup, "mixmask", 8, mode)
        figures = _rate(setup, train)
        schedule = torch.profiler.schedule(wait=0, warmup=2, active=_PROFILED_STEPS, repeat=1)
        with torch.profiler.profile(
            activities=[activity],
            schedule=schedule,
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
    """Start and end of each event of a trace, in µs."""
    return [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events]


def idle_share(intervals: Sequence[tuple[float, float]]) -> float:
    """The share of the time between the first start and the last end that no interval covers."""
    if not intervals:
        raise ValueError("the profiler recorded nothing on the device; CUPTI may be missing or not allowed")
    first = end = min(start for start, _ in intervals)
    idle = 0.0
    for start, stop in sorted(intervals):
        idle += max(0.0, start - end)
        end = max(end, stop)
    return idle / (end - first) if end > first else 0.0


def top_kernels(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Name, ms per step and share of the ten that took most time."""
    took_us: Counter[str] = Counter()
    for event in events:
        took_us[event["name"]] += event["dur"]
    total = sum(took_us.values())
    return [
        {"name": name, "ms": round(us / 1e3 / _PROFILED_STEPS, 4), "percent": round(100 * us / total, 2)}
        for name, us in took_us.most_common(_TOP_KERNELS)
    ]
