"""All measured figures on one page, and those of the loader and of training in the README.

    make report

Reads loader.json, half_hour.json, scale.json, step.json, race.json and evidence.json of benchmarks/results/
and the last demo's summary, those that are there; writes runs/report.html, a single file that needs no
network, the two blocks of figures in README.md and the picture that one of them shows. With ``--check``
nothing is written: it ends with code 1 where README or picture differ from what the JSON gives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.report import training_block
from benchmarks.report.half_hour import read_half_hour
from benchmarks.report.page import picture, render
from benchmarks.report.readme import BLOCK, block
from benchmarks.report.results import (
    LoaderFigures,
    ScaleFigures,
    read_demo,
    read_loader,
    read_scale,
)
from benchmarks.report.training import TrainingFigures, read_training
from training import cli
from training.cli import console
from training.files import write_atomically

RESULTS = Path("benchmarks/results")
README = Path("README.md")
T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """Draw the page of measured figures and write the README's blocks of them."""

    results: Path = RESULTS
    """Folder of the benchmarks' JSON files."""
    demo: Path = Path("runs/demo")
    """Folder of the last demo."""
    out: Path = Path("runs/report.html")
    """The page to write."""
    readme: Path | None = None
    """File with the blocks to write; by default README.md for the committed results, none for others."""
    check: bool = False
    """Write nothing; end with code 1 where the blocks are not what the JSON gives."""


def main(config: Report) -> int:
    """Write page and blocks, or check the blocks; returns the exit code.

    Raises:
        ValueError: if there are no figures, or a file is of another shape.
    """
    loader = _if_there(config.results / "loader.json", read_loader)
    scale = _if_there(config.results / "scale.json", read_scale)
    readme = config.readme or (README if config.results == RESULTS else None)
    training = read_training(config.results)
    if config.check:
        if readme is None or not (loader or list(training)):
            raise ValueError(
                "nothing to check: give --readme and a folder of results with loader.json or training's "
                f"figures, not {config.results}"
            )
        wrong = _check(readme, loader, scale, config.results) if loader else False
        return int(_check_training(readme, training, config.results) or wrong)
    half_hour = _if_there(config.results / "half_hour.json", read_half_hour)
    demo = _if_there(config.demo / "summary.json", read_demo)
    if not (loader or half_hour or scale or demo or list(training)):
        raise ValueError(
            f"no figures in {config.results} or {config.demo}; measure with `make bench`, `make half-hour`, "
            "`make scale`, `make step`, `make race`, `make evidence` or `make demo`"
        )
    page = render(loader, scale, demo, half_hour, training)
    write_atomically(config.out, lambda file: file.write(page.encode()))
    console.print(f"page: {config.out}")
    if readme and loader:
        _rewrite(readme, loader, scale)
    if readme:
        _rewrite_training(readme, training)
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


def _rewrite_training(readme: Path, training: TrainingFigures) -> None:
    for name in (name for name, figures in vars(training).items() if figures and figures.quick):
        console.print(f"{name}: a quick run's figures are not for {readme}; measure with `make {name}`")
    block, drawn = training_block.block(training), _drawn(training)
    if block == training_block.EMPTY and not training_block.is_in(readme):
        return
    current = _is_current(readme, block, drawn)
    training_block.BLOCK.rewrite(readme, block)
    if drawn and not current:
        write_atomically(readme.parent / training_block.PICTURE, lambda file: file.write(drawn.encode()))
    console.print(f"{readme}, training: {'figures are up to date' if current else 'figures rewritten'}")


def _drawn(training: TrainingFigures) -> str | None:
    evidence = training.full().evidence
    return picture(evidence) if evidence else None


def _is_current(readme: Path, block: str, drawn: str | None) -> bool:
    """Whether the README has the block, and the picture is as it was drawn."""
    file = readme.parent / training_block.PICTURE
    seen = file.read_text(encoding="utf-8") if drawn and file.is_file() else None
    return training_block.BLOCK.current(readme) == block and seen == drawn


def _check(readme: Path, loader: LoaderFigures, scale: ScaleFigures | None, results: Path) -> bool:
    """Whether the README's loader figures are not those of ``results``."""
    if loader.quick:
        console.print(
            f"{results} holds the figures of a quick run, which are not for {readme}; run `make bench`"
        )
        return True
    wrong = BLOCK.current(readme) != block(loader, scale)
    console.print(_told("loader", readme, results, wrong))
    return wrong


def _check_training(readme: Path, training: TrainingFigures, results: Path) -> bool:
    """Whether the README's training figures, or their picture, are not those of ``results``."""
    block = training_block.block(training)
    if block == training_block.EMPTY and not training_block.is_in(readme):
        return False
    wrong = not _is_current(readme, block, _drawn(training))
    console.print(_told("training", readme, results, wrong))
    return wrong


def _told(what: str, readme: Path, results: Path, wrong: bool) -> str:
    are = "are not those of {}; run `make report`" if wrong else "are those of {}"
    return f"the {what} figures in {readme} {are.format(results)}"


if __name__ == "__main__":
    cli.program(Report, main)
