"""Reads the listing that nvdisasm makes of a kernel: how long is its time loop?

Blocks   Runs of instructions that are entered at the top and left at the bottom.
Loop     Of a block that jumps back to one which every way to it leads through: that
         one, the head, and all blocks from which the jump is reached without passing
         it. (A jump back alone is no loop: ptxas moves what is rarely run, such as
         the second try of a wait, to the end of the kernel.)
"""

import re
from typing import NamedTuple

LABEL = re.compile(r"^\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
TARGET = re.compile(r"\.L_x_\d+")
# What a step of an LSTM is made of: matrix products and transcendental functions.
WORK = ("HGMMA", "HMMA", "MUFU", "FFMA")


class Block(NamedTuple):
    """A basic block.

    Attributes:
      operations: Names of its instructions, such as `HGMMA.64x16x16.F32.BF16`.
      targets: Blocks that may come next, by their place in the listing.
    """

    operations: list[str]
    targets: list[int]


def blocks(listing: str) -> list[Block]:
    """Cuts the listing of one kernel into basic blocks."""
    names: dict[str, int] = {}
    parts: list[list[str]] = [[]]
    jumps: list[tuple[list[str], bool]] = [([], True)]  # targets, may it fall through

    def cut() -> None:
        if parts[-1]:
            parts.append([])
            jumps.append(([], True))

    for line in listing.splitlines():
        if found := LABEL.match(line):
            cut()
            names[found[1]] = len(parts) - 1
        elif found := INSTRUCTION.search(line):
            predicate, operation, operands = found.groups()
            parts[-1].append(operation)
            kind = operation.split(".")[0]
            if kind == "BRA":
                # A uniform predicate stands before the target, as an operand.
                always = not predicate and operands.strip().startswith("`")
                jumps[-1] = (TARGET.findall(operands), not always)
                cut()
            elif kind in ("EXIT", "RET", "KILL"):
                jumps[-1] = ([], bool(predicate))
                cut()
    made = []
    for place, (operations, (labels, on)) in enumerate(zip(parts, jumps, strict=True)):
        after = [place + 1] if on and place + 1 < len(parts) else []
        made.append(Block(operations, after + [names[label] for label in labels]))
    return made


def loops(graph: list[Block]) -> list[set[int]]:
    """Returns the blocks of every loop."""
    before: list[set[int]] = [set() for _ in graph]
    for place, block in enumerate(graph):
        for target in block.targets:
            before[target].add(place)
    reached, waiting = {0}, [0]
    while waiting:
        for target in graph[waiting.pop()].targets:
            if target not in reached:
                reached.add(target)
                waiting.append(target)
    # The blocks that every way from the start leads through, by repeated narrowing.
    through = {place: set(reached) for place in reached}
    through[0] = {0}
    changed = True
    while changed:
        changed = False
        for place in sorted(reached - {0}):
            ways = [through[other] for other in before[place] & reached]
            new = set.intersection(*ways) | {place}
            if new != through[place]:
                through[place], changed = new, True
    found: dict[int, set[int]] = {}
    for place in reached:
        for head in set(graph[place].targets) & through[place]:
            body, waiting = found.setdefault(head, {head}), [place]
            while waiting:
                if (here := waiting.pop()) not in body:
                    body.add(here)
                    waiting += before[here] & reached
    return list(found.values())


def time_loop(listing: str) -> int:
    """Returns the number of instructions in the loop over time; without loop, in all.

    It is the smallest of the loops that hold the most of a step's work: a loop around
    it, over tiles of the batch, holds no more of it, and one inside, over the units,
    less. Of loops that run side by side, in warps of their own, that with more work.
    """
    graph = blocks(listing)

    def count(body: set[int], *kinds: str) -> int:
        operations = (name for place in body for name in graph[place].operations)
        return sum(not kinds or name.split(".")[0] in kinds for name in operations)

    bodies = loops(graph) or [set(range(len(graph)))]
    chosen = max(bodies, key=lambda body: (count(body, *WORK), -count(body)))
    return count(chosen)
