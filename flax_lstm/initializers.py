"""Initialisers of fused weights, and the two recipes of the classifier.

They are frozen dataclasses, not closures: NNX compares the initialisers that a module
keeps, and two equal modules must compare equal.

Axes     D rows (input or hidden size), H hidden size; gate order i f g o.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from flax_lstm.cell import Initializer, draw_gates, glorot, orthogonal

InitializerName = Literal["orthogonal", "glorot"]


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Initialiser: uniform in [-scale, scale)."""

    scale: float

    def __call__(
        self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> Array:
        """Draws an array."""
        return jax.random.uniform(key, shape, dtype, -self.scale, self.scale)


@dataclasses.dataclass(frozen=True)
class ByGate:
    """Initialiser of a fused `[D, 4H]` matrix: draws the four `[D, H]` one by one.

    The fan-out that `init` sees is that of one gate, as in the layouts that store the
    gates apart; and an orthogonal matrix is square.
    """

    init: Initializer

    def __call__(
        self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> Any:
        """Draws an array, boxed where `init` boxes it."""
        init, boxed = opened(self.init)
        return boxed(draw_gates(init, key, (shape[0], shape[1]), dtype))


@dataclasses.dataclass(frozen=True)
class FusedBias:
    """Initialiser of a fused bias `[4H]`: `init`, plus forget_bias in the second H."""

    init: Initializer
    forget_bias: float

    def __call__(
        self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> Any:
        """Draws an array, boxed where `init` boxes it."""
        hidden = shape[0] // 4
        init, boxed = opened(self.init)
        bias = init(key, shape, dtype)
        return boxed(bias.at[hidden : 2 * hidden].add(self.forget_bias))


def opened(init: Initializer) -> tuple[Initializer, Callable[[Array], Any]]:
    """Returns the initialiser of bare arrays, and what boxes the whole as it would.

    One from `nnx.with_partitioning` or `nnx.with_metadata` boxes what it draws.
    """
    boxes: list[nnx.VariableMetadata] = []

    def bare(*args: Any) -> Array:
        drawn = init(*args)
        if isinstance(drawn, nnx.VariableMetadata):
            boxes.append(drawn)
            return drawn.raw_value
        return drawn

    def boxed(array: Array) -> Any:
        return dataclasses.replace(boxes[0], raw_value=array) if boxes else array

    return bare, boxed


def weight_initializers(
    name: InitializerName, input_size: int, hidden_size: int
) -> tuple[Initializer, Initializer]:
    """Returns the initialisers of one gate's input and recurrent matrix.

    "orthogonal": Glorot-uniform and orthogonal, gate by gate. "glorot": both uniform
    within the limit of the stacked matrix `[I + H, 4H]`, as TensorFlow 1 draws them.

    Raises:
      ValueError: If the name is unknown.
    """
    if name == "orthogonal":
        return glorot, orthogonal
    if name == "glorot":
        # Glorot & Bengio (2010), equation 16, with fans I + H and 4H.
        stacked = Uniform((6 / (input_size + hidden_size + 4 * hidden_size)) ** 0.5)
        return stacked, stacked
    raise ValueError(f'initializer must be "orthogonal" or "glorot"; got {name!r}.')
