"""What the GPU kernels do with registers and shared memory, in one place.

A warpgroup owns 64 units of a tile of the batch. Its matrix instruction (wgmma) gives
them as `[64 units, rows]`, the batch along columns, so that a thread holds all four
gates of its units. Memory has units last: tiles are turned on their way.

Axes     N rows of the tile, 64 units.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from flax_lstm.cell import squash
from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu.arrange import UNITS

SWIZZLE = 128  # bytes; wgmma wants the same of both operands


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


def hardware_sigmoid(x: Any) -> Any:
    """Returns the sigmoid by one instruction, `tanh`, where it has one."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def activated(z: Any, *, approximate: bool) -> tuple[Any, ...]:
    """Turns the four pre-activations into gates."""
    return squash(*z, sigmoid=hardware_sigmoid if approximate else jax.nn.sigmoid)


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
        """Loads a tile `[N, 64]` of shared memory as float32 `[64, N]`.

        Args:
          ref: The tile.
          dtype: What its bits are, where that is not what it is called.
        """
        if self.plain:
            value = ref[...].T
        else:
            turned = compat.transposed(ref)
            value = compat.load(turned, plgpu.Layout.WGMMA_TRANSPOSED)
            value = plgpu.layout_cast(value, plgpu.Layout.WGMMA)
        if dtype is not None and value.dtype != dtype:
            value = lax.bitcast_convert_type(value, dtype)
        return value.astype(jnp.float32)

    def store(self, ref: Any, value: Any) -> None:
        """Stores `[64, N]` into a tile `[N, 64]` of shared memory, in its dtype."""
        value = value.astype(ref.dtype)
        if self.plain:
            ref[...] = value.T
        else:
            turned = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
            compat.transposed(ref)[...] = turned

    def per_row(self, ref: Any) -> Any:
        """Loads `[N]` of global memory, one for each row, as `[64, N]`."""
        if self.plain:
            value = ref[...]
        else:
            value = compat.load(ref, plgpu.Layout.WGMMA.reduce(0))
        return lax.broadcast_in_dim(value, (UNITS, *value.shape), (1,))

    def multiply(self, sums: tuple[Any, ...], weights: Any, tiles: list[Any]) -> None:
        """Starts `sums[n] += weights[n] [64, K] @ tiles^T [K, N]`, one for each n.

        Args:
          sums: Accumulators `[64, N]`.
          weights: For each sum and tile, a reference `[64, 64]`.
          tiles: References `[N, 64]`; side by side they are `[N, K]`.
        """
        for total, row in zip(sums, weights, strict=True):
            for weight, tile in zip(row, tiles, strict=True):
                plgpu.wgmma(total, weight, compat.transposed(tile))

    def product(self, weights: Any, tiles: list[Any]) -> tuple[Any, ...]:
        """Returns what `multiply` sums up, for an interpreter without wgmma."""

        def one(row: Any) -> Any:
            parts = [
                lax.dot_general(
                    weight[...].astype(jnp.float32),
                    tile[...].astype(jnp.float32),
                    (((1,), (1,)), ((), ())),
                    precision=lax.Precision.HIGHEST,
                )
                for weight, tile in zip(row, tiles, strict=True)
            ]
            return sum(parts[1:], parts[0])

        return tuple(one(row) for row in weights)
