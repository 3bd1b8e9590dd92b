"""Pictures and compiled sets that many tests share, and torch's settings, the same for all on any machine."""

import contextlib
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import numba
import pytest
import torch
from PIL import Image

from benchmarks.peers.contract import hush_numba
from benchmarks.sample_sets import colourful
from dataset_tools.convert import Sharding, convert
from dataset_tools.sources import FolderSource
from models.losses import true_float32


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


_HAS_GPU = torch.cuda.is_available()
_NUM_THREADS = int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0])


@pytest.fixture(autouse=True, scope="session")
def _one_thread_of_torch() -> None:
    """So small products are done before a second thread is awake, which beside other work only waits.

    OMP_NUM_THREADS asks for more, whatever a module has set on being imported, as stock FFCV does.
    """
    torch.set_num_threads(_NUM_THREADS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hide GPUs from tests that are not marked ``gpu``, and from the programs that they start.

    Those tests say what a CPU computes. With a GPU the device "auto" would be another one, with 16-bit
    formats, other bits and one process for each GPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        if _HAS_GPU and item.get_closest_marker("gpu") is None:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)


def _settings_of_torch() -> dict[str, object]:
    """What is global in torch and decides what is computed, apart from the number of threads."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.get_deterministic_debug_mode(),
        "gradients": torch.is_grad_enabled(),
        **{
            f"cudnn.{name}": getattr(torch.backends.cudnn, name)
            for name in ("enabled", "benchmark", "deterministic", "allow_tf32")
        },
    }


@contextlib.contextmanager
def _exact_on_gpus() -> Iterator[None]:
    """Products and convolutions in whole float32 and the same way each time; settings are restored.

    Not by torch.use_deterministic_algorithms, whose scatter_add_ makes the host wait, as some tests forbid.
    """
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with true_float32(), cudnn:
        yield


@pytest.fixture(autouse=True)
def _torch_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves one of torch's settings changed; set those for tests marked ``gpu``.

    Threads and compiled graphs are put back instead: a test may be the first to import stock FFCV, which
    sets torch to one thread.
    """
    on_gpu = request.node.get_closest_marker("gpu") is not None
    num_threads, before = torch.get_num_threads(), _settings_of_torch()
    with _exact_on_gpus() if on_gpu else contextlib.nullcontext():
        yield
    torch.set_num_threads(num_threads)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    after = _settings_of_torch()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"settings of torch that this test has changed and left so (before, after): {changed}"


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
