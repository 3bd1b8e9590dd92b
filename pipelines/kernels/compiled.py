"""Compile inner loops with numba (:func:`kernel`), and call C functions from them.

numba compiles a decorated Python function to machine code at its first call, once for each combination of
argument types, and caches the code on disk. It uses the cached code until the file of that function changes,
even if another file changes from which the function uses a function or a constant. So :func:`kernel` names
the cache folder after a hash of the code of the whole ``pipelines`` package, without docstrings and comments.
After any change of the code, all kernels are compiled again.

numba cannot cache code that calls ctypes functions. So compiled code takes the address of a C function as an
integer (:func:`address_of`) and calls it by :func:`call_int` or :func:`call_int64`.
"""

# numba inspects the arguments of an intrinsic, so unused ones must stay.
# ruff: noqa: ARG001

import ctypes
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

_HERE = Path(__file__).parent
_PACKAGE = _HERE.parent
_Function = TypeVar("_Function", bound=Callable[..., Any])


def kernel(function: _Function) -> _Function:
    """Compile a function at its first call. It runs without the GIL; a division by zero gives infinity."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(_cache_folder(before))
    try:
        compiled: _Function = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = before
    return compiled


def kernels_are_cached() -> bool:
    """Whether kernels of this version are cached on disk. If not, the first batch takes about 15 s longer."""
    return any(_cache_folder(numba.config.CACHE_DIR).rglob("*.nbi"))


def _cache_folder(numba_cache_dir: str) -> Path:
    """Below NUMBA_CACHE_DIR if that is set, else next to the sources, else in the user's cache folder."""
    if numba_cache_dir:
        return Path(numba_cache_dir) / _SOURCES
    folder = _HERE / "__pycache__"
    if not os.access(folder if folder.exists() else _HERE, os.W_OK):
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "maskmix"
    return folder / f"kernels-{_SOURCES}"


def hash_of_sources(folder: Path) -> str:
    """Hash the code of all modules below a folder, without docstrings and comments."""
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
            # The order of a set of strings is different in every process.
            add(repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode())


_SOURCES = hash_of_sources(_PACKAGE)


def address_of(function: Callable[..., Any]) -> int:
    """The address of a ctypes function."""
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None
    return address


def _call(returns: types.Type, bits: int, address: Any, arguments: Any) -> Any:
    """The signature of an intrinsic, and a function that emits the LLVM code of the call."""
    if not all(isinstance(kind, types.Integer) for kind in arguments):
        raise TypingError(f"only integers and addresses can be passed to a C function, not {arguments}")

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        int64 = ir.IntType(64)
        kinds = signature.args[1].types
        # Integers and pointers are all passed as 64 bits. The called function reads the bits that it
        # declares.
        passed = [
            context.cast(builder, builder.extract_value(values[1], i), kind, types.int64)
            for i, kind in enumerate(kinds)
        ]
        function = ir.FunctionType(ir.IntType(bits), [int64] * len(passed))
        target = context.cast(builder, values[0], signature.args[0], types.int64)
        return builder.call(builder.inttoptr(target, function.as_pointer()), passed)

    return returns(address, arguments), code


@intrinsic
def call_int(typing: Any, address: Any, arguments: Any) -> Any:
    """Call a C function that returns an int; ``arguments`` is a tuple of integers and addresses."""
    return _call(types.int32, 32, address, arguments)


@intrinsic
def call_int64(typing: Any, address: Any, arguments: Any) -> Any:
    """Call a C function that returns a pointer or a 64-bit integer; ``arguments`` as of :func:`call_int`."""
    return _call(types.int64, 64, address, arguments)
