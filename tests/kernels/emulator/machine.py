"""Runs one kernel of PTX.

Threads  Warps of 32 take turns, in an order and for as long as `seed` says. Where
         threads of a warp part, some run to where all meet, then the others.
Beside   Copies and matrix products run at once (`eager`), as late as what waits for
         them allows (`late`), or at any time between, by `seed` (`any`).
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from emulator import arithmetic, barriers, copies, memory, products
from emulator.assembler import assembled
from emulator.device import GLOBAL, LANES, Block, Fault, Launch, Path, Space, Warp
from emulator.meets import meets
from emulator.text import Program

# Their instructions are known once they are imported.
INSTRUCTIONS = (arithmetic, barriers, copies, memory, products)
# Instructions, at most, of a loop that only looks whether a flag has changed.
SPIN = 20


class Machine:
    """One launch of a kernel."""

    def __init__(
        self,
        program: Program,
        launch: Launch,
        arrays: list[np.ndarray],
        parameters: list[int | dict[int, Any]],
        *,
        order: str = "any",
        seed: int = 0,
    ) -> None:
        self.program, self.launch, self.order = program, launch, order
        self.random = random.Random(seed)
        self.maps: dict[int, Any] = {}  # tensor maps by their address
        self.spaces: list[Space | None] = [None]
        for number, array in enumerate(arrays):
            self.spaces.append(Space(array, f"argument {number}"))
        self.parameters: dict[str, int | np.ndarray] = {}
        for (name, size), value in zip(program.parameters, parameters, strict=True):
            address = len(self.spaces) << GLOBAL
            space = Space(np.full(size, 0xFF, np.uint8), name)
            if isinstance(value, dict):
                self.maps |= {address + at: made for at, made in value.items()}
            else:
                space.data[:] = np.frombuffer(int(value).to_bytes(size, "little"), "u1")
            self.spaces.append(space)
            self.parameters[name] = address
        self.pending: list[Callable[[], None]] = []
        self.stores: list[Any] = []  # that may still be under way at the end
        self.warps_of_block = int(np.prod(launch.threads)) // LANES
        self.code, self.registers = assembled(program, self)
        self.meets = meets(self.code)
        self.warps = self._warps()

    def _warps(self) -> list[Warp]:
        launch, warps = self.launch, []
        counts = [n // c for n, c in zip(launch.grid, launch.cluster, strict=True)]
        for corner in np.ndindex(*counts):
            cluster: list[Block] = []
            for rank, inner in enumerate(np.ndindex(*launch.cluster[::-1])):
                place = tuple(
                    a * c + b
                    for a, b, c in zip(corner, inner[::-1], launch.cluster, strict=True)
                )
                cluster.append(Block(place, rank, launch))
            for block in cluster:
                block.cluster = cluster
                warps += [
                    Warp(block, number, self.registers)
                    for number in range(self.warps_of_block)
                ]
        return warps

    def space(self, address: int) -> tuple[Space, int]:
        """Returns the space of an address in global memory, and the byte there."""
        number, at = address >> GLOBAL, address & ((1 << GLOBAL) - 1)
        found = self.spaces[number] if 0 < number < len(self.spaces) else None
        if found is None:
            raise Fault(f"no memory at {address:#x}")
        return found, at

    def found(
        self, block: Block, space: str, at: np.ndarray
    ) -> tuple[Space, np.ndarray]:
        """Returns the space of the addresses of some threads, and the bytes there."""
        if space == "shared":
            return block.space, at
        numbers = at >> GLOBAL
        if (numbers != numbers[0]).any():
            raise Fault(f"threads of a warp reach for several arrays: {at}")
        found, _ = self.space(int(at[0]))
        return found, at & ((1 << GLOBAL) - 1)

    def beside(self, work: Callable[[], None]) -> None:
        """Runs work that nothing but a barrier waits for: now, or later."""
        if self.order == "eager":
            work()
        else:
            self.pending.append(work)

    def some(self) -> bool:
        """Whether what could run now does."""
        return self.order == "eager" or (
            self.order == "any" and self.random.random() < 0.5
        )

    def run(self) -> None:
        """Runs all threads to their end.

        Raises:
          Fault: If the kernel does what a device would not, or never ends.
        """
        left, still = list(self.warps), 0
        while left:
            self.random.shuffle(left)
            moved = False
            for warp in left:
                if warp.wait is not None:
                    if not warp.wait():
                        continue
                    warp.wait = None
                moved |= self._turn(warp, self.random.randrange(1, 400))
                while self.order == "any" and self.pending and self.some():
                    self._one()
            left = [warp for warp in left if warp.paths]
            moved |= any(warp.wait() for warp in left if warp.wait)
            # Twice, for a flag may have been set after others had looked at it.
            still = 0 if moved else still + 1
            if still == 2:
                if not self.pending:
                    where = {self.code[warp.paths[-1].pc].text for warp in left}
                    raise Fault(f"nothing can go on: {where}")
                self._one()
                still = 0
        while self.pending:
            self._one()
        for store in self.stores:
            store.put()

    def _one(self) -> None:
        self.pending.pop(self.random.randrange(len(self.pending)))()

    def _turn(self, warp: Warp, count: int) -> bool:
        """Runs some instructions of one warp; returns whether it got any further."""
        moved = False
        for _ in range(count):
            path = warp.paths[-1]
            if path.pc == path.until:
                warp.paths.pop()
                continue
            step, chosen = self.code[path.pc], path.active
            if step.guard >= 0:
                holds = warp.R[step.guard] ^ step.negated
                chosen = holds if chosen is None else chosen & holds
                if chosen.all():
                    chosen = None
                elif not chosen.any():
                    path.pc += 1
                    moved = True
                    continue
            if step.target >= 0:
                self._branch(warp, path, chosen, step.target)
            elif step.name == "ret":
                self._return(warp, chosen)
                if not warp.paths:
                    return True
            else:
                told = step.run(warp, chosen)
                if told is not None and told is not True:
                    warp.wait = told
                    return moved
                path.pc += 1
                if told:  # it looked, and saw what it saw before
                    between, warp.between = warp.between, 0
                    return between > SPIN
            moved = True
            warp.between += 1
        return moved

    def _branch(
        self, warp: Warp, path: Path, chosen: np.ndarray | None, target: int
    ) -> None:
        after, meet = path.pc + 1, self.meets.get(path.pc, 0)
        left = None
        if chosen is not None:
            left = ~chosen if path.active is None else path.active & ~chosen
        if left is None or not left.any():
            path.pc = target
            return
        path.pc = meet
        for start, active in ((after, left), (target, chosen)):
            if start != meet:
                warp.paths.append(Path(start, active, meet))

    @staticmethod
    def _return(warp: Warp, chosen: np.ndarray | None) -> None:
        gone = np.ones(LANES, bool) if chosen is None else chosen
        for path in warp.paths:
            path.active = ~gone if path.active is None else path.active & ~gone
        warp.paths = [path for path in warp.paths if path.active.any()]  # pyright: ignore[reportOptionalMemberAccess] set above
        if warp.paths:
            return
        if warp.products or warp.product_groups:
            raise Fault("a warp returns before its matrix products have ended")
        if any(not store.read for group in warp.store_groups for store in group):
            raise Fault("a warp returns before its copies have read shared memory")
        if warp.stores:
            raise Fault("a warp returns with copies in no group")
        warp.block.gone += 1
