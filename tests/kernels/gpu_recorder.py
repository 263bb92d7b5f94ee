"""What a block of a GPU kernel does: its own code, with a recorder in Pallas' place.

The kernel runs as Python, once for each warpgroup. Noted is every access to shared
memory, copy, matrix product and barrier, for `gpu_order.py`; values are computed only
as far as they decide where the kernel goes.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu import flags
from flax_lstm_kernels.gpu.cluster_exchange import Exchange
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
