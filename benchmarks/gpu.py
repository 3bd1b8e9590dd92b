"""Our loader beside its peers with batches on one GPU: the same pictures, the same threads, one run.

    python -m benchmarks.gpu --quick           a look
    python -m benchmarks.gpu --json FILE       the figures

Two works, both of which leave their batches on the GPU: *crops*, two antialiased uint8 crops of each picture;
*recipe*, two views after the whole MoCo v2 augmentation, normalised float32. Everybody is opened and warmed
up, then they take turns; a turn ends when the GPU has done all that was handed out. Beside each rate stand
the share of the host's cores that the loader kept busy, the GPU's memory that it takes by itself, and how far
its crops are from PIL's.

An epoch of 2,000 pictures is seven batches, after which our loader hires its workers anew, as stock DALI's
endless reader and torchvision's order do not; ``--pictures 20000`` makes that rarer, at ten times the disk.
"""

import functools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from benchmarks import gpu_memory
from benchmarks import loader_parts as parts
from benchmarks.environment import environment, write_figures
from benchmarks.loader_tables import print_gpu_tables
from benchmarks.peers import ALL_GPU_PEERS, GPUPeerName, load_gpu_peers
from benchmarks.peers.contract import WORKS, Job, Work, WorkName, works
from benchmarks.run_options import CROP_PX, Bars, RunOptions, Scale
from benchmarks.sample_sets import PHOTOGRAPHS, SampleSets
from benchmarks.timing import Turns, num_steps, summary, watch_turns
from engine import cli
from pipelines.cores import usable_cores
from pipelines.recipe import moco_v2

console = Console(highlight=False, soft_wrap=True)
_MemoryOf = Callable[[str, WorkName, Job], dict[str, float]]


@dataclass(frozen=True)
class GPUBenchmark(RunOptions):
    """Measure two-view loaders whose batches are wanted on a GPU."""

    batch_size: int | None = None
    """Pictures per batch: 256, or 32 with --quick."""
    peers: tuple[GPUPeerName, ...] = ALL_GPU_PEERS
    """Whom to measure."""

    def full(self) -> Scale:
        """What a run for figures measures."""
        return Scale(pictures=PHOTOGRAPHS, batch_size=256, turns=5, seconds=4.0)

    def brief(self) -> Scale:
        """What a run with ``--quick`` measures."""
        return Scale(pictures=128, batch_size=32, turns=2, seconds=0.5)


def the_gpu() -> torch.device:
    """The GPU to measure on; CUDA_VISIBLE_DEVICES chooses among several. Raises ValueError without one."""
    if not torch.cuda.is_available():
        raise ValueError(
            f"torch {torch.__version__} sees no GPU and this benchmark measures nothing else; run it on a "
            "machine with an NVIDIA GPU and a torch built for CUDA, or measure the CPU with `make bench`"
        )
    return torch.device("cuda", 0)


def main(config: GPUBenchmark) -> dict[str, Any]:
    """Measure, print tables, write the JSON; returns what was written.

    Raises:
        ValueError: where torch sees no GPU.
        ImportError: if a peer's package is missing.
    """
    device = the_gpu()
    config.keep_full_figures()
    scale, threads = config.scale(), usable_cores(config.threads)
    peers = tuple(load_gpu_peers(config.peers, device))
    memory = functools.partial(gpu_memory.measure, config.peers, device=device)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as display:
        bars = Bars(display, len(WORKS))
        sets = SampleSets(config.data, scale.pictures, bars.note)
        turns = Turns(scale.turns, scale.seconds)
        plan = parts.Plan(sets, peers, moco_v2(CROP_PX), scale.batch_size, threads, turns, bars.steps)
        tables = {}
        for work in WORKS:
            bars.next_part(work)
            tables[work] = _rows(plan, work, memory)
    result = {
        "benchmark": "gpu",
        "quick": config.quick,
        "config": scale.config(threads),
        "environment": environment(),
        "sets": sets.facts(),
        "left_out": parts.left_out(plan),
        "tables": tables,
    }
    print_gpu_tables(console, result)
    if config.json:
        write_figures(config.json, result, console)
    return result


def _rows(plan: parts.Plan, work: WorkName, memory: _MemoryOf) -> parts.Rows:
    """One table: each one's memory, then rates and the host's load in turns; of crops, their errors too."""
    pictures = plan.sets.reencoded
    job = plan.job(pictures)
    offers = {name: offer for name, offer in works(work, plan.peers).items() if isinstance(offer, Work)}
    step = plan.steps(len(offers))
    taken = {}
    for name in offers:
        step(f"memory of {name}")
        taken[name] = memory(name, work, job)
    runners = {name: parts.runner(offer, job) for name, offer in offers.items()}
    watched = watch_turns(runners, plan.turns, plan.steps(num_steps(runners, plan.turns)))
    rows: parts.Rows = {
        name: {
            **summary([turn.rate for turn in watched[name]]),
            "configured": offer.configured,
            "cpu_share": round(statistics.median(t.cpu_s for t in watched[name]) / usable_cores(0), 4),
            **taken[name],
        }
        for name, offer in offers.items()
    }
    if work == "crops":
        parts.add_errors(rows, pictures, plan)
    return rows


if __name__ == "__main__":
    cli.run(functools.partial(lambda argv: main(tyro.cli(GPUBenchmark, args=argv)), sys.argv[1:]))
