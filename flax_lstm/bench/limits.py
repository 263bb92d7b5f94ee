"""How fast this machine can be, measured in the same process: a roofline.

Products  The largest rate of a square matrix product, in flops a second, over sizes and
          the libraries at hand.
Memory    The largest rate of copying (bytes read and written) or of reading alone, for
          working sets of several sizes, since small ones stay in a cache. A case is
          held against the fastest set that is at least nearly as large as its own.
Busy      Other work on the machine hides what it can do; `merged` takes the larger of
          measurements taken at several times.
Roofline  attainable = min(products, intensity × memory): Williams, Waterman &
          Patterson (2009).
"""

# Imports what need not be installed.
# pyright: reportMissingImports=false

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_lstm.bench.peers import torch_peers
from flax_lstm.bench.work import Work

PRODUCT_SIZES = {"cpu": (512, 1024, 2048), "other": (2048, 4096, 8192)}
MEMORY_BYTES = {
    "cpu": (2**20, 2**23, 2**26, 2**28),
    "other": (2**23, 2**26, 2**28, 2**30),
}
SMOKE_SIZES, SMOKE_BYTES = (256,), (2**20, 2**22)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What was measured.

    Attributes:
      flops_per_s: Largest product rate of each dtype, and who reached it.
      bytes_per_s: Largest memory rate of each working set in bytes, and who reached it.
    """

    flops_per_s: dict[str, tuple[float, str]]
    bytes_per_s: dict[int, tuple[float, str]]

    def bandwidth(self, working_set: float) -> float:
        """Returns the bytes a second that a working set of that many bytes may have.

        Its size lies between two that were measured: the lower is taken, which is no
        slower.
        """
        sizes = sorted(self.bytes_per_s)
        below = [size for size in sizes if size <= working_set] or sizes[:1]
        return max(self.bytes_per_s[n][0] for n in sizes if n >= below[-1])

    def attainable(self, work: Work, dtype: str) -> float:
        """Returns the flops a second that the machine allows for this work."""
        peak = self.flops_per_s[dtype][0]
        return min(peak, work.intensity * self.bandwidth(work.bytes))

    def merged(self, other: "Limits") -> "Limits":
        """Returns the larger of each rate: a busy moment hides what the machine can."""
        return Limits(
            _larger(self.flops_per_s, other.flops_per_s),
            _larger(self.bytes_per_s, other.bytes_per_s),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns what results.json keeps."""
        return {
            "gflop_per_s": {
                dtype: {"rate": rate / 1e9, "by": by}
                for dtype, (rate, by) in self.flops_per_s.items()
            },
            "gb_per_s": {
                str(size): {"rate": rate / 1e9, "by": by}
                for size, (rate, by) in self.bytes_per_s.items()
            },
        }


def _larger(one: dict, other: dict) -> dict:
    nothing = (0.0, "")
    return {
        key: max(one.get(key, nothing), other.get(key, nothing))
        for key in {**one, **other}
    }


def measure_limits(
    dtypes: tuple[str, ...], *, smoke: bool = False, budget_s: float = 1.0
) -> Limits:
    """Measures the machine.

    Args:
      dtypes: Whose product rates are wanted.
      smoke: Takes one small size, which says little.
      budget_s: Seconds for each size and library.
    """
    kind = "cpu" if jax.default_backend() == "cpu" else "other"
    flops: dict[str, tuple[float, str]] = {}
    for dtype in dtypes:
        for size in SMOKE_SIZES if smoke else PRODUCT_SIZES[kind]:
            for library, call in products(size, dtype):
                rate = 2.0 * size**3 / best(call, budget_s)
                name = f"{library} {size}x{size}"
                flops[dtype] = max(flops.get(dtype, (0.0, "")), (rate, name))
    moved: dict[int, tuple[float, str]] = {}
    for size in SMOKE_BYTES if smoke else MEMORY_BYTES[kind]:
        for library, call, traffic in movers(size):
            found = (traffic / best(call, budget_s / 2), library)
            moved[size] = max(moved.get(size, (0.0, "")), found)
    return Limits(flops, moved)


def best(call: Callable[[], Any], budget_s: float) -> float:
    """Returns the least seconds of a call, among the calls that fit the budget."""
    call()
    least, start = float("inf"), time.perf_counter()
    tries = 0
    while tries < 3 or (time.perf_counter() - start < budget_s and tries < 1000):
        before = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - before)
        tries += 1
    return least


def products(size: int, dtype: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields (library, call) of a product of two square matrices."""
    left = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul).lower(left, left).compile()
    yield "jax", lambda: jax.block_until_ready(product(left, left))
    if torch_peers.missing() is None:
        import torch

        on = torch_peers.device()
        other = torch.ones((size, size), dtype=getattr(torch, dtype), device=on)

        def call() -> None:
            with torch.inference_mode():
                torch.matmul(other, other)
            torch_peers.wait(on)

        yield "torch", call


def movers(size: int) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Yields (library and operation, call, bytes moved) on working sets of that size.

    A copy has half of it as its source, half as its target.
    """
    half = jnp.ones(size // 8, jnp.float32)
    whole = jnp.ones(size // 4, jnp.float32)
    copy = jax.jit(jnp.negative).lower(half).compile()
    read = jax.jit(jnp.vdot).lower(whole, whole).compile()
    yield "jax copy", lambda: jax.block_until_ready(copy(half)), size
    yield "jax read", lambda: jax.block_until_ready(read(whole, whole)), size
    if jax.default_backend() == "cpu":
        source, target = np.ones(size // 8, np.float32), np.ones(size // 8, np.float32)
        both = np.ones(size // 4, np.float32)
        yield "numpy copy", lambda: np.copyto(target, source), size
        yield "numpy read", lambda: np.dot(both, both), size
    if torch_peers.missing() is None:
        import torch

        on = torch_peers.device()
        first, second = (torch.ones(size // 8, device=on) for _ in range(2))
        everything = torch.ones(size // 4, device=on)

        def copied() -> None:
            with torch.inference_mode():
                second.copy_(first)
            torch_peers.wait(on)

        def summed() -> None:
            with torch.inference_mode():
                torch.dot(everything, everything)
            torch_peers.wait(on)

        yield "torch copy", copied, size
        yield "torch read", summed, size
