"""What the tests of several benchmarks need."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sample_sets import SampleSet


class Sets:
    """The sets of the tests' pictures, in place of those that a benchmark makes."""

    def __init__(self, reencoded: SampleSet) -> None:
        self.reencoded = reencoded

    def facts(self) -> dict[str, Any]:
        """As SampleSets tells them."""
        return {"reencoded": self.reencoded.facts()}


@pytest.fixture
def sample_sets(picture_folder: Path, beton: Path, shards: Path) -> Callable[..., Sets]:
    """What a benchmark can take for SampleSets: it makes nothing and has the tests' pictures."""
    return lambda data, num, progress: Sets(SampleSet(picture_folder, beton, shards, "made for tests"))
