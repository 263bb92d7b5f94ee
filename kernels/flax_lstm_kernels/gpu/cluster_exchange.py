"""What the blocks of a cluster send each other, and how they know that it has come.

Every warpgroup of every block takes part in rounds. In one it publishes: it copies
tiles of its block's shared memory to other blocks; then it waits until all that its own
block is to get in that round is there. Rounds alternate between two slots.

On hardware   One mbarrier per slot. Its phase ends when each warpgroup of the block has
              armed it, once a round, and as many bytes have come as they announced.
              Copies are `cp.async.bulk` from shared to distributed shared memory,
              which count their bytes off at the receiver. So nothing is said back, and
              no fence beyond the block is needed (`async_store_smem` of Pallas arms at
              the receiver, with a fence of the whole GPU for every peer and step).
Interpreted   The blocks of a cluster become one block with the warpgroups of all, and
              one copy of every buffer each (`here`). A copy is made at once and then
              arrives at the receiver's barrier, in the place of its bytes.
Order         Whoever waits for round n has, from every block, what it sent in n, which
              it did after its wait for n - 1. Hence no one overwrites a slot of round
              n, at the receiver or as a source, before round n + 2, when all have read
              it. `tests/kernels/test_gpu_cluster_exchange.py` tries all orders.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

SLOTS = 2
BYTES = 8  # of an mbarrier
# PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier" and
# "Data Movement and Conversion Instructions: cp.async.bulk". $n are arguments.
INIT = "@p mbarrier.init.shared::cta.b64 [$0+{offset}], {count};"
ARM = "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [$0], {size};"
COPY = """
mapa.shared::cluster.u32 target, ${target}, ${member};
mapa.shared::cluster.u32 barrier, $0, ${member};
cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes
    [target], [${source}], {size}, [barrier];
"""
WAIT = """
again:
mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [$0], $1;
@!p bra again;
"""
# All threads of all blocks; what was written before is seen after it.
CLUSTER_BARRIER = """
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
"""
FENCE_INIT = "fence.mbarrier_init.release.cluster;"


def slot_of(round_: Any) -> Any:
    """Returns which slot a round uses."""
    return lax.rem(round_, SLOTS)


def parity_of(round_: Any) -> Any:
    """Returns the parity of the phase of its slot's barrier that ends a round."""
    return lax.rem(lax.div(round_, SLOTS), 2)


def others(rank: Any, members: int) -> list[Any]:
    """Returns the other members, each beginning with its neighbour.

    Not all send to the same one at the same time then.
    """
    return [lax.rem(rank + n, members) for n in range(1, members)]


def owners(product: Any, groups: int) -> list[tuple[Any, Any]]:
    """Returns (member, warpgroup) of the 32 units that 64 rows of a product are for."""
    units = [2 * product + half for half in range(2)]
    return [(lax.div(owner, groups), lax.rem(owner, groups)) for owner in units]


def one_thread(mask: int) -> str:
    """Returns PTX that sets p in the thread whose number is 0 under the mask."""
    return (
        f".reg .b32 thread; mov.u32 thread, %tid.x; and.b32 thread, thread, {mask};"
        "setp.eq.u32 p, thread, 0;"
    )


OF_BLOCK, OF_WARPGROUP = one_thread(0x7FFFFFFF), one_thread(127)


def emit(*parts: str, refs: Sequence[Any] = (), values: Sequence[Any] = ()) -> None:
    """Puts PTX into the kernel.

    Args:
      *parts: The text; its arguments $0, $1 ... are `refs` and then `values`.
      refs: References with the transforms they were made with, as pairs; the argument
        is the address in shared memory.
      values: int32 scalars.
    """
    types = [plgpu.RefType(tuple(transforms)) for _, transforms in refs]
    types += [plgpu.Layout.WG_SPLAT(())] * len(values)

    @plgpu.inline_mgpu(arg_types=tuple(types))
    def inline(_: Any, *args: Any) -> None:
        addresses = [utils.memref_ptr(arg) for arg in args[: len(refs)]]
        numbers = [arg.registers.item() for arg in args[len(refs) :]]
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [*addresses, *numbers],
            "\n".join(["{ .reg .pred p;", *parts, "}"]),
            ",".join(["r"] * len(args)),
            has_side_effects=True,
        )

    inline(*(ref for ref, _ in refs), *values)


class Team(NamedTuple):
    """The warpgroups that share the units of one tile.

    Attributes:
      members: Blocks in the cluster.
      groups: Warpgroups of a block.
      together: All members are in one block, for the interpreter.
    """

    members: int
    groups: int
    together: bool

    @property
    def in_block(self) -> int:
        """How many members one block is."""
        return self.members if self.together else 1

    def mesh(self, tiles: int) -> dict[str, Any]:
        """Returns the axes of a kernel with one cluster for each tile of the batch."""
        axes = {
            "grid": (tiles,),
            "grid_names": ("tile",),
            "num_threads": self.in_block * self.groups,
            "thread_name": "group",
        }
        if not self.together:
            axes |= {"cluster": (self.members,), "cluster_names": ("member",)}
        return axes

    def place(self) -> tuple[Any, Any]:
        """Returns the number of this block in the cluster, and of this warpgroup."""
        thread = lax.axis_index("group")
        if self.together:
            return lax.div(thread, self.groups), lax.rem(thread, self.groups)
        # A number that is known makes addresses uniform, which saves instructions.
        return lax.axis_index("member"), 0 if self.groups == 1 else thread

    def barriers(self, copies: int) -> Any:
        """Returns what `Exchange` needs of a block's scratch.

        Args:
          copies: How many a block gets in a round.
        """
        if not self.together:
            return plgpu.SMEM((SLOTS, BYTES // 4), jnp.int32)
        return plgpu.Barrier(
            num_arrivals=self.groups + copies, num_barriers=self.members * SLOTS
        )


class Copy(NamedTuple):
    """A copy of one tile.

    Attributes:
      source: Place in the buffer sent from, behind its first axis.
      target: Place in the receiver's buffer, behind its first axis.
      member: The receiver's number in the cluster.
      size: Bytes; both places are contiguous.
    """

    source: tuple[Any, ...]
    target: tuple[Any, ...]
    member: Any
    size: int


class Exchange(NamedTuple):
    """The rounds of one cluster, as one warpgroup sees them.

    Attributes:
      team: Who takes part.
      barriers: What `Team.barriers` asked for.
      rank: This block's number in the cluster.
      transforms: Of the buffers that are copied between.
    """

    team: Team
    barriers: Any
    rank: Any
    transforms: tuple[Any, ...]

    @property
    def here(self) -> Any:
        """Where this block's part of each buffer is on its first axis."""
        return self.rank if self.team.together else 0

    def start(self) -> None:
        """Makes the mbarriers; returns when those of all members are made."""
        if self.team.together:
            return
        inits = [
            INIT.format(offset=slot * BYTES, count=self.team.groups)
            for slot in range(SLOTS)
        ]
        emit(OF_BLOCK, *inits, FENCE_INIT, CLUSTER_BARRIER, refs=[(self.barriers, ())])

    def finish(self) -> None:
        """Returns when no member is sent anything any more."""
        if not self.team.together:
            emit(CLUSTER_BARRIER)

    def publish(
        self, round_: Any, source: Any, target: Any, copies: Sequence[Copy], size: int
    ) -> None:
        """Arms the barrier of the round and sends; after `commit_smem`.

        Args:
          round_: 0, 1 ... .
          source: Buffer to send from.
          target: Buffer to send to.
          copies: What to send.
          size: Bytes that the block gets in this round, this warpgroup's share of them.
        """
        slot = slot_of(round_)
        if self.team.together:
            self._arrive(self.rank, slot)
            for copy in copies:
                target[(copy.member, *copy.target)] = source[(self.rank, *copy.source)]
                self._arrive(copy.member, slot)
            return
        refs: list[Any] = [(self.barriers.at[slot], ())]
        numbers: dict[Any, int] = {}

        def number(buffer: Any, place: tuple[Any, ...]) -> int:
            """Returns which argument is the address of a place."""
            key = id(buffer), id(place)
            if key not in numbers:
                numbers[key] = len(refs)
                refs.append((buffer.at[(0, *place)], self.transforms))
            return numbers[key]

        places = [
            (number(source, copy.source), number(target, copy.target))
            for copy in copies
        ]
        sends = [
            COPY.format(source=start, target=end, member=len(refs) + n, size=copy.size)
            for n, (copy, (start, end)) in enumerate(zip(copies, places, strict=True))
        ]
        emit(
            OF_WARPGROUP,
            ".reg .b32 target, barrier;",
            "@!p bra done;",
            ARM.format(size=size),
            *sends,
            "done:",
            refs=refs,
            values=[copy.member for copy in copies],
        )

    def _arrive(self, member: Any, slot: Any) -> None:
        plgpu.barrier_arrive(self.barriers.at[member * SLOTS + slot])

    def wait(self, round_: Any) -> None:
        """Waits for what comes in a round: 0, 1 ... ."""
        slot = slot_of(round_)
        if self.team.together:
            plgpu.barrier_wait(self.barriers.at[self.rank * SLOTS + slot])
            return
        emit(WAIT, refs=[(self.barriers.at[slot], ())], values=[parity_of(round_)])
