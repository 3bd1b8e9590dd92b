"""Everything of a training step but its encoders, ours beside the published formulation; then whole epochs.

    python -m benchmarks.step --quick           a look, in about two minutes
    python -m benchmarks.step --json FILE       the figures, in about half an hour on two cores

A step here is given the features of a ResNet-18 and makes embeddings of them by the head, the loss, and the
gradients down to the features; it moves the whole key encoder and the queue. Ours is `models.moco.MoCo` as it
trains, the other one `benchmarks.published.PlainMoCo`; both take turns in one process. What a step needs of
memory is measured in fresh processes: the highest amount resident during a few steps over what was resident
before the first one, when model, queue and features were there. Epochs: see `benchmarks.epoch`.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from benchmarks.environment import environment, write_figures
from benchmarks.epoch import EpochSetting, measure_epochs, print_epochs
from benchmarks.memory import status_mib
from benchmarks.published import PlainMoCo
from benchmarks.run_options import Bars, RunOptions
from benchmarks.timing import Runner, Turns, num_steps, summary, take_turns
from models.batch import NUM_MIXTURES, Method
from models.encoders import NormLayer, build_encoder
from models.moco import MoCo
from pipelines import Batch, Mixture
from training import cli
from training.cli import console

Formulation = Literal["ours", "naive"]
_FORMULATIONS: tuple[Formulation, ...] = get_args(Formulation)
_ARCH = "resnet18"
_TEMPERATURE = 0.2
_PEAK_STEPS = 4


@dataclass(frozen=True)
class Size:
    """How much a step is given, and how long it is looked at."""

    batch_size: int
    queue_len: int
    turns: int
    seconds: float

    def __post_init__(self) -> None:
        if self.batch_size < 2 or self.queue_len < 1:
            raise ValueError(
                f"a batch of {self.batch_size} and a queue of {self.queue_len} make no step with mixtures; "
                "take at least 2 and 1"
            )


_FULL, _QUICK = Size(256, 65536, turns=7, seconds=4.0), Size(256, 16384, turns=2, seconds=0.5)


@dataclass(frozen=True)
class StepBenchmark:
    """Measure training steps without their encoders, and whole epochs."""

    quick: bool = False
    """A shorter queue, fewer and shorter turns, short epochs; for a look, not for figures."""
    json: Path | None = None
    """Where the figures go."""
    methods: tuple[Method, ...] = get_args(Method)
    """What is trained; mixmask is always among them, the first figures are its."""
    batch_size: int | None = None
    """N: 256."""
    queue_len: int | None = None
    """K: 65,536, or 16,384 with --quick."""
    turns: int | None = None
    """Turns of each formulation after its warm-up: 7, or 2 with --quick."""
    seconds: float | None = None
    """Least length of a turn: 4, or 0.5 with --quick."""
    epoch: bool = True
    """Measure whole epochs too."""
    data: Path = Path("data")
    """Folder of the sample sets; what is missing is made there."""
    large: EpochSetting = field(default_factory=EpochSetting)
    """The epochs whose speed-up is told first."""
    small: EpochSetting = field(
        default_factory=lambda: EpochSetting("resnet10w16", crop_px=64, pictures=2000, epochs=3)
    )
    """Epochs of a small encoder, where the data counts for more."""

    def size(self) -> Size:
        """What is given, else the default of a full or a quick run; raises ValueError where out of range."""
        usual = _QUICK if self.quick else _FULL
        return Size(
            usual.batch_size if self.batch_size is None else self.batch_size,
            usual.queue_len if self.queue_len is None else self.queue_len,
            usual.turns if self.turns is None else self.turns,
            usual.seconds if self.seconds is None else self.seconds,
        )

    def settings(self) -> list[EpochSetting]:
        """The epochs to measure, the one that is told first in front."""
        both = [self.large, self.small] if self.epoch else []
        return [setting.brief() for setting in both] if self.quick else both


def main(config: StepBenchmark) -> dict[str, Any]:
    """Measure, print tables, write the JSON; returns what was written."""
    RunOptions(quick=config.quick, json=config.json).keep_full_figures()
    size, settings = config.size(), config.settings()
    methods = [method for method in get_args(Method) if method in {"mixmask", *config.methods}]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as display:
        bars = Bars(display, 2 * len(methods) + len(settings))
        figures = {method: _measure(method, size, bars) for method in methods}
        epoch = measure_epochs(settings, config.data, bars) if settings else None
    main_figures = figures["mixmask"]
    result = {
        "benchmark": "step",
        "quick": config.quick,
        "config": {
            "batch_size": size.batch_size,
            "queue_len": size.queue_len,
            "arch": _ARCH,
            "temperature": _TEMPERATURE,
            "turns": size.turns,
            "seconds": size.seconds,
            "steps_at_peak": _PEAK_STEPS,
            "threads": torch.get_num_threads(),
            "precision": "fp32",
        },
        "environment": environment(),
        "step": {
            "time_vs_naive": main_figures["time_vs_naive"],
            "peak_memory_vs_naive": main_figures["peak_memory_vs_naive"],
            "unit": "ms",
            "methods": figures,
        },
        **({"epoch": epoch} if epoch else {}),
    }
    _print(result)
    if config.json:
        write_figures(config.json, result, console)
    return result


# ------------------------------------------------------------------------------------------------ the step


class GivenFeatures(nn.Module):
    """Hands given features to its head, and owns a trunk, so the key encoder has its parameters to move."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.fc: nn.Module = nn.Identity()

    def forward(self, features_NF: Tensor) -> Tensor:
        """(N, F) in, what the head makes of it out."""
        embedding: Tensor = self.fc(features_NF)
        return embedding


def _given_features(*, norm_layer: NormLayer) -> tuple[nn.Module, int]:
    trunk, feature_dim = build_encoder(_ARCH, norm_layer=norm_layer)
    return GivenFeatures(trunk), feature_dim


def feature_batch(method: Method, batch_size: int, feature_dim: int) -> tuple[Batch, list[Tensor]]:
    """A batch whose images are (N, F) features, and those of them that want a gradient."""
    generator = torch.Generator().manual_seed(1)
    key, query, *mixed = torch.rand(2 + NUM_MIXTURES[method], batch_size, feature_dim, generator=generator)
    wanting = [x.clone().requires_grad_() for x in (query, *mixed)]
    # As published: the batch backwards, one share for the whole of it.
    partner_N, lam_N = torch.arange(batch_size - 1, -1, -1), torch.full((batch_size,), 0.5)
    mixtures = tuple(Mixture(x, partner_N, lam_N) for x in wanting[1:])
    row_N = torch.arange(batch_size)
    return Batch(wanting[0], key, mixtures, row_N, torch.full_like(row_N, -1)), wanting


def build_step(formulation: Formulation, method: Method, size: Size) -> Callable[[], Tensor]:
    """One step, to be called again and again; it returns the loss. Both formulations start alike."""
    torch.manual_seed(0)
    model: MoCo | PlainMoCo
    loss_of: Callable[[Batch], Tensor]
    if formulation == "ours":
        # Features know no BN, so it is not split either.
        ours = MoCo(
            _given_features, method=method, queue_len=size.queue_len, temperature=_TEMPERATURE, bn_splits=1
        )
        model, loss_of = ours, lambda batch: ours(batch)[0]
    else:
        model = loss_of = PlainMoCo(
            _given_features, method=method, queue_len=size.queue_len, temperature=_TEMPERATURE
        )
    batch, wanting = feature_batch(method, size.batch_size, model.feature_dim)
    leaves = [*wanting, *model.encoder_q.get_submodule("fc").parameters()]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss: Tensor = loss_of(batch)
        loss.backward()
        return loss

    return step


# --------------------------------------------------------------------------------------------- measurement


def _measure(method: Method, size: Size, bars: Bars) -> dict[str, Any]:
    """Time and memory of both formulations, and ours over the other's."""
    bars.next_part(f"{method}: time")
    runners: dict[str, Runner] = {
        name: Runner(functools.partial(_steps, name, method, size), items=1) for name in _FORMULATIONS
    }
    turns = Turns(size.turns, size.seconds)
    rates = take_turns(runners, turns, bars.steps(num_steps(runners, turns)))
    times_ms = {name: [1e3 / rate for rate in rates[name]] for name in _FORMULATIONS}
    bars.next_part(f"{method}: memory")
    bars.steps(1)("in fresh processes")
    peaks_mib = _in_fresh_processes(method, size)
    medians = {name: statistics.median(times_ms[name]) for name in _FORMULATIONS}
    return {
        **{
            name: {**summary(times_ms[name]), "peak_memory_mib": round(peaks_mib[name], 1)}
            for name in _FORMULATIONS
        },
        "time_vs_naive": round(medians["ours"] / medians["naive"], 4),
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
        asked = {name: pool.submit(peak_memory_mib, name, method, size) for name in _FORMULATIONS}
        try:
            return {name: peak.result() for name, peak in asked.items()}
        except BrokenProcessPool as error:
            raise ValueError(
                f"a process measuring {method} was killed, most likely for its memory; "
                "give a smaller --queue-len or --batch-size"
            ) from error


def peak_memory_mib(formulation: Formulation, method: Method, size: Size) -> float:
    """MiB that steps hold at their peak over what was resident before the first, in this process."""
    step = build_step(formulation, method, size)
    # What the making of the models has freed goes back to the system, so that no step lives on it unseen.
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # Sets the kernel's high-water mark of resident memory back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before_mib = status_mib("VmRSS")
    for _ in range(_PEAK_STEPS):
        step()
    return status_mib("VmHWM") - before_mib


# --------------------------------------------------------------------------------------------------- tables


def _print(result: dict[str, Any]) -> None:
    config = result["config"]
    table = Table(
        title=f"A step without its encoders, N {config['batch_size']}, K {config['queue_len']:,}, "
        f"{config['threads']} threads; ms, lowest … highest of {config['turns']} turns, and MiB at the peak"
    )
    table.add_column("method", no_wrap=True)
    for column in ("ours", "naive", "time", "ours, MiB", "naive, MiB", "memory"):
        table.add_column(column, justify="right")
    for method, row in result["step"]["methods"].items():
        times = [
            f"{t['median']:.0f}\n[dim]{t['low']:.0f} … {t['high']:.0f}[/]"
            for t in map(row.get, _FORMULATIONS)
        ]
        peaks = [f"{t['peak_memory_mib']:.0f}" for t in map(row.get, _FORMULATIONS)]
        table.add_row(
            method, *times, f"{row['time_vs_naive']:.2f} ×", *peaks, f"{row['peak_memory_vs_naive']:.2f} ×"
        )
    console.print(table)
    if "epoch" in result:
        print_epochs(console, result["epoch"])


if __name__ == "__main__":
    cli.program(StepBenchmark, main)
