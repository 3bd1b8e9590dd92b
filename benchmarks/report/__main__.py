"""All measured figures on one page, and the loader's in the README.

    make report

Reads loader.json, gpu.json and scale.json of benchmarks/results/ and the last demo's summary, those that are
there; writes runs/report.html, a single file that needs no network, and the block of loader figures in
README.md. With ``--check`` nothing is written: it ends with code 1 where the README differs from what the
JSON gives.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro
from rich.console import Console

from benchmarks.report.page import render
from benchmarks.report.readme import BLOCK, block
from benchmarks.report.results import (
    LoaderFigures,
    ScaleFigures,
    read_demo,
    read_gpu,
    read_loader,
    read_scale,
)
from engine import cli
from engine.checkpoint import write_atomically

console = Console(highlight=False, soft_wrap=True)
RESULTS = Path("benchmarks/results")
README = Path("README.md")
T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """Draw the page of measured figures and write the README's block of them."""

    results: Path = RESULTS
    """Folder of the benchmarks' JSON files."""
    demo: Path = Path("runs/demo")
    """Folder of the last demo."""
    out: Path = Path("runs/report.html")
    """The page to write."""
    readme: Path | None = None
    """File with the block to write; by default README.md for the committed results, none for others."""
    check: bool = False
    """Write nothing; end with code 1 where the block is not what the JSON gives."""


def main(config: Report) -> int:
    """Write page and block, or check the block; returns the exit code.

    Raises:
        ValueError: if there are no figures, or a file is of another shape.
    """
    loader = _if_there(config.results / "loader.json", read_loader)
    scale = _if_there(config.results / "scale.json", read_scale)
    readme = config.readme or (README if config.results == RESULTS else None)
    if config.check:
        return _check(readme, loader, scale, config.results)
    gpu = _if_there(config.results / "gpu.json", read_gpu)
    demo = _if_there(config.demo / "summary.json", read_demo)
    if not (loader or gpu or scale or demo):
        raise ValueError(
            f"no figures in {config.results} or {config.demo}; measure with `make bench`, `make bench-gpu`, "
            "`make scale` or `make demo`"
        )
    page = render(loader, scale, demo, gpu)
    write_atomically(config.out, lambda file: file.write(page.encode()))
    console.print(f"page: {config.out}")
    if readme and loader:
        _rewrite(readme, loader, scale)
    return 0


def _if_there(file: Path, read: Callable[[Path], T]) -> T | None:
    return read(file) if file.is_file() else None


def _rewrite(readme: Path, loader: LoaderFigures, scale: ScaleFigures | None) -> None:
    if loader.quick:
        console.print(
            f"{readme} keeps its figures: those of a quick run are not for it; measure with `make bench`"
        )
        return
    changed = BLOCK.rewrite(readme, block(loader, scale))
    console.print(f"{readme}: {'figures rewritten' if changed else 'figures are up to date'}")


def _check(
    readme: Path | None, loader: LoaderFigures | None, scale: ScaleFigures | None, results: Path
) -> int:
    if readme is None or loader is None:
        raise ValueError(
            f"nothing to check: give --readme and a folder of results with loader.json, not {results}"
        )
    if loader.quick:
        console.print(
            f"{results} holds the figures of a quick run, which are not for {readme}; run `make bench`"
        )
        return 1
    if BLOCK.current(readme) != block(loader, scale):
        console.print(f"the loader figures in {readme} are not those of {results}; run `make report`")
        return 1
    console.print(f"the loader figures in {readme} are those of {results}")
    return 0


if __name__ == "__main__":
    cli.run(functools.partial(lambda argv: sys.exit(main(tyro.cli(Report, args=argv))), sys.argv[1:]))
