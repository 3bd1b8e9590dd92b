"""SIMD vectors of sixteen 16-bit integers as a numba type, and the operations that resampling needs.

numba widens every integer product to 64 bits, and LLVM does not vectorise transposes. So a plain loop over
bytes has a fifth of the speed of these vectors. The functions here are numba *intrinsics*: each returns its
type signature and a function that emits LLVM instructions when a kernel is compiled. LLVM translates its
portable vector instructions to AVX2, SSE or NEON. The functions can only be called in kernels.

A lane is one of the sixteen numbers of a vector. Arithmetic is modulo 2¹⁶. Lanes are unsigned, except in
functions with ``signed`` in their name. Indices are not checked: every array that is loaded from or stored to
must have 16 more elements at its end.
"""

# numba inspects the arguments of an intrinsic, so unused ones must stay.
# ruff: noqa: ARG001

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

LANES = 16
_I16 = ir.VectorType(ir.IntType(16), LANES)
_I32 = ir.VectorType(ir.IntType(32), LANES)
_U8 = ir.VectorType(ir.IntType(8), LANES)


class _Vector(types.Type):
    """The numba type of a vector."""

    def __init__(self) -> None:
        super().__init__("Vector")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    """The LLVM type by which numba represents a vector."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _I16)


def _constant(value: int, kind: ir.VectorType = _I16) -> ir.Constant:
    """A constant vector with the same value in every lane."""
    return ir.Constant(kind, [value] * LANES)


def _mask(order: list[int]) -> ir.Constant:
    """The mask of LLVM's shufflevector: the lanes to take, in order."""
    return ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)


def _pointer(
    context: Any, builder: Any, kinds: Any, arguments: Any, array: int, index: int, to: ir.Type
) -> Any:
    """A pointer to element ``arguments[index]`` of the flat array ``arguments[array]``, of type ``to``."""
    memory = context.make_array(kinds[array])(context, builder, arguments[array]).data
    offset = context.cast(builder, arguments[index], kinds[index], types.intp)
    return builder.bitcast(builder.gep(memory, [offset]), to.as_pointer())


@intrinsic
def load_u8(typing: Any, array: Any, index: Any) -> Any:
    """Load sixteen bytes of a flat uint8 array from ``index`` on, one per lane."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _pointer(context, builder, signature.args, arguments, 0, 1, _U8)
        return builder.zext(builder.load(place, align=1), _I16)

    return vector(array, index), code


@intrinsic
def load_u16(typing: Any, array: Any, index: Any) -> Any:
    """Load sixteen elements of a flat uint16 array from ``index`` on."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _pointer(context, builder, signature.args, arguments, 0, 1, _I16)
        return builder.load(place, align=1)

    return vector(array, index), code


@intrinsic
def store_u16(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Store the lanes in a flat uint16 array from ``index`` on."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _pointer(context, builder, signature.args, arguments, 0, 1, _I16)
        builder.store(arguments[2], place, align=1)
        return context.get_dummy_value()

    return types.void(array, index, value), code


@intrinsic
def store_u8(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Store the lanes, read as signed and clamped to 0 … 255, in a flat uint8 array from ``index`` on."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _pointer(context, builder, signature.args, arguments, 0, 1, _U8)
        low, high = _constant(0), _constant(255)
        value = arguments[2]
        value = builder.select(builder.icmp_signed("<", value, low), low, value)
        value = builder.select(builder.icmp_signed(">", value, high), high, value)
        builder.store(builder.trunc(value, _U8), place, align=1)
        return context.get_dummy_value()

    return types.void(array, index, value), code


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """A vector with the same number in every lane."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.cast(builder, arguments[0], signature.args[0], types.uint16)
        undefined = ir.Constant(_I16, ir.Undefined)
        first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, undefined, _mask([0] * LANES))

    return vector(value), code


def _by_lane(operation: Callable[[Any, Any, Any], Any]) -> Any:
    """Signature and code of an operation on two vectors, lane by lane."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return operation(builder, *arguments)

    return vector(vector, vector), code


@intrinsic
def add(typing: Any, a: Any, b: Any) -> Any:
    """a + b, modulo 2¹⁶."""
    return _by_lane(lambda builder, x, y: builder.add(x, y))


@intrinsic
def sub(typing: Any, a: Any, b: Any) -> Any:
    """a − b, modulo 2¹⁶."""
    return _by_lane(lambda builder, x, y: builder.sub(x, y))


def _upper_half(builder: Any, product: Any) -> Any:
    """The upper 16 bits of 32-bit lanes. LLVM combines this and the product into one instruction."""
    return builder.trunc(builder.lshr(product, _constant(16, _I32)), _I16)


@intrinsic
def mul_high(typing: Any, a: Any, b: Any) -> Any:
    """(a · b) >> 16 of unsigned lanes."""
    return _by_lane(
        lambda builder, x, y: _upper_half(builder, builder.mul(builder.zext(x, _I32), builder.zext(y, _I32)))
    )


@intrinsic
def mul_high_signed(typing: Any, a: Any, b: Any) -> Any:
    """(a · b) >> 16 of signed lanes."""
    return _by_lane(
        lambda builder, x, y: _upper_half(builder, builder.mul(builder.sext(x, _I32), builder.sext(y, _I32)))
    )


def _shift(kind: str, bits: Any) -> Any:
    """Signature and code of a shift by the builder's method ``kind``."""
    number = bits.literal_value

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return getattr(builder, kind)(arguments[0], _constant(number))

    return vector(vector, bits), code


@intrinsic(prefer_literal=True)
def shift_left(typing: Any, a: Any, bits: Any) -> Any:
    """Shift every lane left by ``bits``, a constant."""
    return _shift("shl", bits)


@intrinsic(prefer_literal=True)
def shift_right(typing: Any, a: Any, bits: Any) -> Any:
    """Shift every unsigned lane right by ``bits``, a constant."""
    return _shift("lshr", bits)


@intrinsic(prefer_literal=True)
def shift_right_signed(typing: Any, a: Any, bits: Any) -> Any:
    """Shift every signed lane right by ``bits``, a constant."""
    return _shift("ashr", bits)


def _transpose(side: int, bits: int, kinds: tuple[Any, ...]) -> Any:
    """Signature and code of a transpose of ``side`` × ``side`` elements of ``bits`` bits."""
    row = ir.VectorType(ir.IntType(bits), side)
    half = side // 2
    low = _mask([x for i in range(half) for x in (i, side + i)])
    high = _mask([x for i in range(half, side) for x in (i, side + i)])

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def place(array: int, number: int) -> Any:
            start, step = (
                context.cast(builder, arguments[array + k], signature.args[array + k], types.intp)
                for k in (1, 2)
            )
            memory = context.make_array(signature.args[array])(context, builder, arguments[array]).data
            offset = builder.add(start, builder.mul(step, ir.Constant(step.type, number)))
            return builder.bitcast(builder.gep(memory, [offset]), row.as_pointer())

        rows = [builder.load(place(0, i), align=1) for i in range(side)]
        # Interleaving row i with row i + half is repeated log2(side) times, which transposes the block.
        for _ in range(side.bit_length() - 1):
            pairs = list(zip(rows[:half], rows[half:], strict=True))
            rows = [builder.shuffle_vector(a, b, order) for a, b in pairs for order in (low, high)]
        for i, row_i in enumerate(rows):
            builder.store(row_i, place(3, i), align=1)
        return context.get_dummy_value()

    return types.void(*kinds), code


@intrinsic
def transpose_u16(
    typing: Any, source: Any, start: Any, step: Any, target: Any, target_start: Any, target_step: Any
) -> Any:
    """Transpose 8 × 8 elements between flat uint16 arrays; rows begin at ``start`` and are ``step`` apart."""
    return _transpose(8, 16, (source, start, step, target, target_start, target_step))


@intrinsic
def transpose_u8(
    typing: Any, source: Any, start: Any, step: Any, target: Any, target_start: Any, target_step: Any
) -> Any:
    """Transpose 16 × 16 bytes between flat uint8 arrays; rows begin at ``start`` and are ``step`` apart."""
    return _transpose(16, 8, (source, start, step, target, target_start, target_step))


@intrinsic
def interleave3(typing: Any, source: Any, red: Any, green: Any, blue: Any, target: Any, start: Any) -> Any:
    """Interleave sixteen bytes each at ``red``, ``green`` and ``blue`` to 48 bytes RGBRGB… at ``start``."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        r, g, b = (
            builder.load(_pointer(context, builder, signature.args, arguments, 0, k, _U8), align=1)
            for k in (1, 2, 3)
        )
        both = _mask(list(range(2 * LANES)))
        wide = builder.shuffle_vector(r, g, both), builder.shuffle_vector(b, b, both)
        order = _mask([x for i in range(LANES) for x in (i, LANES + i, 2 * LANES + i)])
        place = _pointer(
            context, builder, signature.args, arguments, 4, 5, ir.VectorType(ir.IntType(8), 3 * LANES)
        )
        builder.store(builder.shuffle_vector(*wide, order), place, align=1)
        return context.get_dummy_value()

    return types.void(source, red, green, blue, target, start), code
