"""A training step without its encoders, ours against the published formulation; then whole epochs.

    python -m benchmarks.step --quick           a look, in about two minutes
    python -m benchmarks.step --json FILE       the figures, in about half an hour on two cores

A step gets the features of a ResNet-18. It computes the head, the loss and the gradients down to the
features, and updates the whole key encoder and the queue. Ours is `models.moco.MoCo`, the published one
`benchmarks.published.PlainMoCo`; they take turns in one process. Peak memory is the largest resident memory
during a few steps in a fresh process, minus that before the first step. For epochs see `benchmarks.epoch`.

Shape letters: N batch, F features.
"""

import ctypes
import functools
import gc
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks.epoch import EpochSetting, measure_epochs, print_epochs
from benchmarks.memory import status_mib
from benchmarks.published import PlainMoCo, loss_of, mixed_with_reverse
from benchmarks.run_options import (
    Bars,
    finish_benchmark,
    given_or,
    keep_full_figures,
    median_and_range,
    print_table,
)
from benchmarks.timing import Runner, Turns, num_steps, summary, take_turns
from models.batch import NUM_MIXTURES, Method
from models.encoders import NormLayer, build_encoder
from models.moco import MoCo
from pipelines import Batch
from training import cli
from training.cli import console

Formulation = Literal["ours", "naive"]
_FORMULATIONS: tuple[Formulation, ...] = get_args(Formulation)
EPOCHS = [EpochSetting(), EpochSetting("resnet10w16", crop_px=64, pictures=2000, epochs=3)]
"""The epochs of the main speed-up, and those of a small encoder, where the data counts for more."""
_ARCH, _TEMPERATURE, _PEAK_STEPS = "resnet18", 0.2, 4


@dataclass(frozen=True)
class Size:
    """How large a step is, and how long it is measured."""

    batch_size: int
    queue_len: int
    turns: int
    seconds: float


@dataclass(frozen=True)
class StepBenchmark:
    """Measure training steps without their encoders, and whole epochs."""

    quick: bool = False
    """A shorter queue, fewer and shorter turns, short epochs; for a look, not for figures."""
    json: Path | None = None
    """Where the figures go."""
    methods: tuple[Method, ...] = get_args(Method)
    """What is trained; mixmask is always added, because the main figures are its."""
    batch_size: int | None = None
    """N: 256."""
    queue_len: int | None = None
    """K: 65,536, or 16,384 with --quick."""
    turns: int | None = None
    """Turns of each formulation after its warm-up: 7, or 2 with --quick."""
    seconds: float | None = None
    """Shortest length of a turn: 4, or 0.5 with --quick."""
    data: Path = Path("data")
    """Folder of the sample sets; what is missing is made there."""

    def size(self) -> Size:
        """The given options, with defaults for the rest; raises ValueError for a step without mixtures."""
        size = given_or(self, Size(256, 16384, 2, 0.5) if self.quick else Size(256, 65536, 7, 4.0))
        if size.batch_size < 2 or size.queue_len < 1:
            raise ValueError(
                f"a batch of {size.batch_size} and a queue of {size.queue_len} make no step with mixtures; "
                "give at least 2 and 1"
            )
        return size


def main(config: StepBenchmark) -> dict[str, Any]:
    """Measure, print tables, write the JSON; returns what was written."""
    keep_full_figures(config.quick, config.json)
    size = config.size()
    settings = [setting.brief() for setting in EPOCHS] if config.quick else EPOCHS
    methods = [method for method in get_args(Method) if method in {"mixmask", *config.methods}]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as display:
        bars = Bars(display, 2 * len(methods) + len(settings))
        figures = {method: _measure(method, size, bars) for method in methods}
        epoch = measure_epochs(settings, config.data, bars)
    threads = torch.get_num_threads()
    facts = asdict(size) | {"arch": _ARCH, "temperature": _TEMPERATURE, "steps_at_peak": _PEAK_STEPS}
    facts |= {"threads": threads, "precision": "fp32"}
    ratios = {name: figures["mixmask"][name] for name in ("time_vs_naive", "peak_memory_vs_naive")}
    print_table(
        f"A step without its encoders, N {size.batch_size}, K {size.queue_len:,}, {threads} threads; "
        f"ms, lowest … highest of {size.turns} turns, and MiB at the peak",
        {method: _cells(row) for method, row in figures.items()},
    )
    print_epochs(epoch)
    step = {**ratios, "unit": "ms", "methods": figures}
    return finish_benchmark("step", config.quick, config.json, config=facts, step=step, epoch=epoch)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return (
        {name: median_and_range(row[name], 0) for name in _FORMULATIONS}
        | {"time": f"{row['time_vs_naive']:.2f} ×"}
        | {f"{name}, MiB": f"{row[name]['peak_memory_mib']:.0f}" for name in _FORMULATIONS}
        | {"memory": f"{row['peak_memory_vs_naive']:.2f} ×"}
    )


class GivenFeatures(nn.Module):
    """Passes features on to its head; its unused trunk gives the key encoder parameters to update."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.fc: nn.Module = nn.Identity()

    def forward(self, features_NF: Tensor) -> Tensor:
        """The head's output for (N, F) features."""
        embedding: Tensor = self.fc(features_NF)
        return embedding


def _given_features(*, norm_layer: NormLayer) -> tuple[nn.Module, int]:
    trunk, feature_dim = build_encoder(_ARCH, norm_layer=norm_layer)
    return GivenFeatures(trunk), feature_dim


def feature_batch(method: Method, batch_size: int, feature_dim: int) -> tuple[Batch, list[Tensor]]:
    """A batch with (N, F) features as images, and those of them that require a gradient."""
    generator = torch.Generator().manual_seed(1)
    key, *leaves = torch.rand(2 + NUM_MIXTURES[method], batch_size, feature_dim, generator=generator)
    query, *mixed = (leaf.clone().requires_grad_() for leaf in leaves)
    return mixed_with_reverse(query, key, mixed), [query, *mixed]


def build_step(formulation: Formulation, method: Method, size: Size) -> Callable[[], Tensor]:
    """A function that makes one step and returns its loss. Both formulations start from the same weights."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"method": method, "queue_len": size.queue_len, "temperature": _TEMPERATURE}
    if formulation == "ours":
        # Features have no BN, so there are no statistics to split.
        model: nn.Module = MoCo(_given_features, **options, bn_splits=1)
    else:
        model = PlainMoCo(_given_features, **options)
    encoder = model.get_submodule("encoder_q")
    head = encoder.get_submodule("fc")
    batch, features = feature_batch(method, size.batch_size, next(head.parameters()).shape[1])
    leaves = [*features, *head.parameters()]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return step


def _measure(method: Method, size: Size, bars: Bars) -> dict[str, Any]:
    """Time and memory of both formulations, and ours over the other's."""
    bars.next_part(f"{method}: time")
    runners: dict[str, Runner] = {
        name: Runner(functools.partial(_steps, name, method, size), items=1) for name in _FORMULATIONS
    }
    turns = Turns(size.turns, size.seconds)
    rates = take_turns(runners, turns, bars.steps(num_steps(runners, turns)))
    times_ms = {name: [1e3 / rate for rate in rates[name]] for name in rates}
    bars.next_part(f"{method}: memory")
    bars.steps(1)("in fresh processes")
    peaks_mib = _in_fresh_processes(method, size)
    medians_ms = {name: statistics.median(times) for name, times in times_ms.items()}
    return {
        **{
            name: summary(times_ms[name]) | {"peak_memory_mib": round(mib, 1)}
            for name, mib in peaks_mib.items()
        },
        "time_vs_naive": round(medians_ms["ours"] / medians_ms["naive"], 4),
        "peak_memory_vs_naive": round(peaks_mib["ours"] / peaks_mib["naive"], 4),
    }


def _steps(formulation: Formulation, method: Method, size: Size) -> Iterator[Tensor]:
    step = build_step(formulation, method, size)
    while True:
        yield step()


def _in_fresh_processes(method: Method, size: Size) -> dict[str, float]:
    """The peak of each formulation, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(_FORMULATIONS), mp_context=spawn, max_tasks_per_child=1) as pool:
        peaks_mib = pool.map(peak_memory_mib, _FORMULATIONS, repeat(method), repeat(size))
        try:
            return dict(zip(_FORMULATIONS, peaks_mib, strict=True))
        except BrokenProcessPool as error:
            raise ValueError(
                f"a process measuring {method} was killed, most likely for its memory; "
                "give a smaller --queue-len or --batch-size"
            ) from error


def peak_memory_mib(formulation: Formulation, method: Method, size: Size) -> float:
    """MiB that steps hold at their peak over what this process held before the first step."""
    step = build_step(formulation, method, size)
    # Return freed memory to the system, so that no step uses it unseen.
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # Resets the kernel's high-water mark of resident memory.
    Path("/proc/self/clear_refs").write_text("5")
    before_mib = status_mib("VmRSS")
    for _ in range(_PEAK_STEPS):
        step()
    return status_mib("VmHWM") - before_mib


if __name__ == "__main__":
    cli.program(StepBenchmark, main)
