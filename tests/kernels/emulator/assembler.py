"""Turns instructions of PTX into steps that a warp can take.

What each instruction does is in the files that `instruction` names it in:
`arithmetic.py`, `memory.py`, `barriers.py`, `copies.py` and `products.py`, by NVIDIA's
"Parallel Thread Execution ISA".

Values of registers are arrays of 32, one of each thread, unsigned; an instruction reads
them as what its last kind says.
"""

import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from emulator.device import LANES, Fault, Warp
from emulator.text import Instruction, Program

Lanes = np.ndarray
Run = Callable[[Warp, Lanes | None], Any]
FLOATS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32}
SPECIAL = re.compile(r"%(tid|ctaid|ntid|nctaid|cluster_ctaid|cluster_nctaid)\.([xyz])$")
ADDRESS = re.compile(r"\[([\w%$]+)\s*(?:\+\s*(-?\d+))?\]")


class Step:
    """An instruction, ready to run.

    Attributes:
      run: Does it, for the threads chosen; returns what the warp has to wait for
        before it does it again, True if the next look is another's turn, or None.
      guard: Register of its predicate, or -1.
      negated: Whether it runs where the predicate is false.
      target: Instruction that it jumps to, or -1.
      name: Its name.
      text: All of it.
    """

    __slots__ = ("guard", "name", "negated", "run", "target", "text")

    def __init__(self, made: Instruction, run: Run, guard: int, target: int) -> None:
        self.run, self.guard, self.negated = run, guard, made.negated
        self.target, self.name, self.text = target, made.name, made.text


def kind(name: str) -> Any:
    """Returns the NumPy dtype of a kind such as `u32`, `b64` or `bf16`."""
    if name in FLOATS:
        return np.dtype(FLOATS[name])
    if name == "pred":
        return np.dtype(bool)
    sign = {"b": "u", "u": "u", "s": "i"}[name[0]]
    return np.dtype(f"{sign}{int(name[1:]) // 8}")


def wide(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


def put(warp: Warp, place: int, value: Lanes, chosen: Lanes | None) -> None:
    """Writes a register of the threads chosen."""
    if value.dtype != bool:
        value = value.view(f"u{value.dtype.itemsize}")
    if chosen is not None:
        old = warp.R[place]
        if old is None:
            old = np.full(LANES, -1, np.int64).astype(value.dtype)
        value = np.where(chosen, value, old)
    warp.R[place] = value


def one(values: Lanes, chosen: Lanes | None) -> int:
    """Returns the value that all threads chosen have.

    Raises:
      Fault: If they do not.
    """
    if chosen is not None:
        values = values[chosen]
    if (values != values[0]).any():
        raise Fault(f"threads of a warp disagree: {values}")
    return int(values[0])


class Assembler:
    """Turns instructions into steps."""

    def __init__(self, program: Program, machine: Any) -> None:
        self.machine, self.names = machine, dict[str, int]()
        self.labels = program.labels
        self.shared = {"__dynamic_shmem__0": 0}

    def register(self, name: str) -> int:
        return self.names.setdefault(name, len(self.names))

    def read(self, operand: str, dtype: np.dtype) -> Callable[[Warp], Lanes]:
        """Returns what reads an operand of a warp."""
        constant = self.constant(operand, dtype)
        if constant is not None:
            values = np.full(LANES, constant, dtype)
            return lambda warp: values
        if found := SPECIAL.match(operand):
            return self.special(*found.groups())
        if operand == "%laneid":
            return lambda warp: np.arange(LANES, dtype=np.uint32)
        place, inverted = self.register(operand.lstrip("!")), operand.startswith("!")

        def registered(warp: Warp) -> Lanes:
            value = warp.R[place]
            if value is None:
                raise Fault(f"{operand} is read before it is written")
            if dtype.kind == "b":
                return ~value if inverted else value
            return value.view(dtype)

        return registered

    def constant(self, operand: str, dtype: np.dtype) -> Any:
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            return np.array(int(found[1], 16), np.uint32).view(dtype)
        if found := re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            number = int(operand, 0)
            if dtype.kind == "b":
                return number
            bits = 8 * dtype.itemsize
            unsigned = np.array(number % 2**bits, f"u{dtype.itemsize}")
            return unsigned.view(dtype)
        if operand in self.shared:
            return np.array(self.shared[operand], dtype)
        if operand in self.machine.parameters:
            return np.array(self.machine.parameters[operand], dtype)
        return None

    def special(self, name: str, axis: str) -> Callable[[Warp], Lanes]:
        at, launch = "xyz".index(axis), self.machine.launch
        of_block = {
            "ctaid": lambda block: block.place[at],
            "ntid": lambda block: launch.threads[at],
            "nctaid": lambda block: launch.grid[at],
            "cluster_ctaid": lambda block: block.place[at] % launch.cluster[at],
            "cluster_nctaid": lambda block: launch.cluster[at],
        }
        if name == "tid":
            before = int(np.prod(launch.threads[:at]))

            def thread(warp: Warp) -> Lanes:
                found = warp.thread // before % launch.threads[at]
                return found.astype(np.uint32)

            return thread
        return lambda warp: np.full(LANES, of_block[name](warp.block), np.uint32)

    def address(self, operand: str) -> Callable[[Warp], Lanes]:
        """Returns what reads an address, `[register + bytes]`."""
        found = ADDRESS.fullmatch(operand)
        if not found:
            raise NotImplementedError(operand)
        name, offset = found[1], int(found[2] or 0)
        constant = self.constant(name, np.dtype("i8"))
        if constant is not None:
            values = np.full(LANES, constant, np.int64) + offset
            return lambda warp: values
        place = self.register(name)
        return lambda warp: warp.R[place].astype(np.int64) + offset

    # Steps that compute: what to read, and what makes the result of it.

    def computes(
        self, made: Instruction, reads: list[Any], function: Callable[..., Lanes]
    ) -> Run:
        place = self.register(made.operands[0])
        readers = [
            self.read(operand, dtype)
            for operand, dtype in zip(made.operands[1:], reads, strict=True)
        ]

        def run(warp: Warp, chosen: Lanes | None) -> None:
            put(warp, place, function(*(read(warp) for read in readers)), chosen)

        return run

    def step(self, made: Instruction) -> Step:
        guard = self.register(made.guard) if made.guard else -1
        if made.name == "bra":
            return Step(made, nothing, guard, self.labels[made.operands[0]])
        if made.name == "ret":
            return Step(made, nothing, guard, -1)
        if made.name not in MAKERS:
            raise NotImplementedError(made.text)
        return Step(made, MAKERS[made.name](self, made), guard, -1)


Maker = Callable[[Assembler, Instruction], Run]
MAKERS: dict[str, Maker] = {}


def instruction(*names: str) -> Callable[[Maker], Maker]:
    """Marks what makes the steps of the instructions of these names."""

    def mark(maker: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(names, maker))
        return maker

    return mark


def nothing(warp: Warp, chosen: Lanes | None) -> None:
    """Does nothing."""


def assembled(program: Program, machine: Any) -> tuple[list[Step], int]:
    """Returns the steps of a program, and how many registers they name."""
    assembler = Assembler(program, machine)
    steps = [assembler.step(made) for made in program.instructions]
    return steps, len(assembler.names)
