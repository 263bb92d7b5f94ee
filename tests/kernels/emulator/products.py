"""Matrix products (wgmma) of operands in shared memory, by NVIDIA's "PTX ISA".

Operands  A descriptor says where an operand starts, how it is swizzled, and how far it
          is from eight rows to the next eight ("stride"), or along a row ("leading").
          Where it is the columns that lie one after the other, it is "M-major".
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from emulator.assembler import (
    FLOATS,
    Assembler,
    Lanes,
    Run,
    instruction,
    nothing,
    one,
    put,
)
from emulator.copies import swizzled
from emulator.device import LANES, Block, Fault, Warp
from emulator.text import Instruction

DEPTH = 32  # bytes of a row that one product takes


class Operand(NamedTuple):
    """What a descriptor of a matrix says, in bytes; the swizzle in bits it changes."""

    start: int
    leading: int
    stride: int
    bits: int

    @staticmethod
    def of(descriptor: int) -> "Operand":
        if descriptor >> 49 & 7:
            raise NotImplementedError("a base offset")
        start, leading, stride = (descriptor >> at & 0x3FFF for at in (0, 16, 32))
        bits = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62]
        return Operand(16 * start, 16 * leading, 16 * stride, bits)

    def places(self, rows: np.ndarray, width: int, *, m_major: bool) -> np.ndarray:
        """Returns where the elements of some rows lie, [row, column]."""
        columns, inner = np.arange(DEPTH // width), 16 << self.bits
        if not self.bits:
            raise NotImplementedError("an operand that is not swizzled")
        if not m_major:
            row = rows % 8 * inner + rows // 8 * self.stride
            column = columns * width
        elif width == 2:
            row = rows * width % inner + rows * width // inner * self.leading
            column = columns % 8 * inner + columns // 8 * self.stride
        else:
            raise NotImplementedError("an M-major operand of more than 16 bits")
        return swizzled(self.start + row[:, None] + column[None, :], self.bits)


@instruction("wgmma")
def product(assembler: Assembler, made: Instruction) -> Run:
    if made.kinds[0] == "fence":
        return nothing
    if made.kinds[0] == "commit_group":
        return _commit
    if made.kinds[0] == "wait_group":
        return _waits(int(str(made.operands[0])))
    return _multiplies(assembler, made)


def _commit(warp: Warp, chosen: Lanes | None) -> None:
    warp.product_groups.append(list(warp.products))
    warp.products.clear()


def _waits(count: int) -> Run:
    def run(warp: Warp, chosen: Lanes | None) -> None:
        groups = warp.product_groups
        ended = max(len(groups) - count, 0)
        for group in groups[:ended]:
            _run(group)
        del groups[:ended]

    return run


def _run(group: list[Callable[[], None]]) -> None:
    for work in group:
        work()
    group.clear()


def _multiplies(assembler: Assembler, made: Instruction) -> Run:
    machine = assembler.machine
    *_, shape, to, of, same = made.kinds
    _, columns, _ = (int(side) for side in re.findall(r"\d+", shape))
    sums, a, b, adds, *others = made.operands
    if to != "f32" or of != same or of not in ("f16", "bf16", "tf32"):
        raise NotImplementedError(made.text)
    if isinstance(a, tuple) or isinstance(b, tuple) or others[:2] != ["1", "1"]:
        raise NotImplementedError(made.text)  # registers, or signs that are changed
    m_major = [flag == "1" for flag in others[2:]] or [False, False]
    places = [assembler.register(name) for name in sums]
    reads = [assembler.read(operand, np.dtype("u8")) for operand in (a, b)]
    keeps = assembler.read(str(adds), np.dtype(bool))
    width, lane = 4 if of == "tf32" else 2, np.arange(LANES)

    def matrix(block: Block, at: int, rows: np.ndarray, m_major: bool) -> np.ndarray:
        found = Operand.of(at).places(rows, width, m_major=m_major)
        words = block.space.words(found.reshape(-1), width, width)
        values: Any = block.read_beside(words, width).reshape(found.shape)
        if of == "tf32":  # the lower bits of float32 are not looked at
            return (values & np.uint32(0xFFFFE000)).view(np.float32).astype("f8")
        return values.view(FLOATS[of]).astype("f8")

    def run(warp: Warp, chosen: Lanes | None) -> None:
        if chosen is not None:
            raise Fault("wgmma without all threads of the warp")
        at_a, at_b = (one(read(warp), None) for read in reads)
        adds, quarter = one(keeps(warp), None), 16 * (warp.number % 4)

        def work() -> None:
            left = matrix(warp.block, at_a, quarter + np.arange(16), m_major[0])
            right = matrix(warp.block, at_b, np.arange(columns), m_major[1])
            found = left @ right.T
            for number, place in enumerate(places):
                row = lane // 4 + 8 * (number // 2 % 2)
                column = 8 * (number // 4) + lane % 4 * 2 + number % 2
                value = found[row, column]
                if adds:
                    value = value + warp.R[place].view(np.float32)
                put(warp, place, value.astype(np.float32), None)

        warp.products.append(work)
        if machine.some():
            for group in (*warp.product_groups, warp.products):
                _run(group)

    return run
