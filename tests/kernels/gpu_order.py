"""In which order the threads of a block of a GPU kernel do what it does, in a model.

Four warps run through what each warpgroup did (`gpu_recorder.py`), and every two
accesses to the same place, of which one writes, must be in an order that barriers
enforce, whatever the speed of warps, copies and matrix products (vector clocks). So one
run stands for all orders. The blocks of a cluster are looked at together, others one by
one.

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
from collections import defaultdict
from typing import Any, NamedTuple

from flax_lstm_kernels.gpu.cluster_exchange import SLOTS
from gpu_recorder import WARPS, Ref


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
