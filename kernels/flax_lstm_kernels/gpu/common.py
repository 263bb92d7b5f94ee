"""What the GPU kernels do with references, registers and shared memory, in one place.

A warpgroup owns 64 units of a tile of the batch. Its matrix instruction (wgmma) gives
them as `[64 units, rows]`, the batch along columns, so that a thread holds all four
gates of its units. Memory has units last: tiles are turned on their way.

Axes     N rows of the tile, 64 units.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flax_lstm.cell import squash, update
from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu.arrange import UNITS

SWIZZLE = 128  # bytes; wgmma wants the same of both operands
TF32_CUT = 13  # bits of a float32 that tf32 does not have


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns shared memory whose last two axes are laid out for TMA and wgmma.

    Args:
      shape: `[..., rows, columns]`: rows in eights, columns in 128 bytes. A copy or an
        operand is one index into the leading axes, for it has to be contiguous.
      dtype: Of its elements.
    """
    columns = SWIZZLE // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(SWIZZLE))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def place_of(first: Any, size: int, tile: int, end: int) -> tuple[Any, Any]:
    """Returns where some of a tile lie; of the tiles the last one ends at the `end`.

    And by how many it is moved for that: so many of it the tile before has, too.

    Args:
      first: Where they would lie in whole tiles.
      size: How many they are.
      tile: Of how many they are.
      end: Of all.
    """
    if end % tile == 0:
        return pl.ds(first, size), 0
    again = jnp.maximum((lax.div(first, tile) + 1) * tile - end, 0)
    return pl.ds(first - again, size), again


class Refs:
    """The references that a kernel is given, to be taken one after the other."""

    def __init__(self, refs: Sequence[Any]):
        """Begins before the first of them."""
        self.rest = list(refs)

    def __call__(self, present: bool = True) -> Any:
        """Takes the next; None for one that is not `present`."""
        return self.rest.pop(0) if present else None


def widened(value: Any, bits: Any = None) -> Any:
    """Returns a value in float32; its bits may be those of another dtype."""
    if bits is not None and value.dtype != bits:
        value = lax.bitcast_convert_type(value, bits)
    return value.astype(jnp.float32)


def as_operand(value: Any, dtype: Any) -> Any:
    """Rounds to what the matrix instruction takes of a dtype: of float32, tf32.

    It would cut the last 13 bits off; rounded to nearest, they err half as much, and
    in both directions. Elementwise, for registers and for arrays.

    >>> as_operand(jnp.float32(1 + 2**-11), jnp.float32) == 1 + 2**-10
    Array(True, dtype=bool)
    """
    value = value.astype(dtype)
    return nearest_tf32(value) if value.dtype == jnp.float32 else value


def nearest_tf32(value: Any) -> Any:
    """Rounds float32 to the nearest of tf32; of two, to the larger in magnitude."""
    # By bits: Mosaic lowers no `lax.reduce_precision`.
    bits = lax.bitcast_convert_type(value, jnp.int32)
    rounded = (bits + (1 << (TF32_CUT - 1))) & -(1 << TF32_CUT)
    rounded = lax.bitcast_convert_type(rounded, jnp.float32)
    # The bits of a NaN may be all ones: then the sum is those of -0.
    return jnp.where(value != value, value, rounded)


def multiplied_turned(dtype: Any) -> bool:
    """Says whether the matrix instruction takes weights as they lie, `[from, to]`.

    It takes 16 bits in either order; tf32 only with the axis that is summed over last.
    """
    return jnp.dtype(dtype).itemsize == 2


def hardware_sigmoid(x: Any) -> Any:
    """Returns the sigmoid by one instruction, `tanh`, where it has one."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def activated(z: Any, *, approximate: bool) -> tuple[Any, Any, Any, Any]:
    """Turns the four pre-activations into gates."""
    return squash(*z, sigmoid=hardware_sigmoid if approximate else jax.nn.sigmoid)


class Slopes(NamedTuple):
    """What the gradients of a step's output and cell are multiplied with.

    The transpose of `flax_lstm.cell`'s update and activations, written out, for Mosaic
    cannot lower what `jax.vjp` makes of them, and so that all but this is at hand when
    the gradients come.
    """

    h_to_c: Any
    to_z: tuple[Any, ...]
    o: Any
    f: Any

    @classmethod
    def of(cls, gates: tuple[Any, ...], c: Any) -> "Slopes":
        """Prepares a step, given its gates and the cell it started from."""
        i, f, g, o = gates
        tanh_c = jnp.tanh(f * c + i * g)
        return cls(
            h_to_c=o * (1 - tanh_c * tanh_c),
            to_z=(g * i * (1 - i), c * f * (1 - f), i * (1 - g * g)),
            o=tanh_c * o * (1 - o),
            f=f,
        )

    def apply(self, d_h: Any, d_c: Any) -> tuple[list[Any], Any]:
        """Returns `([dz_i, dz_f, dz_g, dz_o], dc)`, dc that of the cell before.

        Args:
          d_h: Gradient of the step's output.
          d_c: Gradient of its cell, as far as it does not come from the output.
        """
        d_c = d_c + d_h * self.h_to_c
        return [*(d_c * slope for slope in self.to_z), d_h * self.o], d_c * self.f


def step_forward(
    z: Sequence[Any],
    recurrent: Sequence[Any],
    c: Any,
    fresh: Any,
    *,
    approximate: bool,
) -> tuple[tuple[Any, ...], Any, tuple[Any, Any]]:
    """Takes a step; returns its gates, the cell it started from, and the new state.

    Args:
      z: The gates before activation, without h R.
      recurrent: h R.
      c: The cell before the step.
      fresh: Where the step starts from zeros; None for nowhere.
      approximate: As in `activated`.
    """
    if fresh is not None:
        recurrent = [jnp.where(fresh, 0.0, part) for part in recurrent]
        c = jnp.where(fresh, 0.0, c)
    z = [given + part for given, part in zip(z, recurrent, strict=True)]
    gates = activated(z, approximate=approximate)
    return gates, c, update(*gates, c)


def meet(barrier: Any, groups: int) -> None:
    """Waits for all warpgroups; each then sees what the others stored and committed."""
    if groups > 1:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)


class Registers(NamedTuple):
    """How values come into registers, and leave them.

    Attributes:
      plain: The interpreter at hand knows neither layouts of registers nor turned
        operands of wgmma; a turned copy and a plain product take their place.
    """

    plain: bool

    @classmethod
    def of(cls, interpret: Any) -> "Registers":
        """Returns what the hardware, or the interpreter asked for, can do."""
        return cls(bool(interpret) and not compat.INTERPRETS_LAYOUTS)

    def load(self, ref: Any, dtype: Any = None) -> Any:
        """Loads a tile `[N, 64]` as float32 `[64, N]`.

        Args:
          ref: The tile.
          dtype: What its bits are, where that is not what it is called.
        """
        return widened(self.bring(ref), dtype)

    def bring(self, ref: Any) -> Any:
        """Loads a tile `[N, 64]` as `[64, N]`, pairs of units at a time."""
        if self.plain:
            return ref[...].T
        turned = compat.transposed(ref)
        value = compat.load(turned, plgpu.Layout.WGMMA_TRANSPOSED)
        return plgpu.layout_cast(value, plgpu.Layout.WGMMA)

    def store(self, ref: Any, value: Any) -> None:
        """Stores `[64, N]` into a tile `[N, 64]` of shared memory, in its dtype."""
        value = value.astype(ref.dtype)
        if self.plain:
            ref[...] = value.T
        else:
            turned = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
            compat.transposed(ref)[...] = turned

    def put(self, ref: Any, value: Any, through: Any = None) -> None:
        """Stores `[64, N]` into a tile `[N, 64]` anywhere, in its dtype.

        Args:
          ref: The tile; or `[64]` of global memory, for the first row.
          value: What to store.
          through: Shared memory `[N, 64]`, in no tiles, for a row.
        """
        value = value.astype(ref.dtype)
        if len(ref.shape) == 1:
            plgpu.commit_smem()  # by all warps: each has read the last one
            self.put(through, value)
            plgpu.commit_smem()
            row, layout = through.at[0], plgpu.Layout.WGMMA.reduce(1)
            compat.store(ref, row[...] if self.plain else compat.load(row, layout))
        elif self.plain:
            ref[...] = value.T
        else:
            turned = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
            compat.store(compat.transposed(ref), turned)

    def turn(self, ref: Any) -> None:
        """Turns a tile `[64, 64]` of shared memory in place, as operand."""
        value = as_operand(self.load(ref), ref.dtype)
        plgpu.commit_smem()  # by all warps: each has read
        if self.plain:
            ref[...] = value
        else:
            compat.store(ref, value)

    def round(self, ref: Any) -> None:
        """Makes an operand of a tile `[N, 64]` of shared memory, in place.

        Each thread writes what it has read itself: no barrier is needed in between.
        """
        self.store(ref, as_operand(self.load(ref), ref.dtype))

    def without(
        self, value: Any, axis: int, again: Any, layout: Any = plgpu.Layout.WGMMA
    ) -> Any:
        """Sets the first few of an axis to 0, which the tile before has, too.

        Args:
          value: Some of what a product sums over.
          axis: Along which it does.
          again: How many; the 0 of `place_of` for none, anywhere.
          layout: Of the value.
        """
        if isinstance(again, int):
            return value
        number = lax.broadcasted_iota(jnp.int32, value.shape, axis)
        if not self.plain:
            number = plgpu.layout_cast(number, layout)
        return jnp.where(number < again, jnp.zeros((), value.dtype), value)

    def bring_turned(self, tiles: list[tuple[Any, Any, Any]]) -> None:
        """Brings tiles `[64, N]` of any memory to shared memory, as operands.

        Args:
          tiles: Each where it lies, the tile `[N, 64]`, and `again` of `without`.
        """
        layout = plgpu.Layout.WGMMA
        found = [
            (tile, place[...] if self.plain else compat.load(place, layout), again)
            for place, tile, again in tiles  # all on their way at once
        ]
        for tile, value, again in found:
            self.store(tile, as_operand(self.without(value, 0, again), tile.dtype))

    def per_unit(self, ref: Any, rows: int) -> Any:
        """Loads `[64]` of global memory, one for each unit, as `[64, rows]`."""
        if self.plain:
            value = ref[...]
        else:
            value = compat.load(ref, plgpu.Layout.WGMMA.reduce(1))
        return lax.broadcast_in_dim(value, (UNITS, rows), (0,))

    def per_row(self, ref: Any) -> Any:
        """Loads `[N]` of global memory, one for each row, as `[64, N]`."""
        if self.plain:
            value = ref[...]
        else:
            value = compat.load(ref, plgpu.Layout.WGMMA.reduce(0))
        return lax.broadcast_in_dim(value, (UNITS, *value.shape), (1,))

    def sums(
        self,
        pairs: list[list[tuple[Any, Any]]],
        meanwhile: Callable[[], Any],
        *,
        turned: bool = False,
    ) -> tuple[tuple[Any, ...], Any]:
        """Multiplies; returns the sums `[64, N]` and what `meanwhile` returned.

        Args:
          pairs: For each sum, its `(weights [64, K], tile [N, K])` in shared memory,
            of which it is the sum of all `weights @ tile^T`, in float32.
          meanwhile: What can be done while the products are on their way.
          turned: The weights are `[K, 64]`.
        """
        rows = pairs[0][0][1].shape[0]
        if self.plain:
            found = meanwhile()
            return tuple(plain_sum(pair, turned=turned) for pair in pairs), found

        def scope(*totals: Any) -> Any:
            # In turn, so that a product need not wait for its sum's last one.
            for column in zip(*pairs, strict=True):
                for total, (weights, tile) in zip(totals, column, strict=True):
                    weights = compat.transposed(weights) if turned else weights
                    plgpu.wgmma(total, weights, compat.transposed(tile))
            found = meanwhile()
            return tuple(total[...] for total in totals), found

        totals = [plgpu.WGMMAAccumulatorRef((UNITS, rows), jnp.float32)] * len(pairs)
        return pl.run_scoped(scope, *totals)


def plain_sum(pairs: list[tuple[Any, Any]], *, turned: bool) -> Any:
    """Returns one of `Registers.sums`, for an interpreter without turned operands."""
    parts = [
        plain_product(weights[...].T if turned else weights[...], tile[...])
        for weights, tile in pairs
    ]
    return sum(parts[1:], parts[0])


def plain_product(weights: Any, tile: Any) -> Any:
    """Returns `weights @ tile^T` in float32, what wgmma would make of the operands."""
    return lax.dot_general(
        weights.astype(jnp.float32),
        tile.astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )
