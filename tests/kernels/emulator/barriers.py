"""Instructions by which threads wait for each other, or learn of each other.

Of fences, that between stores to shared memory and copies or products that read them is
looked after. All others order what is in order here.
"""

from typing import Any

import numpy as np

from emulator.assembler import Assembler, Lanes, Run, instruction, nothing, one, put
from emulator.device import LANES, Barrier, Fault, Warp
from emulator.text import Instruction


@instruction("elect")
def elect(assembler: Assembler, made: Instruction) -> Run:
    leader, holds = (assembler.register(n) for n in made.operands[0].split("|"))

    def run(warp: Warp, chosen: Lanes | None) -> None:
        if chosen is not None:
            raise Fault("elect.sync without all threads of the warp")
        put(warp, leader, np.zeros(LANES, "u4"), None)
        put(warp, holds, np.arange(LANES) == 0, None)

    return run


@instruction("shfl")
def shfl(assembler: Assembler, made: Instruction) -> Run:
    _, how, _ = made.kinds
    u4 = np.dtype("u4")

    def shuffled(value: Lanes, by: Lanes, bounds: Lanes, mask: Lanes) -> Lanes:
        if (mask != 0xFFFFFFFF).any() or (bounds != 31).any():
            raise Fault("shfl.sync of a part of the warp is not known here")
        lanes = np.arange(LANES)
        return value[lanes ^ by if how == "bfly" else by.astype(np.int64) & 31]

    if how not in ("bfly", "idx"):
        raise NotImplementedError(made.text)
    computed = assembler.computes(made, [u4] * 4, shuffled)

    def run(warp: Warp, chosen: Lanes | None) -> None:
        if chosen is not None:
            raise Fault("shfl.sync without all threads of the warp")
        computed(warp, None)

    return run


def mbarrier_init(assembler: Assembler, made: Instruction) -> Run:
    address, count = (
        assembler.address(made.operands[0]),
        assembler.read(made.operands[1], np.dtype("u4")),
    )

    def run(warp: Warp, chosen: Lanes | None) -> None:
        lanes = range(LANES) if chosen is None else np.flatnonzero(chosen)
        for lane in lanes:
            at = int(address(warp)[lane])
            warp.block.space.words(np.array([at]), 8, 8)
            if at in warp.block.barriers:
                raise Fault(f"mbarrier {at} is made twice")
            warp.block.barriers[at] = Barrier(int(count(warp)[lane]))

    return run


def mbarrier_arrive(assembler: Assembler, made: Instruction) -> Run:
    _, operand, *expected = made.operands
    expects = "expect_tx" in made.kinds
    address = assembler.address(operand)
    count = assembler.read(expected[0], np.dtype("u4")) if expects else None

    def run(warp: Warp, chosen: Lanes | None) -> None:
        lanes = range(LANES) if chosen is None else np.flatnonzero(chosen)
        at = address(warp)
        of = count(warp) if count else np.zeros(LANES, int)
        for lane in lanes:
            block, place = warp.block.peer(int(at[lane]))
            block.barrier(place).arrive(int(of[lane]))

    return run


def mbarrier_try_wait(assembler: Assembler, made: Instruction) -> Run:
    holds, operand, parity, *_ = made.operands
    place, address = assembler.register(holds), assembler.address(operand)
    of = assembler.read(parity, np.dtype("u4"))

    def run(warp: Warp, chosen: Lanes | None) -> Any:
        at, phase = one(address(warp), chosen), one(of(warp), chosen)
        barrier = warp.block.barrier(at)
        if phase not in (0, 1):
            raise Fault(f"an mbarrier has no phase of parity {phase}")

        def turned() -> bool:
            return barrier.phase != phase

        if not turned():
            return turned
        put(warp, place, np.ones(LANES, bool), chosen)
        return None

    return run


@instruction("bar")
def bar(assembler: Assembler, made: Instruction) -> Run:
    name, *rest = made.operands
    number = assembler.read(name, np.dtype("u4"))
    threads = int(np.prod(assembler.machine.launch.threads))
    count = assembler.read(rest[0] if rest else str(threads), np.dtype("u4"))

    def run(warp: Warp, chosen: Lanes | None) -> Any:
        block, at = warp.block, one(number(warp), chosen)
        if ("bar", at) in warp.seen:  # it has come before, and may go on
            del warp.seen[("bar", at)]
            return None
        block.arrived[at] = block.arrived.get(at, 0) + LANES
        phase = block.passed.get(at, 0)
        warp.seen[("bar", at)] = True
        if block.arrived[at] == one(count(warp), chosen):
            block.arrived[at] = 0
            block.passed[at] = phase + 1
        return lambda: block.passed.get(at, 0) > phase

    return run


@instruction("barrier")
def barrier(assembler: Assembler, made: Instruction) -> Run:
    if made.kinds[0] != "cluster":
        raise NotImplementedError(made.text)

    def arrive(warp: Warp, chosen: Lanes | None) -> None:
        first = warp.block.cluster[0]
        warp.seen["cluster"] = first.of_cluster
        first.at_cluster += 1
        warps = assembler.machine.warps_of_block
        if first.at_cluster == warps * len(warp.block.cluster):
            first.at_cluster = 0
            first.of_cluster += 1

    def wait(warp: Warp, chosen: Lanes | None) -> Any:
        first, phase = warp.block.cluster[0], warp.seen["cluster"]
        if first.of_cluster > phase:
            return None
        return lambda: first.of_cluster > phase

    return arrive if made.kinds[1] == "arrive" else wait


@instruction("mbarrier")
def mbarrier(assembler: Assembler, made: Instruction) -> Run:
    makers = {
        "init": mbarrier_init,
        "arrive": mbarrier_arrive,
        "try_wait": mbarrier_try_wait,
    }
    return makers[made.kinds[0]](assembler, made)


@instruction("fence")
def fence(assembler: Assembler, made: Instruction) -> Run:
    """Of those of shared memory between proxies: see `Block.fence`."""
    if made.kinds[0] != "proxy" or "global" in made.kinds:
        return nothing
    return lambda warp, chosen: warp.block.fence(warp)


@instruction("prefetch", "setmaxnreg")
def _nothing(assembler: Assembler, made: Instruction) -> Run:
    return nothing
