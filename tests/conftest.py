"""Images and compiled sets that many tests share, and the settings of torch for all tests."""

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
    """Skip a test if a package of its mark ``needs`` is missing; of several marks the closest counts."""
    if mark := item.get_closest_marker("needs"):
        for package in mark.args:
            pytest.importorskip(package)


@pytest.fixture(autouse=True, scope="session")
def _silence_numba_reports() -> None:
    """A report of numba while Python parses other code raises SystemError in Python 3.11."""
    hush_numba()


# Referenced here, because numba holds its types by weak reference.
_NUMBA_TYPES = (numba.uint8[::1], numba.uint8[:, ::1], numba.uint64[::1], numba.uint32[::1])


@pytest.fixture(autouse=True)
def _restore_numba_types() -> Iterator[None]:
    """Undo the change that FFCV makes to numba's types; see ``benchmarks.peers.with_ffcv``."""
    yield
    for array_type in _NUMBA_TYPES:
        array_type.mutable = True


_HAS_GPU = torch.cuda.is_available()
_NUM_THREADS = int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0])


@pytest.fixture(autouse=True, scope="session")
def _set_num_threads() -> None:
    """Use one thread of torch, which is fastest for the tests' small tensors, or OMP_NUM_THREADS.

    Set explicitly, because importing a module may change it, as importing FFCV does.
    """
    torch.set_num_threads(_NUM_THREADS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hide GPUs from tests that are not marked ``gpu``, and from the programs that they start.

    Those tests expect the results of a CPU. With a GPU the device "auto" would select it, with 16-bit
    formats, other results and one process per GPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        if _HAS_GPU and item.get_closest_marker("gpu") is None:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)


def _torch_settings() -> dict[str, object]:
    """Global settings of torch that affect results, except the number of threads."""
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
    """Make products and convolutions exact in float32 and deterministic; settings are restored.

    torch.use_deterministic_algorithms is not used: its scatter_add_ waits for the GPU, and some tests forbid
    such waiting.
    """
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with true_float32(), cudnn:
        yield


@pytest.fixture(autouse=True)
def _check_torch_settings(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a setting of torch changed; make the tests marked ``gpu`` exact.

    The number of threads and compiled graphs are restored instead: a test may be the first to import FFCV,
    which sets torch to one thread.
    """
    on_gpu = request.node.get_closest_marker("gpu") is not None
    num_threads, before = torch.get_num_threads(), _torch_settings()
    with _exact_on_gpus() if on_gpu else contextlib.nullcontext():
        yield
    torch.set_num_threads(num_threads)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    after = _torch_settings()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"this test left settings of torch changed (before, after): {changed}"


def photograph_like(seed: int, width: int, height: int) -> Image.Image:
    """A smooth, coloured image with some noise, as JPEG and resampling expect."""
    return Image.fromarray(colourful(seed, height, width))


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twenty JPEGs of different sizes."""
    root = tmp_path_factory.mktemp("pictures")
    sizes = ((120, 90), (90, 120), (64, 64), (200, 81))
    for label, name in enumerate(("bird", "cat")):
        (root / name).mkdir()
        for i in range(20):
            image = photograph_like(100 * label + i, *sizes[i % len(sizes)])
            image.save(root / name / f"{i:02}.JPEG", quality=92, subsampling=2 * (i % 2))
    return root


@pytest.fixture(scope="session")
def beton(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as a compiled set."""
    out = tmp_path_factory.mktemp("compiled") / "pictures.beton"
    convert(FolderSource(picture_folder), out, workers=1)
    return out


@pytest.fixture(scope="session")
def shards(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in six WebDataset shards."""
    out = tmp_path_factory.mktemp("sharded") / "pictures.shards"
    convert(FolderSource(picture_folder), out, workers=1, sharding=Sharding(shard_size=7, seed=1))
    return out
