"""How many pictures a second a whole training step takes in, by itself and fed by the loader, and its memory.

    python -m benchmarks.training --json benchmarks/results/training.json

Ways to compute the same step (MixMask, forward, backward, SGD, key encoder and queue): in float32, in bf16,
with one forward pass for all branches, compiled, and captured as one CUDA graph, which shows that nothing in
it makes the host wait. *Alone* the step gets the same batch again and again; *fed* it takes the loader's.

It is meant for a GPU; on a CPU it runs what a CPU can, which is for trying the program and not for figures.
"""

import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.environment import environment, write_figures
from benchmarks.nvml import watching
from benchmarks.run_options import RunOptions, Scale
from benchmarks.sample_sets import SampleSets
from benchmarks.timing import Runner, Turns, summary, take_turns
from engine import cli
from engine.launch import choose_device
from engine.optimizer import sgd
from engine.precision import Precision, PrecisionName
from models.encoders import build_encoder
from models.moco import MoCo
from pipelines import Batch, Mixing, ViewLoader, build_loader
from pipelines.cores import usable_cores
from pipelines.recipe import moco_v2

console = Console(highlight=False, soft_wrap=True)
_MIB = 2**20


@dataclass(frozen=True)
class TrainingBenchmark(RunOptions):
    """Measure whole training steps, alone and fed by the loader."""

    batch_size: int | None = None
    """Pictures per batch: 256, or 8 with --quick."""
    arch: str = "resnet50"
    """Encoder."""
    crop_px: int = 224
    """Side of the views."""
    queue_len: int = 65536
    """Length of the queue."""
    device: str = "auto"
    """auto: the GPU where there is one."""
    ways: tuple[str, ...] = ()
    """Ways to measure; by default all that the device can do."""

    def full(self) -> Scale:
        """What a run for figures measures."""
        return Scale(pictures=2000, batch_size=256, turns=5, seconds=6.0)

    def brief(self) -> Scale:
        """What a run with ``--quick`` measures."""
        return Scale(pictures=128, batch_size=8, turns=1, seconds=0.3)


@dataclass(frozen=True)
class Way:
    """One way to compute a step."""

    precision: PrecisionName = "fp32"
    joint_forward: bool = False
    compiled: bool = False
    captured: bool = False
    """As one CUDA graph, which only takes the batch it was captured with: it is not fed."""


WAYS = {
    "fp32": Way(),
    "bf16": Way("bf16"),
    "bf16, joint forward": Way("bf16", joint_forward=True),
    "bf16, compiled": Way("bf16", compiled=True),
    "bf16, one CUDA graph": Way("bf16", captured=True),
}
_GPU_ONLY = ("bf16, compiled", "bf16, one CUDA graph")
"""Compiling for a CPU takes minutes, and there are no graphs to capture."""


class Step:
    """A model that is trained one way."""

    def __init__(self, way: Way, config: TrainingBenchmark, device: torch.device) -> None:
        """Freshly initialised, seed 0."""
        torch.manual_seed(0)
        self.precision = Precision.choose(way.precision, device)
        encoder = functools.partial(build_encoder, config.arch)
        self.model = MoCo(
            encoder, method="mixmask", queue_len=config.queue_len, joint_forward=way.joint_forward
        ).to(device)
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = sgd(self.model.encoder_q, 0.03, 0.9, 1e-4)
        if way.compiled:
            self.model.encoder_q.compile()
            self.model.encoder_k.compile()

    def __call__(self, batch: Batch) -> None:
        """Forward, backward, optimizer."""
        with self.precision.autocast():
            loss, _ = self.model(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def captured(step: Step, batch: Batch) -> torch.cuda.CUDAGraph:
    """A step on ``batch`` as one graph; raises RuntimeError if anything in it makes the host wait.

    The few steps before it, which any capture needs, are real ones.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            step(batch)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    step.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step(batch)
    return graph


def main(config: TrainingBenchmark) -> dict[str, Any]:
    """Measure, print a table, write the JSON; returns what was written."""
    device = choose_device(config.device)
    config.keep_full_figures()
    ways = _ways(config, device)
    scale, threads = config.scale(), usable_cores(config.threads)
    recipe = moco_v2(config.crop_px, Mixing())
    with Progress(console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task("", total=None)
        pictures = SampleSets(
            config.data, scale.pictures, lambda what: display.update(task, description=what)
        ).reencoded
        turns = Turns(scale.turns, scale.seconds)
        feed = functools.partial(
            build_loader,
            pictures.beton,
            recipe,
            batch_size=scale.batch_size,
            num_threads=threads,
            device=device,
        )
        display.update(task, total=len(ways) * 2 * (turns.num + 2))
        table = {}
        for name, way in ways.items():
            table[name] = _measure(
                way,
                config,
                device,
                feed,
                turns,
                lambda what: display.update(task, advance=1, description=what),
            )
    result = {
        "benchmark": "training",
        "quick": config.quick,
        "training": table,
        "config": scale.config(threads)
        | {
            "arch": config.arch,
            "crop_px": config.crop_px,
            "queue_len": config.queue_len,
            "device": str(device),
        },
        "environment": environment(),
    }
    _print(result)
    if config.json:
        write_figures(config.json, result, console)
    return result


def _ways(config: TrainingBenchmark, device: torch.device) -> dict[str, Way]:
    able = {name: way for name, way in WAYS.items() if device.type == "cuda" or name not in _GPU_ONLY}
    unable = [name for name in config.ways if name not in able]
    if unable:
        raise ValueError(f"ways {unable} cannot be measured on {device}; choose of {', '.join(able)}")
    return {name: able[name] for name in config.ways or able}


def _measure(
    way: Way,
    config: TrainingBenchmark,
    device: torch.device,
    feed: Callable[[], ViewLoader],
    turns: Turns,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Rates alone and fed, the share of the time spent waiting for data, and the step's greatest memory."""
    on_gpu = device.type == "cuda"
    settle = functools.partial(torch.cuda.synchronize, device) if on_gpu else None
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step = Step(way, config, device)
    loader = feed()
    batch = next(iter(loader))
    waits: list[tuple[float, float]] = []
    runners = {"alone": Runner(lambda: _alone(way, step, batch), len(batch.index), settle=settle)}
    if not way.captured:
        runners["fed"] = Runner(lambda: _fed(step, loader, waits), len(batch.index), settle=settle)
    with watching(device) as watch:
        rates = take_turns(runners, turns, progress)
    row: dict[str, Any] = {name: summary(seen) for name, seen in rates.items()} | watch.summary()
    if waits:
        # The first batch's time is the opening's.
        waited, whole = (sum(column) for column in zip(*waits[1:], strict=True))
        row["data_wait_percent"] = round(100 * waited / whole, 2)
    if on_gpu:
        row["peak_memory_mib"] = round(torch.cuda.max_memory_allocated(device) / _MIB, 1)
    return row


def _alone(way: Way, step: Step, batch: Batch) -> Iterator[None]:
    if way.captured:
        graph = captured(step, batch)
        while True:
            graph.replay()
            yield
    while True:
        step(batch)
        yield


def _fed(step: Step, loader: ViewLoader, waits: list[tuple[float, float]]) -> Iterator[None]:
    """Steps; notes of each how long its batch was waited for, and how long it took in all."""
    start = time.perf_counter()
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for batch in loader:
            step(batch)
            now = time.perf_counter()
            waits.append((loader.take_waited_s(), now - start))
            yield
            start = time.perf_counter()


def _print(result: Mapping[str, Any]) -> None:
    config = result["config"]
    table = Table(
        title=f"{config['arch']} at {config['crop_px']} px, batch {config['batch_size']}, {config['device']}"
    )
    for heading in (
        "way",
        "alone, samples/s",
        "fed, samples/s",
        "data wait",
        "peak memory",
        "GPU busy, draws",
    ):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name, row in result["training"].items():
        table.add_row(
            name,
            f"{row['alone']['median']:,.1f}",
            f"{row['fed']['median']:,.1f}" if "fed" in row else "–",
            f"{row['data_wait_percent']:.1f} %" if "data_wait_percent" in row else "–",
            f"{row['peak_memory_mib']:,.0f} MiB" if "peak_memory_mib" in row else "–",
            f"{row['nvml_busy_percent']:.0f} %, {row['nvml_watts']:.0f} W" if "nvml_watts" in row else "–",
        )
    console.print(table)


if __name__ == "__main__":
    cli.run(functools.partial(lambda argv: main(tyro.cli(TrainingBenchmark, args=argv)), sys.argv[1:]))
