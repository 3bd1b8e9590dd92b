"""Pictures and compiled sets that many tests share."""

from collections.abc import Iterator
from pathlib import Path

import numba
import pytest
from PIL import Image

from benchmarks.parity.samples import colourful
from benchmarks.peers.contract import hush_numba
from dataset_tools.convert import Sharding, convert
from dataset_tools.sources import FolderSource


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test where a package of its mark ``needs`` is missing; of several marks the closest counts."""
    if mark := item.get_closest_marker("needs"):
        for package in mark.args:
            pytest.importorskip(package)


@pytest.fixture(autouse=True, scope="session")
def _no_reports_of_numba() -> None:
    """Where such a report comes in the middle of Python's parsing of other code, 3.11 raises SystemError."""
    hush_numba()


# Held from the start, because numba keeps its types by weak reference.
_NUMBA_TYPES = (numba.uint8[::1], numba.uint8[:, ::1], numba.uint64[::1], numba.uint32[::1])


@pytest.fixture(autouse=True)
def _numba_as_it_was() -> Iterator[None]:
    """Undo what stock FFCV's memory managers do to numba's types; see ``benchmarks.peers.with_ffcv``."""
    yield
    for array_type in _NUMBA_TYPES:
        array_type.mutable = True


def photograph_like(seed: int, width: int, height: int) -> Image.Image:
    """A smooth, coloured picture with some noise: what JPEG and resampling are made for."""
    return Image.fromarray(colourful(seed, height, width))


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twenty JPEGs of different sizes."""
    root = tmp_path_factory.mktemp("pictures")
    sizes = ((120, 90), (90, 120), (64, 64), (200, 81))
    for label, name in enumerate(("bird", "cat")):
        (root / name).mkdir()
        for i in range(20):
            picture = photograph_like(100 * label + i, *sizes[i % len(sizes)])
            picture.save(root / name / f"{i:02}.JPEG", quality=92, subsampling=2 * (i % 2))
    return root


@pytest.fixture(scope="session")
def beton(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures compiled."""
    out = tmp_path_factory.mktemp("compiled") / "pictures.beton"
    convert(FolderSource(picture_folder), out, workers=1)
    return out


@pytest.fixture(scope="session")
def shards(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures in six WebDataset shards."""
    out = tmp_path_factory.mktemp("sharded") / "pictures.shards"
    convert(FolderSource(picture_folder), out, workers=1, sharding=Sharding(shard_size=7, seed=1))
    return out
