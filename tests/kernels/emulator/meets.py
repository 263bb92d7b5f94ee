"""Where the threads of a warp meet again that part at a branch.

That is where all ways from it lead through, as the GPU's assembler has them wait for
each other there.
"""

from itertools import pairwise
from typing import Any


def meets(steps: list[Any]) -> dict[int, int]:
    """Returns, of each branch, the instruction at which its two ways meet.

    The number of instructions stands for the end, where they do not.
    """
    end = len(steps)
    starts = {0, end} | {step.target for step in steps if step.target >= 0}
    starts |= {k + 1 for k, step in enumerate(steps) if ends_block(step)}
    order = sorted(starts)
    last = {start: after - 1 for start, after in pairwise(order)}
    after = {start: followers(steps[at], at) for start, at in last.items()}
    # All that every way from a block leads through, by repeated narrowing.
    through = {start: set(order) for start in last} | {end: {end}}
    changed = True
    while changed:
        changed = False
        for start in reversed(list(last)):
            found = set.intersection(*(through[k] for k in after[start] or [end]))
            found |= {start}
            if found != through[start]:
                through[start], changed = found, True
    return {
        at: max(through[start] - {start}, key=lambda k: len(through[k]))
        for start, at in last.items()
        if len(after[start]) == 2
    }


def ends_block(step: Any) -> bool:
    return step.target >= 0 or step.name == "ret"


def followers(step: Any, at: int) -> list[int]:
    """Returns the instructions that may come after one, but for the end."""
    goes_on = step.name != "ret" or step.guard >= 0
    if step.target < 0:
        return [at + 1] if goes_on else []
    return [step.target, at + 1] if step.guard >= 0 else [step.target]
