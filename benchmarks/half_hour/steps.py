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
from typing import Any, Literal

import torch

from benchmarks.half_hour.plan import Setup
from benchmarks.half_hour.worker import rates
from benchmarks.published import PlainMoCo
from models.batch import NUM_MIXTURES, Batch, Method, Mixture, tensors_of
from models.encoders import build_encoder
from models.moco import MoCo
from training.optim import sgd
from training.precision import Precision, PrecisionName, settings_of_training
from training.step import WARM_UP_STEPS, TrainStep

Mode = Literal["eager", "graph", "compiled", "compiled graph"]
METHODS: tuple[Method, ...] = ("mixmask", "both", "moco")
_PROFILED_STEPS = 3
_TOP_KERNELS = 10
_LR, _MOMENTUM, _WEIGHT_DECAY = 0.03, 0.9, 1e-4


def _random_batch(setup: Setup, method: Method, dtype: torch.dtype, layout: torch.memory_format) -> Batch:
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
    batches = [_random_batch(setup, method, chosen.dtype, torch.channels_last) for _ in range(2)]
    batch = itertools.cycle(batches)
    return model, lambda: train(next(batch))


def ours(setup: Setup, method: Method, splits: int, mode: Mode) -> dict[str, Any]:
    """Our step with the settings of training."""
    with settings_of_training():
        return _rate(setup, build_step(setup, method, splits, mode)[1])


def published_step(setup: Setup, method: Method, precision: PrecisionName) -> dict[str, Any]:
    """The published formulation's step."""
    torch.manual_seed(0)
    encoder = functools.partial(build_encoder, setup.size.arch)
    model = PlainMoCo(encoder, method=method, queue_len=setup.size.queue_len).to(setup.on)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, _LR, _MOMENTUM, weight_decay=_WEIGHT_DECAY)
    batch = _random_batch(setup, method, torch.float32, torch.contiguous_format)
    autocast = Precision.choose(precision, setup.on).autocast

    def train() -> None:
        with autocast():
            loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # The published programs search for the fastest convolutions too, and leave TF32 at its default.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        return _rate(setup, train)


def _rate(setup: Setup, train: Callable[[], object]) -> dict[str, Any]:
    num = setup.size.batch_size
    figures = rates(train, num, setup, warm_up=WARM_UP_STEPS + 3, queued=1)
    return {**figures, "step_ms": round(1e3 * num / figures["median"], 3)}


def profile(setup: Setup, mode: Mode) -> dict[str, Any]:
    """Measure how long the GPU ran nothing, and which kernels took most time, over three steps.

    On a CPU torch's operators are listed in place of kernels, and there is no idle time.
    """
    on_gpu = setup.device == "cuda"
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    trace = setup.out / f"trace-{mode}.json"
    with settings_of_training():
        _, train = build_step(setup, "mixmask", 8, mode)
        figures = _rate(setup, train)
        # The first profile is a warm-up, because the profiler starts slowly.
        for _ in range(2):
            with torch.profiler.profile(activities=[activity]) as profiler:
                for _ in range(_PROFILED_STEPS):
                    train()
                setup.settle()
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat") in kinds]
    idle = {"gpu_idle_percent": round(100 * idle_share(events), 2)} if on_gpu else {}
    return {"step_ms": figures["step_ms"], **idle, "kernels": top_kernels(events)}


def idle_share(events: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of the time between the first start and the last end that no event covers."""
    if not events:
        raise ValueError("the profiler recorded nothing on the device; CUPTI may be missing or not allowed")
    spans = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events)
    first = end = spans[0][0]
    idle = 0.0
    for start, stop in spans:
        idle += max(0.0, start - end)
        end = max(end, stop)
    return idle / (end - first)


def top_kernels(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return name, ms per step and share of the ten that took most time."""
    took_us: Counter[str] = Counter()
    for event in events:
        took_us[event["name"]] += event["dur"]
    total_us = took_us.total()
    return [
        {"name": name, "ms": round(us / 1e3 / _PROFILED_STEPS, 4), "percent": round(100 * us / total_us, 2)}
        for name, us in took_us.most_common(_TOP_KERNELS)
    ]
