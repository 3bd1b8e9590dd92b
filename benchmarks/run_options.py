"""What the programs that let loaders take turns share: options, and the bars that show how far they are."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from benchmarks.sample_sets import PHOTOGRAPHS

CROP_PX = 224
"""Side of the views."""


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    pictures: int
    batch_size: int
    turns: int
    seconds: float

    def config(self, threads: int) -> dict[str, float]:
        """The JSON's ``config``."""
        return {
            "threads": threads,
            "batch_size": self.batch_size,
            "crop_px": CROP_PX,
            "turns": self.turns,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class RunOptions:
    """How much is measured, on what, and where the figures go."""

    quick: bool = False
    """Fewer pictures, smaller batches, fewer and shorter turns; for a look, not for figures."""
    threads: int = 0
    """Threads, or processes, of each loader; 0 takes all cores."""
    json: Path | None = None
    """Where the figures go."""
    data: Path = Path("data")
    """Folder of the sample sets; what is missing is made there."""
    pictures: int | None = None
    """Photographs in each set: 2,000, or 128 with --quick."""
    batch_size: int | None = None
    """Pictures per batch: 64, or 16 with --quick."""
    turns: int | None = None
    """Turns of each after its warm-up: 5, or 2 with --quick."""
    seconds: float | None = None
    """Least length of a turn: 4, or 0.5 with --quick."""

    def full(self) -> Scale:
        """What a run for figures measures."""
        return Scale(pictures=PHOTOGRAPHS, batch_size=64, turns=5, seconds=4.0)

    def brief(self) -> Scale:
        """What a run with ``--quick`` measures."""
        return Scale(pictures=128, batch_size=16, turns=2, seconds=0.5)

    def scale(self) -> Scale:
        """How much is measured: what is given, else the default of a full or a quick run.

        Raises ValueError for batches larger than the set.
        """
        usual = self.brief() if self.quick else self.full()
        scale = Scale(
            usual.pictures if self.pictures is None else self.pictures,
            usual.batch_size if self.batch_size is None else self.batch_size,
            usual.turns if self.turns is None else self.turns,
            usual.seconds if self.seconds is None else self.seconds,
        )
        if not 1 <= scale.batch_size <= scale.pictures:
            raise ValueError(
                f"a batch of {scale.batch_size} pictures does not fit a set of {scale.pictures}; "
                f"choose --batch-size in 1 … {scale.pictures}"
            )
        return scale

    def keep_full_figures(self) -> None:
        """Raise ValueError where the figures of a quick run would replace those of a full one."""
        if self.quick and self.json and self.json.is_file() and not _is_quick(self.json):
            raise ValueError(f"{self.json} holds a full run's figures; give a quick run another --json")


def _is_quick(figures: Path) -> bool:
    return bool(json.loads(figures.read_text()).get("quick"))


class Bars:
    """Two progress bars: the parts of the run, and the steps of the present one."""

    def __init__(self, display: Progress, num_parts: int) -> None:
        self._display = display
        self._parts = display.add_task("", total=num_parts, completed=-1)
        self._steps = display.add_task("", total=None)

    def next_part(self, name: str) -> None:
        """A part begins."""
        self._display.update(self._parts, advance=1, description=name)

    def note(self, what: str) -> None:
        """Say what is being done beside the steps."""
        self._display.update(self._steps, description=what)

    def steps(self, total: int) -> Callable[[str], None]:
        """Steps begin, as many as told; the function given back is to be told of each before it is done."""
        self._display.reset(self._steps, total=total, completed=-1)

        def step(name: str) -> None:
            self._display.update(self._steps, advance=1, description=name)

        return step
