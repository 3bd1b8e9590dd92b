"""Where libturbojpeg is found, and that it has every function that is used."""

import ctypes
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.kernels import turbojpeg


@pytest.fixture
def look_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[], ctypes.CDLL]:
    """``library`` without its cache, where LIBTURBOJPEG is unset and FFCV is missing."""
    monkeypatch.delenv("LIBTURBOJPEG", raising=False)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    found: Callable[[], ctypes.CDLL] = turbojpeg.library.__wrapped__
    return found


@pytest.fixture
def a_library() -> Path:
    """The file of a libturbojpeg that works on this machine."""
    turbojpeg.library()
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libturbojpeg" in line:
            return Path(line.split(maxsplit=5)[5])
    pytest.skip("libturbojpeg is part of another library here")


def pretend_ffcv(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install an FFCV that must not be imported; returns the path for its compiled module."""
    package = folder / "ffcv"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('FFCV is imported')")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "ffcv")
    return package / "_libffcv.cpython-399-x86_64-linux-gnu.so"


def test_the_systems_library_is_found(look_up: Callable[[], ctypes.CDLL]) -> None:
    try:
        ctypes.CDLL("libturbojpeg.so.0")
    except OSError:
        pytest.skip("the system has no libturbojpeg")
    assert look_up()._name == "libturbojpeg.so.0"


def test_the_named_library_precedes_ffcvs_which_precedes_the_systems(
    look_up: Callable[[], ctypes.CDLL], a_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = pretend_ffcv(tmp_path, monkeypatch)
    shutil.copy(a_library, compiled)
    assert look_up()._name == str(compiled)
    monkeypatch.setenv("LIBTURBOJPEG", str(a_library))
    assert look_up()._name == str(a_library)
    assert "ffcv" not in sys.modules


def test_an_ffcv_that_does_not_load_is_skipped(
    look_up: Callable[[], ctypes.CDLL], a_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = pretend_ffcv(tmp_path, monkeypatch)
    compiled.write_text("no library")
    monkeypatch.setattr(turbojpeg, "_SYSTEM_NAME", str(a_library))
    assert look_up()._name == str(a_library)
    monkeypatch.setattr(turbojpeg, "_SYSTEM_NAME", "libm.so.6")
    with pytest.raises(
        ImportError, match=r"_libffcv.*; .*undefined symbol: tj\w+\); install it with `apt-get install"
    ):
        look_up()


def test_a_missing_library_is_an_error_that_says_what_to_do(
    look_up: Callable[[], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turbojpeg, "_SYSTEM_NAME", "libnowhere.so.0")
    with pytest.raises(ImportError) as none:
        look_up()
    assert re.fullmatch(
        r"libturbojpeg 2\.0 or newer was not found \(libnowhere\.so\.0: [^)]*\); "
        r"install it with `apt-get install libturbojpeg0`, or set LIBTURBOJPEG to its path",
        str(none.value),
    )


@pytest.mark.parametrize(
    ("name", "why"), [("libm.so.6", "undefined symbol: tj"), ("/nowhere/libturbojpeg.so", "cannot open")]
)
def test_a_wrong_name_is_an_error(
    look_up: Callable[[], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch, name: str, why: str
) -> None:
    monkeypatch.setenv("LIBTURBOJPEG", name)
    with pytest.raises(ValueError, match=rf"LIBTURBOJPEG is '{name}'.*{why}.*unset the variable"):
        look_up()


@pytest.mark.parametrize("missing", sorted(turbojpeg._FUNCTIONS))
def test_every_declared_function_must_be_found(
    missing: str, look_up: Callable[[], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that an older library lacks is reported at the start, not in the middle of a run."""

    class Older(ctypes.CDLL):
        def __getattr__(self, name: str) -> Any:
            if name == missing:
                raise AttributeError(f"undefined symbol: {name}")
            return super().__getattr__(name)

    monkeypatch.setattr(ctypes, "CDLL", Older)
    with pytest.raises(ImportError, match=f"undefined symbol: {missing}"):
        look_up()


def test_every_function_used_is_declared() -> None:
    for file in Path(turbojpeg.__file__).parents[1].rglob("*.py"):
        text = file.read_text()
        called = set(re.findall(r"(?:_lib|lib|found)\.(tj[A-Z]\w+)", text))
        assert called <= turbojpeg._FUNCTIONS.keys(), file
