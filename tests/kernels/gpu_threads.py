"""What the threads of a block of a GPU kernel do to each other, in a model.

The kernel's own code runs as Python, once for each warpgroup, with a recorder in the
place of Pallas: it notes every access to shared memory, copy, matrix product and
barrier. Then four warps run through what each warpgroup did, and every two accesses to
the same place, of which one writes, must be in an order that barriers enforce, whatever
the speed of warps, copies and matrix products (vector clocks). So one run stands for
all orders. The blocks of a cluster are looked at together, others one by one.

Access   By a warp: at once, to all of what its warpgroup accesses; what the four do in
         the same operation does not conflict. By a matrix product: from when a warp
         issues it to its `wgmma_wait`. By a copy: from when it is issued, by the first
         warp, to its barrier, or to `wait_smem_to_gmem`.
Fence    What a warp has written by ordinary stores has to be behind its proxy fence
         (`commit_smem`), before a copy or a matrix product reads it.
Barrier  Of shared memory: all threads of a warpgroup arrive, also at a copy. Nobody may
         come to wait for a phase when the next one may be over: both look the same.
Exchange In a cluster, what `Exchange` does: a barrier's phase is over when it has been
         armed by each warpgroup of its block, and all bytes that these announce have
         come. None may come before the phase that they are for, nor when the block may
         be gone.
Global   Memory is looked at where copies access it; ordinary loads and stores are not,
         nor are flags; see `test_flags.py`.
"""

import dataclasses
import itertools
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu import flags
from flax_lstm_kernels.gpu.cluster_exchange import SLOTS, Exchange
from flax_lstm_kernels.gpu.cluster_tiles import Tiles
from flax_lstm_kernels.gpu.common import Registers
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPS = 4  # of a warpgroup


@dataclasses.dataclass(eq=False)
class Memory:
    """An array, or the barriers, of a block.

    Attributes:
      name: For messages.
      shape: Its shape.
      dtype: Of its elements.
      values: Where known, for what decides where the kernel goes.
      shared: It is in shared memory.
      arrivals: Of a barrier, by warps.
      everywhere: The same in all blocks of a cluster, by their number.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any = None
    values: Any = None
    shared: bool = False
    arrivals: int = 0
    everywhere: list["Memory"] = dataclasses.field(default_factory=list)


class Ref:
    """A part of a memory, as the kernel's code handles it."""

    def __init__(self, memory, spans=None, axes=None):
        """Spans are `(start, stop)` for each axis of the memory; axes those seen."""
        self.memory = memory
        self.spans = spans or tuple((0, size) for size in memory.shape)
        self.axes = tuple(range(len(memory.shape))) if axes is None else axes

    @property
    def shape(self):
        return tuple(self.spans[a][1] - self.spans[a][0] for a in self.axes)

    @property
    def dtype(self):
        return jnp.dtype(self.memory.dtype)

    def __len__(self):
        return self.shape[0]

    @property
    def at(self):
        return At(self)

    def part(self, place):
        place = place if isinstance(place, tuple) else (place,)
        if Ellipsis in place:
            here = place.index(Ellipsis)
            rest = len(self.axes) - len(place) + 1
            place = (*place[:here], *[slice(None)] * rest, *place[here + 1 :])
        spans, axes = list(self.spans), []
        for n, axis in enumerate(self.axes):
            index = place[n] if n < len(place) else slice(None)
            start, stop = spans[axis]
            if isinstance(index, slice):
                assert index == slice(None), index
                axes.append(axis)
                continue
            if isinstance(index, pl.Slice):
                first, size = start + int(index.start), int(index.size)
                axes.append(axis)
            else:
                first, size = start + int(index), 1
            assert start <= first <= first + size <= stop, (self.memory.name, place)
            spans[axis] = first, first + size
        return Ref(self.memory, tuple(spans), tuple(axes))

    @property
    def transposed(self):
        return Ref(self.memory, self.spans, self.axes[::-1])

    def contents(self):
        if self.memory.values is None:
            return jnp.zeros(self.shape, self.dtype)
        found = self.memory.values[tuple(slice(*span) for span in self.spans)]
        gone = tuple(n for n in range(len(self.spans)) if n not in self.axes)
        return jnp.asarray(np.squeeze(found, gone))

    def __getitem__(self, place):
        part = self.part(place)
        RECORDER.access("read", part)
        return part.contents()

    def __setitem__(self, place, value):
        RECORDER.access("write", self.part(place))


class At(NamedTuple):
    ref: Ref

    def __getitem__(self, place):
        return self.ref.part(place)


class Accumulator:
    """The sums of a matrix product, in registers."""

    def __init__(self, kind):
        self.shape = kind.shape

    def __getitem__(self, place):
        RECORDER.note("sums")
        return jnp.zeros(self.shape)


class Event(NamedTuple):
    """What a warpgroup does next.

    Attributes:
      kind: access, wgmma, wgmma_wait, sums, sync, arrive, wait, load, store, stored;
        and of a cluster publish, received, cluster.
      what: Depends on the kind.
      site: The line of the kernel's code that does it, and its function.
    """

    kind: str
    what: Any
    site: str


def of_kernel(file):
    return file.parent.name == "gpu" and file.name != "common.py"


class Recorder:
    """Notes what one warpgroup does."""

    events: list

    def __init__(self):
        self.events = []

    def note(self, kind, *what):
        frame = sys._getframe(1)
        while not of_kernel(file := Path(frame.f_code.co_filename)):
            frame = frame.f_back
        site = f"{file.name}:{frame.f_lineno} {frame.f_code.co_name}"
        self.events.append(Event(kind, what, site))

    def access(self, mode, ref):
        if ref.memory.shared:
            self.note("access", mode, ref)


RECORDER = Recorder()


def stand_ins(runs):
    """Returns what takes the place of Pallas: `(owner, name, value)` each.

    Args:
      runs: Gets what is `Launched`.
    """

    def note(kind):
        return lambda *what, **named: RECORDER.note(kind, *what, *named.values())

    def load(ref, layout):
        RECORDER.access("read", ref)
        return ref.contents()

    def store(ref, value):
        RECORDER.access("write", ref)

    def fori_loop(first, last, body, carry):
        for k in range(int(first), int(last)):
            carry = body(np.int32(k), carry)
        return carry

    def when(condition):
        return lambda function: function() if bool(condition) else None

    def run_scoped(function, *kinds):
        return function(*map(Accumulator, kinds))

    def copy_in(source, target, barrier):
        RECORDER.note("load", source, target, barrier)

    def copy_out(source, target, commit_group=True):
        RECORDER.note("store", source, target, commit_group)

    def wait_out(count, wait_read_only=False):
        RECORDER.note("stored", count, wait_read_only)

    def in_place(registers, ref):
        """Every thread writes what it has read itself, in the same layout."""
        RECORDER.access("write", ref)

    def publish(exchange, round_, source, target, copies, size):
        sent = [
            (
                source.at[(0, *copy.source)],
                Ref(target.memory.everywhere[int(copy.member)]).at[(0, *copy.target)],
                int(copy.member),
                copy.size,
            )
            for copy in copies
        ]
        RECORDER.note("publish", exchange, int(round_), sent, size)

    def received(exchange, round_):
        RECORDER.note("received", exchange, int(round_))

    return [
        (Exchange, "start", lambda exchange: RECORDER.note("cluster")),
        (Exchange, "finish", lambda exchange: RECORDER.note("cluster")),
        (Exchange, "publish", publish),
        (Exchange, "wait", received),
        (compat, "kernel", lambda body, **named: launcher(runs, body, **named)),
        (compat, "load", load),
        (compat, "store", store),
        (compat, "transposed", lambda ref: ref.transposed),
        (compat, "in_place", lambda array: Memory("", array.shape, array.dtype)),
        (jax, "freeze", lambda memory: jnp.zeros(memory.shape, memory.dtype)),
        (lax, "fori_loop", fori_loop),
        (lax, "axis_index", lambda name: PLACE[name]),
        (pl, "when", when),
        (pl, "run_scoped", run_scoped),
        (pl, "get_global", lambda kind: Ref(Memory("flags", kind.shape))),
        (plgpu, "layout_cast", lambda value, layout: value),
        (plgpu, "copy_gmem_to_smem", copy_in),
        (plgpu, "copy_smem_to_gmem", copy_out),
        (plgpu, "wait_smem_to_gmem", wait_out),
        (plgpu, "commit_smem", note("sync")),
        (plgpu, "barrier_wait", note("wait")),
        (plgpu, "barrier_arrive", note("arrive")),
        (plgpu, "wgmma", note("wgmma")),
        (plgpu, "wgmma_wait", note("wgmma_wait")),
        (plgpu, "semaphore_signal", lambda *given, **named: None),
        (plgpu, "semaphore_wait", lambda *given, **named: None),
        (flags, "proxy_fence", lambda: None),
        (Registers, "round", in_place),
        (Tiles, "round", in_place),
    ]


PLACE: dict[str, int] = {}


def launcher(
    runs, body, *, out_type, scratch_types, auto_barriers, grid, grid_names, **mesh
):
    """Stands in for `compat.kernel`: runs the first block or cluster, and the last."""
    (members,) = mesh.get("cluster") or (1,)

    def of_operand(n, given):
        if isinstance(given, Memory):
            return Ref(given)
        return Ref(Memory(f"operand {n}", given.shape, given.dtype, np.asarray(given)))

    def of_scratch(n, kind):
        name = f"scratch {n}"
        if isinstance(kind, plgpu.Barrier):
            counts = kind.num_arrivals * WARPS
            count = int(np.prod(kind.num_barriers))  # a tuple, or a number
            return Ref(Memory(name, (count,), arrivals=counts))
        return Ref(Memory(name, kind.shape, kind.dtype, shared=True))

    def run(*operands):
        assert not auto_barriers
        global RECORDER
        given = [of_operand(n, operand) for n, operand in enumerate(operands)]
        given += [
            Ref(Memory(f"output {n}", like.shape, like.dtype))
            for n, like in enumerate(out_type)
        ]
        places = list(np.ndindex(*grid))
        for place in {places[0], places[-1]}:
            scratch = [
                [of_scratch(n, kind) for n, kind in enumerate(scratch_types)]
                for _ in range(members)
            ]
            for own in scratch:
                for ref, others in zip(own, zip(*scratch, strict=True), strict=True):
                    ref.memory.everywhere = [other.memory for other in others]
            PLACE.update(zip(grid_names, place, strict=True))
            block = []
            for member in range(members):
                for group in range(mesh.get("num_threads") or 1):
                    PLACE.update(member=member, group=group)
                    RECORDER = Recorder()
                    body(*given, *scratch[member])
                    block.append(RECORDER.events)
            runs.append(Launched(block, members))
        return [jnp.zeros(like.shape, like.dtype) for like in out_type]

    return run


class Launched(NamedTuple):
    """What the blocks of a cluster do, or one block.

    Attributes:
      groups: The events of each warpgroup, block by block.
      members: Blocks.
    """

    groups: list
    members: int

    def without(self, kind, site):
        """Returns the same without the events of a kind and line."""
        groups = [
            [event for event in events if (event.kind, event.site) != (kind, site)]
            for events in self.groups
        ]
        return self._replace(groups=groups)


class Clock(NamedTuple):
    """What is known to be over, by agent, and what of it is fenced.

    Agents are warps, whose events are counted, and barriers, whose phases are.
    """

    over: dict
    fenced: dict

    @classmethod
    def joined(cls, clocks):
        found = cls(defaultdict(int), defaultdict(int))
        for clock in clocks:
            for known, new in zip(found, clock, strict=True):
                for agent, count in new.items():
                    known[agent] = max(known[agent], count)
        return found


@dataclasses.dataclass(eq=False)
class Access:
    """An access to a part of a memory.

    Attributes:
      writes: It does not only read.
      ref: The part.
      operation: What is the same for all warps that do it together.
      agent: Whose count tells that it is over.
      until: Which count; None while it is under way.
      ordinary: It is neither a copy's nor a matrix product's.
      site: The line of the kernel's code that does it, and its function.
    """

    writes: bool
    ref: Ref
    operation: Any
    agent: Any
    until: int | None
    ordinary: bool
    site: str

    def meets(self, other):
        """Says whether they conflict, if nothing orders them."""
        return (
            (self.writes or other.writes)
            and self.operation != other.operation
            and all(
                mine[0] < its[1] and its[0] < mine[1]
                for mine, its in zip(self.ref.spans, other.ref.spans, strict=True)
            )
        )

    def covers(self, other):
        """Says whether what is ordered with this one need not be with the other."""
        return (self.writes or not other.writes) and all(
            mine[0] <= its[0] and its[1] <= mine[1]
            for mine, its in zip(self.ref.spans, other.ref.spans, strict=True)
        )


class Warp:
    """Where a warp is, and what of its is under way."""

    def __init__(self, member, group, number, events):
        self.member, self.group, self.number = member, group, number
        self.events = events
        self.name = (group, number)
        self.next = 0
        self.clock = Clock(defaultdict(int), defaultdict(int))
        self.started = False  # has seen the barriers of the cluster made
        self.products, self.stores, self.uncommitted = [], [], []
        self.waits = defaultdict(int)

    def tick(self):
        """Counts an event."""
        self.clock.over[self.name] += 1
        return self.clock.over[self.name]

    def stored(self, count, read_only):
        """Waits for copies out of shared memory, but for the last few."""
        now = self.clock.over[self.name]
        for group in self.stores[: len(self.stores) - count]:
            for access in group:
                if access.until is None and not (read_only and access.writes):
                    access.until = now


class Block:
    """Runs the warps of a block, or of a cluster's; `found` is what goes wrong."""

    def __init__(self, launched):
        in_block = len(launched.groups) // launched.members
        self.warps = [
            Warp(group // in_block, group, number, events)
            for group, events in enumerate(launched.groups)
            for number in range(WARPS)
        ]
        self.history = defaultdict(list)
        self.awaited = defaultdict(int)  # bytes, in the phase under way
        self.armed = defaultdict(int)
        self.arrived = defaultdict(list)  # clocks, in the phase under way
        self.phases = defaultdict(list)  # clocks of those that are over
        self.waited = []
        self.found = set()

    def run(self):
        """Runs all, each as far as it comes: the order makes no difference."""
        going = True
        while going:
            going = False
            for warp in self.warps:
                while warp.next < len(warp.events) and self.step(warp):
                    going = True
        for warp in self.warps:
            if warp.next < len(warp.events):
                self.found.add(f"{warp.events[warp.next].site} waits for ever")
        for access in itertools.chain(*self.history.values()):
            if access.until is None and not access.writes:
                self.found.add(f"{access.site} is under way at the end")
        for memory, history in self.history.items():
            if memory.shared and len(memory.everywhere) > 1:
                self.outlasts(memory.everywhere.index(memory), history)
        for warp, count, barrier, phase, site in self.waited:
            later = self.phases[barrier][phase + 1 : phase + 2]
            if later and later[0].over[warp] < count:
                self.found.add(f"{site} may miss a phase")
        return self.found

    def outlasts(self, member, history):
        """Finds accesses that may come when a block is gone."""
        ends = Clock.joined(w.clock for w in self.warps if w.member == member)
        for access in history:
            if access.until is None or ends.over[access.agent] < access.until:
                self.found.add(f"{access.site} may come when the block is gone")

    def step(self, warp):
        """Runs a warp's next event; says whether it could."""
        kind, what, site = warp.events[warp.next]
        if kind in ("sync", "stored", "cluster"):
            return self.together(warp)
        if kind in ("publish", "received") and not warp.started:
            self.found.add(f"{site}: a barrier that may not be made")
        if kind in ("wait", "received"):
            if kind == "wait":
                barrier = self.barrier(what[0])
                phase = warp.waits[barrier]
            else:
                exchange, round_ = what
                phase, slot = divmod(round_, SLOTS)
                barrier = (exchange.barriers.memory, slot)
            if len(self.phases[barrier]) <= phase:
                return False
            warp.waits[barrier] += 1
            warp.clock = Clock.joined([warp.clock, self.phases[barrier][phase]])
        now = warp.tick()
        operation = (warp.group, warp.next)
        warp.next += 1

        def access(writes, ref, ordinary=False, agent=warp.name, until=None):
            new = Access(writes, ref, operation, agent, until, ordinary, site)
            self.check(new, warp.clock)
            return new

        if kind in ("wait", "received"):
            self.waited.append((warp.name, now, barrier, phase, site))
        elif kind == "access":
            mode, ref = what
            access(mode == "write", ref, ordinary=True, until=now)
        elif kind == "wgmma":
            _, *operands = what
            warp.products.append([access(False, ref) for ref in operands])
        elif kind in ("wgmma_wait", "sums"):
            while len(warp.products) > (what[0] if what else 0):
                for read in warp.products.pop(0):
                    read.until = now
        elif kind == "store" and warp.number == 0:
            source, target, commit = what
            warp.uncommitted += [access(False, source), access(True, target)]
            if commit:
                warp.stores.append(warp.uncommitted)
                warp.uncommitted = []
        elif kind == "publish" and warp.number == 0:
            self.publish(warp, *what, access)
        elif kind in ("load", "arrive"):
            barrier = self.barrier(what[-1])
            if kind == "load" and warp.number == 0:
                over = {"agent": barrier, "until": len(self.phases[barrier]) + 1}
                access(False, what[0], **over)
                access(True, what[1], **over)
            self.arrive(barrier, warp.clock)
        return True

    def together(self, warp):
        """Runs what the warps of a warpgroup, or cluster, wait for each other in."""
        kind, what, _ = warp.events[warp.next]
        team = self.warps
        if kind != "cluster":
            team = [other for other in team if other.group == warp.group]
        for other in team:
            if other.events[other.next :][:1] != warp.events[warp.next :][:1]:
                return False
        for one in team:
            now = one.tick()
            if kind == "sync":
                one.clock.fenced[one.name] = now
            elif kind == "stored" and one.number == 0:
                one.stored(*what)
        for one, clock in [(one, Clock.joined(o.clock for o in team)) for one in team]:
            one.clock = clock
            one.next += 1
            one.started |= kind == "cluster"
        return True

    def publish(self, warp, exchange, round_, sent, size, access):
        """Arms the barrier of a round, and sends."""
        phase, slot = divmod(round_, SLOTS)
        memory = exchange.barriers.memory
        self.armed[memory, slot] += 1
        self.awaited[memory, slot] += size
        self.arrived[memory, slot].append(Clock.joined([warp.clock]))
        touched = {(memory, slot)}
        for source, target, member, count in sent:
            barrier = (memory.everywhere[member], slot)
            if warp.clock.over[barrier] < phase:
                self.found.add(f"{warp.events[warp.next - 1].site} may come early")
            access(False, source, agent=barrier, until=phase + 1)
            access(True, target, agent=barrier, until=phase + 1)
            self.awaited[barrier] -= count
            self.arrived[barrier].append(Clock.joined([warp.clock]))
            touched.add(barrier)
        for barrier in touched:
            groups = exchange.team.groups
            if self.armed[barrier] == groups and not self.awaited[barrier]:
                self.armed[barrier] = 0
                self.over(barrier)

    @staticmethod
    def barrier(ref):
        """Names one barrier of an array of them."""
        ((start, stop),) = ref.spans
        assert stop == start + 1
        return ref.memory, start

    def arrive(self, barrier, clock):
        arrived = self.arrived[barrier]
        arrived.append(Clock.joined([clock]))
        if len(arrived) == barrier[0].arrivals:
            self.over(barrier)

    def over(self, barrier):
        """Ends a phase."""
        clock = Clock.joined(self.arrived.pop(barrier))
        self.phases[barrier].append(clock)
        clock.over[barrier] = len(self.phases[barrier])

    def check(self, access, clock):
        """Notes an access; finds those before it that nothing orders it with."""
        kept = []
        for before in self.history[access.ref.memory]:
            ordered = (
                before.until is not None and clock.over[before.agent] >= before.until
            )
            if access.meets(before):
                both = f"{before.site} and {access.site}, {access.ref.memory.name}"
                if not ordered:
                    self.found.add(f"{both}: in no order")
                elif (
                    before.writes
                    and before.ordinary
                    and not access.ordinary
                    and clock.fenced[before.agent] < before.until
                ):
                    self.found.add(f"{both}: not fenced")
            if not (ordered and access.covers(before)):
                kept.append(before)
        self.history[access.ref.memory] = [*kept, access]
