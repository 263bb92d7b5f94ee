"""Instructions that compute, each thread for itself.

Approximations (`tanh.approx`, `ex2.approx`, `rcp`) are exact here, but for the rounding
to float32.
"""

from collections.abc import Callable

import numpy as np

from emulator.assembler import (
    FLOATS,
    Assembler,
    Lanes,
    Run,
    instruction,
    kind,
    put,
    wide,
)
from emulator.device import Fault, Warp
from emulator.text import Instruction


def exact(function: Callable[[Lanes], Lanes]) -> Callable[[Lanes], Lanes]:
    return lambda a: function(a.astype("f8")).astype(a.dtype)


def shifted_up(value: Lanes, by: Lanes) -> Lanes:
    bits = 8 * value.dtype.itemsize
    kept = value << np.minimum(by, bits - 1).astype(value.dtype)
    return np.where(by < bits, kept, value.dtype.type(0))


def shifted_down(value: Lanes, by: Lanes) -> Lanes:
    bits = 8 * value.dtype.itemsize
    kept = value >> np.minimum(by, bits - 1).astype(value.dtype)
    if value.dtype.kind == "i":
        return kept
    return np.where(by < bits, kept, value.dtype.type(0))


ARITHMETIC: dict[str, Callable[..., Lanes]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": np.fmin,
    "max": np.fmax,
    "neg": lambda a: -a,
    "abs": np.abs,
    "not": lambda a: ~a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": shifted_up,
    "shr": shifted_down,
    "tanh": exact(np.tanh),
    "ex2": exact(np.exp2),
    "rcp": exact(np.reciprocal),
    "copysign": lambda sign, value: np.copysign(value, sign),
}


def unordered(function: Callable[..., Lanes]) -> Callable[..., Lanes]:
    return lambda a, b: function(a, b) | np.isnan(a) | np.isnan(b)


COMPARED: dict[str, Callable[..., Lanes]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "neu": np.not_equal,
    "ltu": unordered(np.less),
    "leu": unordered(np.less_equal),
    "gtu": unordered(np.greater),
    "geu": unordered(np.greater_equal),
    "equ": unordered(np.equal),
}


@instruction(*ARITHMETIC)
def arithmetic(assembler: Assembler, made: Instruction) -> Run:
    """Of operands that all have the same type, but for how far to shift."""
    dtype, function = kind(made.kinds[-1]), ARITHMETIC[made.name]
    reads = [dtype] * (len(made.operands) - 1)
    if made.name in ("shl", "shr"):
        reads[1] = np.dtype("u4")
    return assembler.computes(made, reads, function)


def high(a: Lanes, b: Lanes) -> Lanes:
    """Returns the upper half of a product."""
    to, bits = wide(a.dtype), 8 * a.dtype.itemsize
    return ((a.astype(to) * b.astype(to)) >> bits).astype(a.dtype)


def high_64(a: Lanes, b: Lanes) -> Lanes:
    """Returns the upper half of a product, for which NumPy has no type."""
    products = zip(a.tolist(), b.tolist(), strict=True)
    return np.array([(one * other) >> 64 for one, other in products], a.dtype)


@instruction("mul")
def mul(assembler: Assembler, made: Instruction) -> Run:
    dtype = kind(made.kinds[-1])
    if "wide" in made.kinds:
        to = wide(dtype)
        return assembler.computes(
            made, [dtype] * 2, lambda a, b: a.astype(to) * b.astype(to)
        )
    if "hi" in made.kinds:
        function = high_64 if dtype.itemsize == 8 else high
        return assembler.computes(made, [dtype] * 2, function)
    return assembler.computes(made, [dtype] * 2, lambda a, b: a * b)


@instruction("mad")
def mad(assembler: Assembler, made: Instruction) -> Run:
    dtype = kind(made.kinds[-1])
    if "wide" in made.kinds:
        to = wide(dtype)
        reads = [dtype, dtype, to]
        return assembler.computes(
            made, reads, lambda a, b, c: a.astype(to) * b.astype(to) + c
        )
    return assembler.computes(made, [dtype] * 3, lambda a, b, c: a * b + c)


@instruction("fma")
def fma(assembler: Assembler, made: Instruction) -> Run:
    dtype = kind(made.kinds[-1])

    def nearest(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
        return (a.astype("f8") * b + c.astype("f8")).astype(dtype)

    def down(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
        exact = a.astype("f8") * b + c.astype("f8")
        value = exact.astype(dtype)
        return np.where(value > exact, np.nextafter(value, -np.inf), value)

    return assembler.computes(
        made, [dtype] * 3, down if "rm" in made.kinds else nearest
    )


@instruction("bfe")
def bfe(assembler: Assembler, made: Instruction) -> Run:
    dtype = kind(made.kinds[-1])
    bits = 8 * dtype.itemsize

    def field(value: Lanes, start: Lanes, length: Lanes) -> Lanes:
        start, length = start.astype(dtype), length.astype(dtype)
        if dtype.kind == "u":
            return (value >> start) & ((dtype.type(1) << length) - dtype.type(1))
        return (value << (bits - start - length)) >> (bits - length)

    u4 = np.dtype("u4")
    return assembler.computes(made, [dtype, u4, u4], field)


@instruction("shf")
def shf(assembler: Assembler, made: Instruction) -> Run:
    if made.kinds != ("l", "wrap", "b32"):
        raise NotImplementedError(made.text)

    def shifted(low: Lanes, high: Lanes, by: Lanes) -> Lanes:
        joined = high.astype("u8") << np.uint64(32) | low.astype("u8")
        return (joined << (by & 31).astype("u8") >> np.uint64(32)).astype("u4")

    return assembler.computes(made, [np.dtype("u4")] * 3, shifted)


@instruction("prmt")
def prmt(assembler: Assembler, made: Instruction) -> Run:
    def permuted(low: Lanes, high: Lanes, selector: Lanes) -> Lanes:
        source = np.stack([low, high], 1).view("u1")  # [32, 8]
        picks = selector[:, None] >> np.arange(0, 16, 4, dtype="u4")
        if (picks & 8).any():
            raise Fault("prmt that repeats a sign is not known here")
        found = np.take_along_axis(source, (picks & 7).astype(np.int64), 1)
        return np.ascontiguousarray(found).view("u4")[:, 0]

    return assembler.computes(made, [np.dtype("u4")] * 3, permuted)


@instruction("setp")
def setp(assembler: Assembler, made: Instruction) -> Run:
    function, dtype = COMPARED[made.kinds[0]], kind(made.kinds[-1])
    if len(made.kinds) == 2:
        return assembler.computes(made, [dtype] * 2, function)
    joins = ARITHMETIC[made.kinds[1]]
    reads = [dtype, dtype, np.dtype(bool)]
    return assembler.computes(made, reads, lambda a, b, p: joins(function(a, b), p))


@instruction("selp")
def selp(assembler: Assembler, made: Instruction) -> Run:
    dtype = kind(made.kinds[-1])
    reads = [dtype, dtype, np.dtype(bool)]
    return assembler.computes(made, reads, lambda a, b, p: np.where(p, a, b))


@instruction("cvt")
def cvt(assembler: Assembler, made: Instruction) -> Run:
    *how, to, of = made.kinds
    if "x2" in to:
        half = np.dtype(FLOATS[to.removesuffix("x2")])

        def pair(upper: Lanes, lower: Lanes) -> Lanes:
            both = np.stack([lower.astype(half), upper.astype(half)], 1)
            return both.view("u4")[:, 0]

        return assembler.computes(made, [np.dtype("f4")] * 2, pair)
    source, target = kind(of), kind(to)
    if "sat" in how:
        return assembler.computes(
            made,
            [source],
            lambda a: np.nan_to_num(np.clip(a, 0, 1), nan=0).astype(target),
        )
    return assembler.computes(made, [source], lambda a: a.astype(target))


@instruction("cvta")
def cvta(assembler: Assembler, made: Instruction) -> Run:
    return assembler.computes(made, [np.dtype("u8")], lambda a: a)


@instruction("mov")
def mov(assembler: Assembler, made: Instruction) -> Run:
    to, of = made.operands
    dtype = kind(made.kinds[-1])
    if isinstance(of, tuple):
        part = np.dtype(f"u{dtype.itemsize // len(of)}")
        readers, place = [assembler.read(o, part) for o in of], assembler.register(to)

        def packed(warp: Warp, chosen: Lanes | None) -> None:
            parts = np.stack([read(warp) for read in readers], 1)
            put(warp, place, parts.view(dtype)[:, 0], chosen)

        return packed
    if isinstance(to, tuple):
        part = np.dtype(f"u{dtype.itemsize // len(to)}")
        read, places = assembler.read(of, dtype), [assembler.register(o) for o in to]

        def unpacked(warp: Warp, chosen: Lanes | None) -> None:
            parts = np.ascontiguousarray(read(warp))[:, None].view(part)
            for number, place in enumerate(places):
                put(warp, place, parts[:, number].copy(), chosen)

        return unpacked
    return assembler.computes(made, [dtype], lambda a: a)
