"""Draw all measured figures on one page, and write those in README.md and docs/benchmarks.md.

    make report

Reads the JSON files in benchmarks/results/ and the summary of the last demo, those that exist. Writes
runs/report.html, a single file that needs no network, the blocks of figures in README.md and
docs/benchmarks.md, and docs/evidence.svg. ``--check`` writes nothing and exits with code 1 if the blocks or
the picture differ from the JSON.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.report.blocks import PAGE, update
from benchmarks.report.page import render
from benchmarks.report.results import MEASURED_BY, read_results
from training import cli
from training.cli import console
from training.files import write_atomically

RESULTS = Path("benchmarks/results")
README = Path("README.md")


@dataclass(frozen=True)
class ReportConfig:
    """Draw the page of measured figures, and write the blocks in README.md and docs/benchmarks.md."""

    results: Path = RESULTS
    """Folder of the benchmarks' JSON files."""
    demo: Path = Path("runs/demo")
    """Folder of the last demo."""
    out: Path = Path("runs/report.html")
    """The page to write."""
    readme: Path | None = None
    """README.md with a block of figures, docs/benchmarks.md in its folder; by default the repository's own
    for the committed results, none for others."""
    check: bool = False
    """Write nothing; exit with code 1 if the blocks differ from the JSON."""


def main(config: ReportConfig) -> int:
    """Write the page and the blocks, or check the blocks; return the exit code.

    Raises:
        ValueError: if there are no figures, or a file is of another shape.
    """
    readme = config.readme or (README if config.results == RESULTS else None)
    results = read_results(config.results, None if config.check else config.demo)
    if not results:
        commands = ", ".join(f"`{command}`" for command in MEASURED_BY.values())
        raise ValueError(f"no figures in {config.results} or {config.demo}; measure with one of {commands}")
    if not config.check:
        page = render(results).encode()
        write_atomically(config.out, lambda file: file.write(page))
        console.print(f"page: {config.out}")
    elif readme is None:
        raise ValueError(f"nothing to compare {config.results} with: give --readme")
    if readme is None:
        return 0
    for name in (name for name, figures in results.items() if figures.get("quick")):
        full = MEASURED_BY[name]
        console.print(f"{name}: figures of a quick run are not for {readme}; measure with `{full}`")
    changed = update(readme, results, check=config.check)
    for name in changed:
        state = f"differs from {config.results}; run `make report`" if config.check else "rewritten"
        console.print(f"{name} in {readme.parent}: {state}")
    if not changed:
        console.print(f"the figures in {readme} and {PAGE} agree with {config.results}")
    return int(config.check and bool(changed))


if __name__ == "__main__":
    cli.program(ReportConfig, main)
