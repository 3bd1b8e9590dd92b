"""Calls from compiled code to C functions given by address.

numba can call ctypes functions, but then refuses to keep the compiled code on disk; an address is a number
like any other.
"""

# numba reads the number and the names of an intrinsic's arguments, used or not.
# ruff: noqa: ARG001

import ctypes
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic


def address_of(function: Callable[..., Any]) -> int:
    """Where a ctypes function lies."""
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None
    return address


def _call(returns: types.Type, bits: int, address: Any, arguments: Any) -> Any:
    if not all(isinstance(kind, types.Integer) for kind in arguments):
        raise TypingError(f"only integers and addresses can be passed to a C function, not {arguments}")

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        kinds = signature.args[1].types
        # Integers and pointers alike travel in 64 bits; the callee looks at the part it declares.
        passed = [
            context.cast(builder, builder.extract_value(values[1], i), kind, types.int64)
            for i, kind in enumerate(kinds)
        ]
        function = ir.FunctionType(ir.IntType(bits), [word] * len(passed))
        place = context.cast(builder, values[0], signature.args[0], types.int64)
        return builder.call(builder.inttoptr(place, function.as_pointer()), passed)

    return returns(address, arguments), code


@intrinsic
def call_int(typing: Any, address: Any, arguments: Any) -> Any:
    """Call a function that returns a C int with a tuple of integers and addresses."""
    return _call(types.int32, 32, address, arguments)


@intrinsic
def call_word(typing: Any, address: Any, arguments: Any) -> Any:
    """Call a function that returns a pointer or a 64-bit integer."""
    return _call(types.int64, 64, address, arguments)
