"""Does the loader's memory grow? Ten epochs, and the process's private memory in each.

    python -m benchmarks.memory data/photographs.beton --json benchmarks/results/memory.json

Pages of the mapped set belong to the system, which takes them back when it needs them, so they do not count.
Memory is read after every batch, and the peak of each epoch is reported.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.progress import track

from benchmarks.environment import environment, write_figures
from pipelines import Reading, build_loader
from pipelines.recipe import moco_v2
from training import cli
from training.cli import console


@dataclass(frozen=True)
class MemoryBenchmark:
    """Measure the loader's memory over some epochs."""

    compiled: tyro.conf.Positional[Path]
    """A .beton set."""
    epochs: int = 10
    """Passes over it."""
    crop_px: int = 224
    """Side of the views."""
    batch_size: int = 64
    """Images per batch."""
    reading: Reading = "map"
    """How the set is read."""
    json: Path | None = None
    """File of the figures."""


def main(config: MemoryBenchmark) -> dict[str, Any]:
    """Measure, print, write the JSON; returns what was written.

    Raises:
        ValueError: for fewer than three epochs.
    """
    if config.epochs < 3:
        raise ValueError(f"{config.epochs} epochs show no growth; take at least 3")
    loader = build_loader(
        config.compiled, moco_v2(config.crop_px), batch_size=config.batch_size, reading=config.reading
    )
    peaks_mib = []
    for epoch in track(range(config.epochs), "epochs", console=console, disable=not console.is_terminal):
        loader.set_epoch(epoch)
        peaks_mib.append(max(status_mib("RssAnon") for _ in loader))
    # The first epoch compiles, and takes memory that the process keeps.
    growth = peaks_mib[-1] / peaks_mib[1] - 1
    settings = {key: value for key, value in asdict(config).items() if key not in ("compiled", "json")}
    result = {
        "benchmark": "memory",
        "config": settings | {"pictures": loader.set.count},
        "peaks_mib": [round(peak, 1) for peak in peaks_mib],
        "growth": round(growth, 4),
        "environment": environment(),
    }
    console.print(
        f"private memory {peaks_mib[1]:.0f} MiB in the second epoch, {peaks_mib[-1]:.0f} MiB in the last of "
        f"{config.epochs}: {100 * growth:+.2f} %"
    )
    if config.json:
        write_figures(config.json, result, console)
    return result


def status_mib(name: str) -> float:
    """Return a figure of /proc/self/status in MiB: RssAnon, which no file backs, VmRSS, or the peak VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    cli.program(MemoryBenchmark, main)
