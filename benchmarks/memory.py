"""Does the loader's memory grow? Ten epochs, and the process's private memory in each.

    python -m benchmarks.memory data/photographs.beton --json benchmarks/results/memory.json

Pages of the mapped set belong to the system, which takes them back when it needs them, so they do not count.
Memory is read after every batch, and the peak of each epoch is reported.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.run_options import CROP_PX, finish_benchmark
from pipelines import Reading, build_loader
from pipelines.recipe import moco_v2
from training import cli
from training.cli import console

_EPOCHS = 10


@dataclass(frozen=True)
class MemoryBenchmark:
    """Measure the loader's memory over ten epochs."""

    compiled: tyro.conf.Positional[Path]
    """A .beton set."""
    crop_px: int = CROP_PX
    """Side of the views."""
    batch_size: int = 64
    """Images per batch."""
    reading: Reading = "map"
    """How the set is read."""
    json: Path | None = None
    """File of the figures."""


def main(config: MemoryBenchmark) -> dict[str, Any]:
    """Measure, print, write the JSON; returns what was written."""
    settings: dict[str, Any] = {"batch_size": config.batch_size, "reading": config.reading}
    loader = build_loader(config.compiled, moco_v2(config.crop_px), **settings)
    peaks_mib = []
    for epoch in range(_EPOCHS):
        loader.set_epoch(epoch)
        peaks_mib.append(max(status_mib("RssAnon") for _ in loader))
        console.print(f"epoch {epoch + 1} of {_EPOCHS}: at most {peaks_mib[-1]:.0f} MiB of private memory")
    # The first epoch compiles, and takes memory that the process keeps.
    growth = peaks_mib[-1] / peaks_mib[1] - 1
    console.print(f"growth from the second epoch to the last: {100 * growth:+.2f} %")
    return finish_benchmark(
        "memory",
        False,
        config.json,
        config={"epochs": _EPOCHS, "crop_px": config.crop_px, **settings, "pictures": loader.set.count},
        peaks_mib=[round(peak, 1) for peak in peaks_mib],
        growth=round(growth, 4),
    )


def status_mib(name: str) -> float:
    """Return a figure of /proc/self/status in MiB: RssAnon, which no file backs, VmRSS, or the peak VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    cli.program(MemoryBenchmark, main)
