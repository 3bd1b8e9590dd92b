"""Looking for a JPEG unit with nvJPEG: calls, statuses, and constants compared with its header."""

import contextlib
import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.decode import choose
from pipelines.decode.choose import (
    ARCH_MISMATCH,
    BACKEND_HARDWARE,
    SUCCESS,
    JpegUnit,
    find_jpeg_unit,
    nvjpeg_libraries,
)

GPU = torch.device("cuda", 0)
HANDLE = 0x7F0000001234


class FakeNvjpeg:
    """A library that returns one status and records its calls."""

    def __init__(self, status: int) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.destroyed: list[int | None] = []

        def create(backend: int, device_memory: Any, host_memory: Any, flags: int, handle: Any) -> int:
            self.made.append((backend, device_memory, host_memory, flags))
            if status == SUCCESS:
                handle._obj.value = HANDLE
            return status

        def destroy(handle: ctypes.c_void_p) -> int:
            self.destroyed.append(handle.value)
            return SUCCESS

        # Argument types are assigned to ctypes functions, so these must have attributes.
        self.nvjpegCreateEx: Callable[..., int] = create
        self.nvjpegDestroy: Callable[..., int] = destroy


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices made current, on a machine without any."""
    devices: list[torch.device] = []

    def device(which: torch.device) -> contextlib.AbstractContextManager[None]:
        devices.append(which)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


def test_a_hardware_decoder_is_created_on_its_device_and_destroyed(current: list[torch.device]) -> None:
    library = FakeNvjpeg(SUCCESS)
    assert find_jpeg_unit(GPU, lambda _: library) == JpegUnit(True)
    assert library.made == [(BACKEND_HARDWARE, None, None, 0)]
    assert library.destroyed == [HANDLE]
    assert current == [GPU]


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (ARCH_MISMATCH, "nvJPEG reports no JPEG unit (status 7)"),
        (6, "could not look for a JPEG unit (status 6)"),
    ],
)
def test_any_other_status_means_no_unit(current: list[torch.device], status: int, says: str) -> None:
    library = FakeNvjpeg(status)
    unit = find_jpeg_unit(GPU, lambda _: library)
    assert not unit.present and unit.reason.endswith(says)
    assert library.made and not library.destroyed, "there is nothing to destroy"


def test_a_missing_library_means_no_unit_and_names_the_command(current: list[torch.device]) -> None:
    tried: list[str] = []

    def nowhere(name: str) -> Any:
        tried.append(name)
        raise OSError(name)

    unit = find_jpeg_unit(GPU, nowhere)
    assert unit == JpegUnit(False, "nvJPEG's library was not found (pip install nvidia-nvjpeg)")
    assert tried[-2:] == ["libnvjpeg.so.13", "libnvjpeg.so.12"]


def test_wheels_come_first_and_the_newest_of_them(
    current: list[torch.device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older library may work if the newest is too new for the driver."""
    for folder, name in (("nvjpeg", "libnvjpeg.so.12"), ("cu13", "libnvjpeg.so.13")):
        (tmp_path / folder / "lib").mkdir(parents=True)
        (tmp_path / folder / "lib" / name).touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: spec if name == "nvidia" else None)
    tried: list[str] = []

    def load(name: str) -> FakeNvjpeg:
        tried.append(Path(name).name)
        return FakeNvjpeg(SUCCESS if name.endswith("12") else 1)

    assert find_jpeg_unit(GPU, load) == JpegUnit(True)
    assert tried == ["libnvjpeg.so.13", "libnvjpeg.so.12"]


def test_a_cpu_is_not_examined() -> None:
    library = FakeNvjpeg(SUCCESS)
    with pytest.raises(AssertionError, match="only a GPU"):
        find_jpeg_unit(torch.device("cpu"), lambda _: library)
    assert not library.made


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which may have a unit")
def test_the_real_library_reports_no_unit_without_a_gpu(current: list[torch.device]) -> None:
    if not any(Path(name).exists() for name in nvjpeg_libraries()):
        pytest.skip("nvJPEG is not installed")
    assert re.search(r"JPEG unit \(status [1-9]\d*\)$", find_jpeg_unit(GPU).reason)


def test_the_constants_are_those_of_the_header() -> None:
    libraries = [Path(name) for name in nvjpeg_libraries() if Path(name).exists()]
    headers = [file.parents[1] / "include" / "nvjpeg.h" for file in libraries]
    header = next((file for file in headers if file.exists()), None)
    if header is None:
        pytest.skip("nvJPEG's header is not installed")
    numbers = dict(re.findall(r"(NVJPEG_\w+)\s*=\s*(\d+)", header.read_text()))
    assert int(numbers["NVJPEG_BACKEND_HARDWARE"]) == BACKEND_HARDWARE
    assert int(numbers["NVJPEG_STATUS_SUCCESS"]) == SUCCESS
    assert int(numbers["NVJPEG_STATUS_ARCH_MISMATCH"]) == ARCH_MISMATCH
