"""Fixtures of several benchmarks."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import evidence, probes
from benchmarks import programs as running
from benchmarks.sample_sets import SampleSet
from examples import demo

ROOT = Path(__file__).resolve().parents[2]


class Sets:
    """The compiled sets of the tests' images, in place of those that a benchmark makes."""

    def __init__(self, reencoded: SampleSet) -> None:
        self.reencoded = reencoded

    def facts(self) -> dict[str, Any]:
        """Like `SampleSets.facts`."""
        return {"reencoded": self.reencoded.facts()}


@pytest.fixture
def sample_sets(picture_folder: Path, beton: Path, shards: Path) -> Callable[..., Sets]:
    """A replacement for SampleSets that makes nothing and has the tests' images."""
    return lambda data, num, progress: Sets(SampleSet(picture_folder, beton, shards, "made for tests"))


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of our programs that were run; they run in this process, so imports are done once."""
    ran: list[list[str]] = []

    def run_here(console: Console, *words: object) -> None:
        program = [str(word) for word in words]
        ran.append(program)
        as_module = program[0] == "-m"
        monkeypatch.setattr(sys, "argv", program[1:] if as_module else program)
        try:
            if as_module:
                runpy.run_module(program[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / program[0]), run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, program

    for module in (running, demo, evidence, probes):
        monkeypatch.setattr(module, "run_python", run_here)
    return ran
