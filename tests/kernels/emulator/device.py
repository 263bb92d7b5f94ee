"""What a kernel runs on: blocks of threads, and their memory.

Memory   Global memory is the kernel's arguments, shared memory what its launch asks
         for; neither can be left, nor reached unaligned. What nothing wrote is 0xff
         bytes, a NaN of every floating type.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

LANES = 32
# Addresses: from 0, shared memory of the own block; from (k + 1) << 24, of block k of
# the cluster; from k << 40, the k-th array of global memory, or the parameters.
SHARED, GLOBAL = 24, 40


class Launch(NamedTuple):
    """How a kernel is launched; the first three are counts along x, y and z."""

    grid: tuple[int, ...]
    cluster: tuple[int, ...]
    threads: tuple[int, ...]
    shared_bytes: int


class Fault(Exception):
    """What would be an error, or undefined, on the device."""


class Space:
    """Bytes at one place of an address."""

    def __init__(self, data: np.ndarray, name: str) -> None:
        self.data, self.name = data, name
        # Whole words of every width, for views; what is past the end is never reached.
        self.views: dict[int, np.ndarray] = {}
        for width in (1, 2, 4, 8):
            whole = len(data) // width * width
            self.views[width] = data[:whole].view(f"u{width}")

    def words(self, at: np.ndarray, width: int, aligned: int) -> np.ndarray:
        """Returns the numbers of the words at these bytes, each of `width`.

        Raises:
          Fault: If one is outside, or not aligned to `aligned` bytes.
        """
        if np.any(at % aligned):
            raise Fault(f"{self.name}: bytes {at} are not aligned to {aligned}")
        if np.any(at + aligned > len(self.data)):
            raise Fault(f"{self.name}: bytes {at} + {aligned} of {len(self.data)}")
        return at // width


class Barrier:
    """An mbarrier: counts arrivals and bytes, and changes phase when all are there."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, expected: int) -> None:
        if not self.pending:
            raise Fault("more arrive at an mbarrier than it counts")
        self.bytes += expected
        self.pending -= 1
        self._turn()

    def complete(self, count: int) -> None:
        self.bytes -= count
        self._turn()

    def _turn(self) -> None:
        if not self.pending and not self.bytes:
            self.phase ^= 1
            self.pending = self.count


class Block:
    """A block of threads: its shared memory and its barriers."""

    def __init__(self, place: tuple[int, ...], rank: int, launch: Launch) -> None:
        self.place, self.rank = place, rank
        size = launch.shared_bytes
        self.space = Space(np.full(size, 0xFF, np.uint8), f"shared memory of {place}")
        # One more than the warp whose store to a byte no fence has followed yet, or 0.
        self.unfenced = np.zeros(size, np.uint8)
        self.barriers: dict[int, Barrier] = {}
        self.arrived: dict[int, int] = {}  # warps at each `bar.sync`
        self.passed: dict[int, int] = {}
        self.cluster: list[Block] = []
        self.gone = 0  # warps that have returned
        self.at_cluster = self.of_cluster = 0  # arrivals at, and phases of, its barrier

    def barrier(self, address: int) -> Barrier:
        if address not in self.barriers:
            raise Fault(f"no mbarrier at {address} of {self.place}")
        return self.barriers[address]

    def store(self, warp: "Warp", words: np.ndarray, value: np.ndarray) -> None:
        """Has threads of a warp store words of a value's width to shared memory."""
        width = value.dtype.itemsize
        self.space.views[width][words] = value
        for byte in range(width):
            self.unfenced[words * width + byte] = warp.number + 1

    def fence(self, warp: "Warp") -> None:
        """Lets what a warp has stored be read by copies and matrix products."""
        self.unfenced[self.unfenced == warp.number + 1] = 0

    def read_beside(self, words: np.ndarray, width: int) -> np.ndarray:
        """Returns words of shared memory to a copy or matrix product.

        Raises:
          Fault: If the fence is missing that lets it see a store to them.
        """
        if self.unfenced[words * width].any():
            raise Fault(f"{self.place}: a copy or product reads what no fence follows")
        return self.space.views[width][words]

    def peer(self, address: int) -> tuple["Block", int]:
        """Returns the block of a cluster, and the byte there, that an address means."""
        number, at = address >> SHARED, address & ((1 << SHARED) - 1)
        block = self.cluster[number - 1] if number else self
        return block, at


@dataclasses.dataclass
class Path:
    """Threads of a warp that go together.

    Attributes:
      pc: The instruction that they are at.
      active: Which they are; None for all.
      until: The instruction at which they wait for the others.
    """

    pc: int
    active: np.ndarray | None
    until: int


class Warp:
    """32 threads: registers, where they are, and what they have under way."""

    def __init__(self, block: Block, number: int, registers: int) -> None:
        self.block, self.number = block, number
        self.R: list[Any] = [None] * registers
        self.paths = [Path(0, None, -1)]  # the last is run; none when all have returned
        self.wait: Callable[[], bool] | None = None
        self.products: list[Callable[[], None]] = []  # not yet in a group
        self.product_groups: list[list[Callable[[], None]]] = []
        self.stores: list[Any] = []
        self.store_groups: list[list[Any]] = []
        self.seen: dict[Any, Any] = {}  # what it read last where it looks again
        self.between = 0  # instructions since it last looked

    @property
    def thread(self) -> np.ndarray:
        return self.number * LANES + np.arange(LANES)
