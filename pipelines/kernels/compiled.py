"""How the loader's inner loops are compiled: ``@kernel``.

numba caches machine code on disk and invalidates it only when the file of the function itself changes, not
when a function or a constant that it uses from another file does. Here the cache folder is named after a hash
of the code of the whole ``pipelines`` package, without docstrings and comments, so an update never runs old
code.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

import numba

_HERE = Path(__file__).parent
_PACKAGE = _HERE.parent
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
    """A name for the code of all modules below a folder; docstrings and comments do not count."""
    hasher = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        hasher.update(str(file.relative_to(folder)).encode())
        _add_code(compile(file.read_bytes(), "", "exec", optimize=2, dont_inherit=True), hasher.update)
    return hasher.hexdigest()[:16]


def _add_code(code: CodeType, add: Callable[[bytes], None]) -> None:
    add(code.co_code)
    add(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _add_code(constant, add)
        else:
            # The order of a set of strings differs from process to process.
            add(repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode())


_SOURCES = hash_of_sources(_PACKAGE)
