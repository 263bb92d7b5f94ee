"""Copies that run beside the threads: by TMA, and from block to block of a cluster.

Swizzle   Rows of 128 (64, 32) bytes lie one after the other; in their addresses, bits 4
          to 6 (5, 4) are changed by the bits that are three above them. (NVIDIA's "PTX
          ISA", and its driver's `cuTensorMapEncodeTiled`.)
"""

import re
from typing import Any, NamedTuple

import numpy as np

from emulator.assembler import Assembler, Lanes, Run, instruction
from emulator.device import LANES, Block, Fault, Warp
from emulator.text import Instruction

# Bytes of an element by CUtensorMapDataType, as `mosaic_gpu_init_tma_desc` takes it.
BYTES = {1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 2}
SPANS = {16: 0, 32: 1, 64: 2, 128: 3}  # bits that a swizzle changes


def swizzled(at: np.ndarray, bits: int) -> np.ndarray:
    return at ^ ((at >> 7) & ((1 << bits) - 1)) << 4


class TensorMap(NamedTuple):
    """An array in global memory, and the boxes it is copied in; the fastest axis first.

    Attributes:
      address: Of its first element.
      itemsize: Bytes of an element.
      sizes: Elements along each axis.
      strides: Bytes from element to element of each axis.
      box: Elements of a box along each axis.
      bits: Bits that its swizzle changes.
    """

    address: int
    itemsize: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    bits: int

    def check(self) -> None:
        """Raises a Fault where `cuTensorMapEncodeTiled` would refuse it."""
        inner = self.box[0] * self.itemsize
        wrong = (
            self.address % 16
            or not 1 <= len(self.sizes) <= 5
            or any(not 1 <= size <= 2**32 for size in self.sizes)
            or self.strides[0] != self.itemsize
            or any(s % 16 or not s < 2**40 for s in self.strides[1:])
            or any(not 1 <= side <= 256 for side in self.box)
            or inner % 16
            or (self.bits and inner > 16 << self.bits)
        )
        if wrong:
            raise Fault(f"not a tensor map: {self}")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.itemsize

    def elements(self, corner: list[int]) -> np.ndarray:
        """Returns how many bytes each element of a box is from the array's first.

        Raises:
          Fault: If the box is not all within the array. A device would copy zeros; but
            no kernel here means it to, and one whose box begins between two tiles of
            the array, where it should not, is found so.
        """
        at = np.zeros((), np.int64)
        for start, side, size, stride in zip(
            corner, self.box, self.sizes, self.strides, strict=True
        ):
            if not 0 <= start <= size - side:
                raise Fault(f"{self} is left by a box at {corner}")
            at = (start + np.arange(side)) * stride + at[..., None]
        # The fastest axis was the first to be added, and has to be the last.
        return at.T.reshape(-1)

    def places(self, start: int) -> np.ndarray:
        """Returns where in shared memory each element of a box lies."""
        count = int(np.prod(self.box))
        return swizzled(start + self.itemsize * np.arange(count), self.bits)


class Store(NamedTuple):
    """A copy of a box from shared to global memory, which reads first and then writes.

    Attributes:
      of: The array, and the form of the box.
      corner: Where the box begins.
      start: Where it lies in shared memory.
      values: What was read, once it was.
      written: Not empty once it is written.
    """

    machine: Any
    block: Block
    of: TensorMap
    corner: list[int]
    start: int
    values: list[np.ndarray]
    written: list[bool]

    @property
    def read(self) -> bool:
        return bool(self.values)

    def take(self) -> None:
        if not self.values:
            width = self.of.itemsize
            words = self.block.space.words(self.of.places(self.start), width, width)
            self.values.append(self.block.read_beside(words, width))

    def put(self) -> None:
        self.take()
        if not self.written:
            at = self.of.elements(self.corner)
            space, base = self.machine.space(self.of.address)
            width = self.of.itemsize
            words = space.words(base + at, width, width)
            space.views[width][words] = self.values[0]
            self.written.append(True)


@instruction("cp")
def copy(assembler: Assembler, made: Instruction) -> Run:
    if made.kinds[:2] != ("async", "bulk"):
        raise NotImplementedError(made.text)
    what = made.kinds[2]
    if what == "commit_group":
        return _commit
    if what == "wait_group":
        return _waits(int(str(made.operands[0])), reads="read" in made.kinds)
    if what == "tensor":
        return _tensor(assembler, made)
    return _between_blocks(assembler, made)


def _commit(warp: Warp, chosen: Lanes | None) -> None:
    warp.store_groups.append(warp.stores)
    warp.stores = []


def _waits(count: int, *, reads: bool) -> Run:
    def run(warp: Warp, chosen: Lanes | None) -> None:
        groups = warp.store_groups
        ended = max(len(groups) - count, 0)
        for group in groups[:ended]:
            for store in group:
                store.take() if reads else store.put()
        if not reads:
            del groups[:ended]

    return run


def _lane(chosen: Lanes | None) -> int:
    lanes = np.arange(LANES) if chosen is None else np.flatnonzero(chosen)
    if len(lanes) != 1:
        raise Fault(f"{len(lanes)} threads of a warp start the same copy")
    return int(lanes[0])


def _tensor(assembler: Assembler, made: Instruction) -> Run:
    machine, loads = assembler.machine, made.kinds[4].startswith("shared")
    on = "mbarrier::complete_tx::bytes" if loads else "bulk_group"
    if len(made.kinds) != 7 or made.kinds[-1] != on:
        raise NotImplementedError(made.text)
    given = [str(operand) for operand in made.operands]
    # The map and the corner of the box are in one bracket.
    (both,) = (operand for operand in given if "{" in operand)
    ((name, inner),) = re.findall(r"^\[\s*([\w%$]+)\s*,\s*\{(.*)\}\s*\]$", both)
    of = assembler.read(name, np.dtype("u8"))
    corner = [assembler.read(part.strip(), np.dtype("i4")) for part in inner.split(",")]
    others = [assembler.address(operand) for operand in given if "{" not in operand]

    def run(warp: Warp, chosen: Lanes | None) -> None:
        lane, block = _lane(chosen), warp.block
        found: TensorMap | None = machine.maps.get(int(of(warp)[lane]))
        if found is None:
            raise Fault(f"{made.text}: no tensor map is there")
        at = [int(read(warp)[lane]) for read in corner]
        start = int(others[0](warp)[lane])
        if start % 128:
            raise Fault(f"{made.text}: starts at byte {start} of shared memory")
        if not loads:
            store = Store(machine, block, found, at, start, [], [])
            warp.stores.append(store)
            if machine.some():
                store.put()
            machine.stores.append(store)
            return
        barrier = block.barrier(int(others[1](warp)[lane]))

        def load() -> None:
            space, base = machine.space(found.address)
            width = found.itemsize
            words = space.words(base + found.elements(at), width, width)
            values = space.views[width][words]
            to = block.space.words(found.places(start), width, width)
            block.space.views[width][to] = values
            barrier.complete(found.bytes)

        machine.beside(load)

    return run


def _between_blocks(assembler: Assembler, made: Instruction) -> Run:
    known = ("shared::cluster", "shared::cta", "mbarrier::complete_tx::bytes")
    if made.kinds[2:] != known:
        raise NotImplementedError(made.text)
    target, source, count, barrier = (str(operand) for operand in made.operands)
    to, of, on = (assembler.address(o) for o in (target, source, barrier))
    size, machine = int(count), assembler.machine

    def run(warp: Warp, chosen: Lanes | None) -> None:
        lane = _lane(chosen)
        peer, at = warp.block.peer(int(to(warp)[lane]))
        same, place = warp.block.peer(int(on(warp)[lane]))
        start = int(of(warp)[lane])
        if peer is not same or size % 16 or at % 16 or start % 16:
            raise Fault(f"{made.text}: {size} bytes from {start} to {at}")

        def work() -> None:
            if peer.gone == machine.warps_of_block:
                raise Fault(f"a copy reaches {peer.place}, which has returned")
            peer.space.words(np.array([at]), 1, size)
            warp.block.space.words(np.array([start]), 1, size)
            read = warp.block.read_beside(start + np.arange(size), 1)
            peer.space.data[at : at + size] = read
            peer.barrier(place).complete(size)

        machine.beside(work)

    return run
