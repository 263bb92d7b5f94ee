"""How the blocks of the `grid` kernels tell one another that a part is in memory.

A flag is a counter in global memory. A block that has written its part adds one; a
block that needs all parts waits until the counter has reached their number. Counters
only grow: what is waited for grows with the steps. They are zero at every launch, for
Pallas allocates them so.

Order    A signal releases and a wait acquires, at the scope of the GPU: what a block
         wrote before its signal is there for whoever waited for it. Parts are written
         by ordinary stores and fetched by the copy engine (TMA), to which stores are
         not visible by themselves: both sides put a proxy fence in between.
Proof    `tests/kernels/test_flags.py` takes from the kernels what each block does with
         flags and parts, and runs through every order in which that can happen, of a
         few blocks and steps. It says nothing about the fences.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

APART = 32  # counters in one cache line of 128 bytes, of which one is used


def proxy_fence() -> None:
    """Orders ordinary accesses to global memory and those of the copy engine."""

    def emit(_: Any) -> None:
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [],
            "fence.proxy.async.global;",
            "",
            has_side_effects=True,
        )

    fence: Any = plgpu.inline_mgpu()(emit)
    fence()


class Flags(NamedTuple):
    """The flags of one launch, on the hardware.

    Attributes:
      counters: References to int32 counters in global memory.
    """

    counters: Any

    @classmethod
    def of(cls, number: int) -> "Flags":
        """Allocates flags, at zero, inside a kernel."""
        return cls(pl.get_global(plgpu.SemaphoreType.REGULAR((number * APART,))))

    def signal(self, flag: Any) -> None:
        """Tells that what this block wrote up to here is there."""
        proxy_fence()
        plgpu.commit_smem()  # the whole block has come to here
        plgpu.semaphore_signal(self.counters.at[flag * APART], memory_scope="gpu")

    def wait(self, flag: Any, count: Any) -> None:
        """Waits until `count` signals have been given."""
        plgpu.semaphore_wait(
            self.counters.at[flag * APART], count, decrement=False, memory_scope="gpu"
        )
        proxy_fence()


class Slots(NamedTuple):
    """Flags for the interpreter, which has no semaphores.

    Every block counts its own signals in memory, and who waits adds them up, again and
    again. On the hardware this would lack both the order and the fences.

    Attributes:
      counts: Reference to int32 `[flags, blocks]` in global memory, at zero.
    """

    counts: Any

    def signal(self, flag: Any) -> None:
        """Tells that what this block wrote up to here is there."""
        mine = lax.axis_index("unit")
        self.counts[flag, mine] = self.counts[flag, mine] + 1

    def wait(self, flag: Any, count: Any) -> None:
        """Waits until `count` signals have been given."""

        def given(_: Any = None) -> Any:
            return lax.reduce(self.counts[flag], jnp.int32(0), lax.add, (0,))

        lax.while_loop(lambda seen: seen < count, given, given())


class Launches(NamedTuple):
    """No flags: each phase is a launch of its own, and begins when the last is done."""

    def signal(self, flag: Any) -> None:
        """Does nothing."""

    def wait(self, flag: Any, count: Any) -> None:
        """Does nothing."""
