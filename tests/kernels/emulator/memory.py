"""Instructions that read and write memory, each thread for itself or a warp at once."""

import re
from typing import Any

import numpy as np

from emulator.assembler import Assembler, Lanes, Run, instruction, kind, put
from emulator.device import LANES, SHARED, Fault, Space, Warp
from emulator.text import Instruction


def accesses(made: Instruction) -> tuple[str, np.dtype, int]:
    """Returns the space, the type and the number of what is read or written."""
    count = next((int(k[1]) for k in made.kinds if re.fullmatch(r"v\d", k)), 1)
    shared = any(k.startswith("shared") for k in made.kinds)
    return "shared" if shared else "global", kind(made.kinds[-1]), count


def reaches(assembler: Assembler, made: Instruction, operand: str) -> Any:
    """Returns what gives, of the threads chosen, their memory and first words there."""
    space, dtype, count = accesses(made)
    address, machine, width = (
        assembler.address(operand),
        assembler.machine,
        dtype.itemsize,
    )

    def reach(warp: Warp, chosen: Lanes | None) -> tuple[Space, Lanes]:
        at = address(warp)
        if chosen is not None:
            at = at[chosen]
        found, at = machine.found(warp.block, space, at)
        return found, found.words(at, width, width * count)

    return reach


def of(chosen: Lanes | None, value: Lanes) -> Lanes:
    return value if chosen is None else value[chosen]


@instruction("ld")
def ld(assembler: Assembler, made: Instruction) -> Run:
    _, dtype, _ = accesses(made)
    targets, operand = made.operands
    targets = targets if isinstance(targets, tuple) else (targets,)
    places = [assembler.register(name) for name in targets]
    reach = reaches(assembler, made, operand)
    looks = "relaxed" in made.kinds or "acquire" in made.kinds

    def run(warp: Warp, chosen: Lanes | None) -> Any:
        found, words = reach(warp, chosen)
        same = looks
        for number, place in enumerate(places):
            value = found.views[dtype.itemsize][words + number]
            if looks:
                same &= warp.seen.get(place) == value.tolist()
                warp.seen[place] = value.tolist()
            if chosen is not None:
                full = np.zeros(LANES, value.dtype)
                full[chosen] = value
                value = full
            put(warp, place, value, chosen)
        return same or None

    return run


@instruction("st")
def st(assembler: Assembler, made: Instruction) -> Run:
    space, dtype, _ = accesses(made)
    operand, sources = made.operands
    sources = sources if isinstance(sources, tuple) else (sources,)
    width = dtype.itemsize
    readers = [assembler.read(name, np.dtype(f"u{width}")) for name in sources]
    reach = reaches(assembler, made, operand)

    def run(warp: Warp, chosen: Lanes | None) -> None:
        found, words = reach(warp, chosen)
        for number, read in enumerate(readers):
            value = of(chosen, read(warp))
            if space == "shared":
                warp.block.store(warp, words + number, value)
            else:
                found.views[width][words + number] = value

    return run


@instruction("ldmatrix")
def ldmatrix(assembler: Assembler, made: Instruction) -> Run:
    targets, operand = made.operands
    targets = targets if isinstance(targets, tuple) else (targets,)
    places = [assembler.register(name) for name in targets]
    rows = rows_of_matrices(assembler, made, operand, len(places))

    def run(warp: Warp, chosen: Lanes | None) -> None:
        for place, words in zip(places, rows(warp, chosen), strict=True):
            put(warp, place, warp.block.space.views[4][words], None)

    return run


@instruction("stmatrix")
def stmatrix(assembler: Assembler, made: Instruction) -> Run:
    operand, sources = made.operands
    sources = sources if isinstance(sources, tuple) else (sources,)
    readers = [assembler.read(name, np.dtype("u4")) for name in sources]
    rows = rows_of_matrices(assembler, made, operand, len(readers))

    def run(warp: Warp, chosen: Lanes | None) -> None:
        for read, words in zip(readers, rows(warp, chosen), strict=True):
            warp.block.store(warp, words, read(warp))

    return run


def rows_of_matrices(
    assembler: Assembler, made: Instruction, operand: str, count: int
) -> Any:
    """Returns what gives the words of each thread, of each matrix of 8 by 8.

    Threads 8 k to 8 k + 7 name the rows of matrix k; of row r of each, thread
    4 r + j has the j-th word.
    """
    if made.kinds[:4] != ("sync", "aligned", "m8n8", f"x{count}"):
        raise NotImplementedError(made.text)
    if "trans" in made.kinds or made.kinds[-1] != "b16":
        raise NotImplementedError(made.text)
    address = assembler.address(operand)
    lane = np.arange(LANES)

    def rows(warp: Warp, chosen: Lanes | None) -> list[Lanes]:
        if chosen is not None:
            raise Fault(f"{made.text} without all threads of the warp")
        at = address(warp)
        starts = [at[8 * k + lane // 4] for k in range(count)]
        return [warp.block.space.words(start, 4, 16) + lane % 4 for start in starts]

    return rows


@instruction("red")
def red(assembler: Assembler, made: Instruction) -> Run:
    if "add" not in made.kinds:
        raise NotImplementedError(made.text)
    operand, source = made.operands
    _, dtype, _ = accesses(made)
    read, reach = assembler.read(source, dtype), reaches(assembler, made, operand)

    def run(warp: Warp, chosen: Lanes | None) -> None:
        found, words = reach(warp, chosen)
        np.add.at(found.views[dtype.itemsize], words, of(chosen, read(warp)))

    return run


@instruction("mapa")
def mapa(assembler: Assembler, made: Instruction) -> Run:
    u4 = np.dtype("u4")
    return assembler.computes(
        made, [u4] * 2, lambda at, rank: (rank + np.uint32(1) << SHARED) | at
    )
