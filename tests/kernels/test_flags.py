"""The flags of the `grid` kernels: every order of events, in a model of a few blocks.

What a block does is recorded from the kernels' own code (`Forward.step`, `Backward.
activate` and `multiply`), with a recorder for its block, flags and memory. Then all
interleavings of the blocks' events are run through: every part must be, whenever it is
read, the one that is read when the blocks take turns phase by phase; and some block
must always be able to go on. In each a part is read or written at once, all parts of a
product one by one. That the hardware keeps the order of a block's events, which is what
the fences are for, is taken for granted.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest
from flax_lstm_kernels.gpu import slab_backward
from flax_lstm_kernels.gpu.slab_backward import Backward, Carry
from flax_lstm_kernels.gpu.slab_forward import Forward
from flax_lstm_kernels.gpu.source import Span

pytestmark = pytest.mark.kernels


ROWS = "the rows of the tile"


class Event(NamedTuple):
    """What a block does next: `kind` is wait, signal, read or write."""

    kind: str
    where: Any  # a flag, or a part
    count: int = 0


class Memory(NamedTuple):
    """An array in global memory, or a part of it."""

    name: str
    place: Any = ()

    @property
    def at(self):
        return self

    def __getitem__(self, place):
        return Memory(self.name, place)

    @property
    def dtype(self):
        return jnp.dtype(jnp.float32)

    @property
    def shape(self):
        return (64,)  # units, in whole groups


class Recorder:
    """Stands in for the block and the flags of one block."""

    def __init__(self, unit, blocks, parts=4):
        self.unit, self.blocks, self.parts = unit, blocks, parts
        self.events = []

    def wait(self, flag, count):
        self.events.append(Event("wait", int(flag), int(count)))

    def signal(self, flag):
        self.events.append(Event("signal", int(flag)))

    def per_row(self, ref):
        return jnp.ones((1, 1), jnp.int32)

    def load(self, ref, bits=None):
        if ref.name in ("turns", "shares"):
            self.events.append(Event("read", self.part(ref)))
        return jnp.zeros((1, 1))

    def store(self, ref, value):
        if ref.name in ("turns", "shares"):
            self.events.append(Event("write", self.part(ref)))

    @staticmethod
    def part(ref):
        """Names a part: the array, its leading indices, and which 16 units."""
        *lead, units = (place for place in ref.place if place is not ROWS)
        return (ref.name, *map(int, lead), int(units.start) // 16)

    def product(self, operand, slab):
        turn, _, *gate = operand.place
        where = ("turns", int(turn), *map(int, gate))
        for unit in range(self.blocks):
            self.events.append(Event("read", (*where, unit)))
        return None

    def turned(self, product):
        return [jnp.zeros((1, 1))] * self.parts


def forward_events(blocks, steps):
    """Returns the events of each block, step by step."""
    names = ("slabs", "lengths", "resets", "turns", "hs")
    span = Span(Memory("z"), 0, steps)
    of = Forward(span, *map(Memory, names), None)
    recorders = [Recorder(unit, blocks) for unit in range(blocks)]
    phases = []
    for k in range(steps):
        for block in recorders:
            zero = jnp.zeros((1, 1))
            of.step(
                block,
                block,
                t=k,
                turn=k % 2,
                rows=ROWS,
                held=ROWS,
                unit=block.unit,
                flag=0,
                count=k * blocks,
                c=zero,
                h=zero,
            )
        phases.append([list(block.events) for block in recorders])
    return [block.events for block in recorders], phases


def backward_events(blocks, steps):
    """Returns the same of the backward pass; with two gates, so groups of two."""
    names = (
        "d_hs", "gates", "before", "weights", "lengths", "resets", "turns", "shares",
        "d_z",
    )  # fmt: skip
    of, group = Backward(*map(Memory, names)), slab_backward.GROUP
    recorders = [Recorder(unit, blocks, group) for unit in range(blocks)]
    phases = []
    for k in range(steps):
        for block in recorders:
            zero = jnp.zeros((1, 1))
            of.activate(
                block,
                block,
                t=k,
                turn=k % 2,
                rows=ROWS,
                unit=block.unit,
                group_flag=1 + block.unit // group,
                group_count=k * group,
                flag=0,
                carry=Carry(zero, zero, zero),
            )
        phases.append([list(block.events) for block in recorders])
        for block in recorders:
            of.multiply(
                block,
                block,
                turn=k % 2,
                rows=ROWS,
                unit=block.unit,
                flag=0,
                count=(k + 1) * blocks,
                group_flag=1 + block.unit // group,
            )
        phases.append([list(block.events) for block in recorders])
    return [block.events for block in recorders], phases


def seen_in_turns(phases):
    """Returns which write each read sees when the blocks take turns, phase by phase."""
    memory, expected = {}, {}
    done = [0] * len(phases[0])
    for phase in phases:
        for writes in (False, True):  # all of them read, then all of them write
            for block, events in enumerate(phase):
                for n in range(done[block], len(events)):
                    kind, part, _ = events[n]
                    if kind == "read" and not writes:
                        expected[block, n] = memory.get(part)
                    if kind == "write" and writes:
                        memory[part] = (block, n)
        done = [len(events) for events in phase]
    return expected


def wrong(events, phases):
    """Runs through every interleaving; returns what goes wrong, or None."""
    expected = seen_in_turns(phases)
    written = {}  # part -> its writes, in order
    signals = {}  # flag -> block -> places of its signals
    for block, own in enumerate(events):
        for n, (kind, where, _) in enumerate(own):
            if kind == "write":
                written.setdefault(where, []).append((block, n))
            if kind == "signal":
                signals.setdefault(where, {}).setdefault(block, []).append(n)
    assert all(len({block for block, _ in writes}) == 1 for writes in written.values())
    start = (0,) * len(events)
    found, waiting = {start}, [start]
    while waiting:
        places = waiting.pop()
        stuck = True
        for block, n in enumerate(places):
            if n == len(events[block]):
                continue
            kind, where, count = events[block][n]
            if kind == "wait":
                given = sum(
                    sum(at < places[other] for at in own)
                    for other, own in signals.get(where, {}).items()
                )
                if given < count:
                    continue
            if kind == "read":
                last = None
                for other, at in written.get(where, []):
                    if at < places[other]:
                        last = (other, at)
                if last != expected[block, n]:
                    return f"block {block} reads {where} too early or too late"
            stuck = False
            after = (*places[:block], n + 1, *places[block + 1 :])
            if after not in found:
                found.add(after)
                waiting.append(after)
        if stuck and any(n < len(own) for n, own in zip(places, events, strict=True)):
            return "nobody can go on"
    return None


@pytest.fixture
def groups_of_two(monkeypatch):
    """Fewer gates, for fewer orders."""
    monkeypatch.setattr(slab_backward, "GROUP", 2)
    monkeypatch.setattr(slab_backward, "SLAB", 2 * slab_backward.UNITS)


def test_forward_every_order_gives_what_taking_turns_gives():
    assert wrong(*forward_events(blocks=3, steps=4)) is None


def test_backward_every_order_gives_what_taking_turns_gives(groups_of_two):
    assert wrong(*backward_events(blocks=4, steps=3)) is None
    assert wrong(*backward_events(blocks=2, steps=4)) is None


def one_half(own):
    """Has h, or dz, of all steps in the same place."""
    return [
        event._replace(where=("turns", 0, *event.where[2:]))
        if event.kind in ("read", "write") and event.where[0] == "turns"
        else event
        for event in own
    ]


def signal_first(own):
    """Signals before the parts are written."""
    changed = []
    for event in own:
        place = len(changed)
        if event.kind == "signal":
            while changed[place - 1].kind == "write":
                place -= 1
        changed.insert(place, event)
    return changed


def no_wait(own):
    return [e._replace(count=0) if e.kind == "wait" else e for e in own]


def no_wait_for_the_group(own):
    return [e._replace(count=0) if e.kind == "wait" and e.where else e for e in own]


def one_signal_more(own):
    return [e._replace(count=e.count + 1) if e.kind == "wait" else e for e in own]


@pytest.mark.parametrize(
    ("which", "change", "found"),
    [
        (forward_events, one_half, "too early or too late"),
        (forward_events, signal_first, "too early or too late"),
        (forward_events, no_wait, "too early or too late"),
        (forward_events, one_signal_more, "nobody can go on"),
        (backward_events, one_half, "too early or too late"),
        (backward_events, signal_first, "too early or too late"),
        (backward_events, no_wait_for_the_group, "too early or too late"),
        (backward_events, one_signal_more, "nobody can go on"),
    ],
)
def test_a_protocol_that_lacks_something_is_found(groups_of_two, which, change, found):
    """So each half, each wait and the order of writing and signalling are needed."""
    events, phases = (
        which(blocks=4, steps=2)
        if which is backward_events
        else which(blocks=2, steps=3)
    )
    phases = [[change(own) for own in phase] for phase in phases]
    told = wrong([change(own) for own in events], phases)
    assert found in (told or "")
