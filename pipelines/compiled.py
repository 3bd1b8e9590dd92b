"""How the loader's inner loops are compiled: ``@kernel``.

numba keeps machine code on disk and asks only whether the file of the function itself has changed; what was
compiled into it from other files, a function or a constant, would stay as it was. Here the place on disk is
named after the contents of all files of this package, so an update never runs old code.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

_HERE = Path(__file__).parent
_Function = TypeVar("_Function", bound=Callable[..., Any])


def kernel(function: _Function) -> _Function:
    """Compile at the first call; no lock is held inside, and a division by zero gives infinity."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(_cache_folder(before))
    try:
        compiled: _Function = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = before
    return compiled


def compiled_before() -> bool:
    """Whether kernels of these sources lie on disk; else the first batch takes some fifteen seconds."""
    return any(_cache_folder(numba.config.CACHE_DIR).rglob("*.nbi"))


def _cache_folder(wanted: str) -> Path:
    """Below NUMBA_CACHE_DIR where that is set, else beside the sources, else in the user's own cache."""
    if wanted:
        return Path(wanted) / _SOURCES
    beside = _HERE / "__pycache__"
    if not os.access(beside if beside.exists() else _HERE, os.W_OK):
        beside = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "maskmix"
    return beside / f"kernels-{_SOURCES}"


def hash_of_sources(folder: Path) -> str:
    """A name for the contents of a folder's modules."""
    hasher = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        hasher.update(file.name.encode() + b"\0" + file.read_bytes())
    return hasher.hexdigest()[:16]


_SOURCES = hash_of_sources(_HERE)
