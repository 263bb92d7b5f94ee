"""One Linen LSTM layer: the cell, the cell over time, and its parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from flax_lstm import layers
from flax_lstm.cell import (
    Initializer,
    LSTMParams,
    LSTMState,
    glorot,
    orthogonal,
    state_dtype,
)
from flax_lstm.choice import Implementation
from flax_lstm.layers import Activation

zeros = jax.nn.initializers.zeros


class _Gate(nn.Module):
    """Parameters of one gate, named as `nn.Dense` names them."""

    features: int
    kernel_init: Initializer
    bias_init: Initializer | None
    param_dtype: Any

    @nn.compact
    def __call__(self, rows: int) -> tuple[Array, Array | None]:
        """Returns the kernel `[rows, features]` and the bias, if there is one."""
        kernel = self.param("kernel", self._kernel, (rows, self.features))
        if self.bias_init is None:
            return kernel, None
        shape = (self.features,)
        return kernel, self.param("bias", self.bias_init, shape, self.param_dtype)

    def _kernel(self, key: Array, shape: tuple[int, ...]) -> Any:
        # As flax_lstm.cell.draw, for initialisers that box their array as well.
        drawn = self.kernel_init(key, shape, state_dtype(self.param_dtype))
        return jax.tree.map(lambda a: a.astype(self.param_dtype), drawn)


class LSTMCell(nn.RNNCellBase):
    """One step of an LSTM; goes into `nn.RNN` in place of `nn.OptimizedLSTMCell`.

    Attributes:
      features: H, the number of units.
      gate_fn: Activation of the gates i, f and o.
      activation_fn: Activation of the candidate g and of the output.
      kernel_init: Initialiser of the four `[I, H]` input matrices.
      recurrent_kernel_init: Initialiser of the four `[H, H]` matrices; drawn in
        float32 at least, then cast.
      bias_init: Initialiser of the four biases.
      dtype: Computation dtype; the promotion of inputs and weights when None.
      param_dtype: Dtype of the parameters.
      carry_init: Initialiser of the carry.
      forget_bias: Added to the bias of the forget gate when it is drawn.
    """

    features: int
    gate_fn: Activation = jax.nn.sigmoid
    activation_fn: Activation = jnp.tanh
    kernel_init: Initializer = glorot
    recurrent_kernel_init: Initializer = orthogonal
    bias_init: Initializer = zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32
    carry_init: Initializer = zeros
    forget_bias: float = 1.0

    @nn.compact
    def fused(self, input_size: int) -> LSTMParams:
        """Returns the weights as the functions of this package take them."""

        def forget_init(*args: Any) -> Any:
            return jax.tree.map(lambda b: b + self.forget_bias, self.bias_init(*args))

        kernels, recurrents, biases = [], [], []
        for gate in "ifgo":
            kernel, _ = _Gate(
                self.features, self.kernel_init, None, self.param_dtype, name=f"i{gate}"
            )(input_size)
            recurrent, bias = _Gate(
                self.features,
                self.recurrent_kernel_init,
                forget_init if gate == "f" else self.bias_init,
                self.param_dtype,
                name=f"h{gate}",
            )(self.features)
            kernels.append(kernel)
            recurrents.append(recurrent)
            biases.append(bias)
        return LSTMParams(
            jnp.concatenate(kernels, axis=-1),
            jnp.concatenate(recurrents, axis=-1),
            jnp.concatenate(biases),
        )

    def __call__(self, carry: Any, inputs: Any) -> tuple[Any, Array]:
        """Advances by one step.

        Args:
          carry: `(c, h)`, each `[*B, H]`.
          inputs: `[*B, I]`.

        Returns:
          `(new_carry, h)`; the new carry in the container and dtypes of the old one.
        """
        return layers.step(
            self.fused(jnp.shape(inputs)[-1]),
            carry,
            inputs,
            dtype=self.dtype,
            activations=self.activations,
        )

    @property
    def activations(self) -> layers.Activations:
        """The two activation functions together."""
        return layers.Activations(self.gate_fn, self.activation_fn)

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> LSTMState:
        """Returns the carry before the first step, `[*B, H]` for inputs `[*B, I]`."""
        first, second = jax.random.split(rng)
        return layers.initial_carry(
            (first, second),
            tuple(input_shape[:-1]),
            self.features,
            carry_init=None if self.carry_init is zeros else self.carry_init,
            dtype=self.dtype or self.param_dtype,
        )

    @property
    def num_feature_axes(self) -> int:
        """Number of axes of one input: 1."""
        return 1


class LSTM(nn.Module):
    """One layer over time, called as `nn.RNN` is, with its parameters below `cell`.

    Takes the place of `nn.RNN(nn.OptimizedLSTMCell(H))`, and goes into
    `nn.Bidirectional`. The parameters are the same, but where Flax has those of a cell
    made inside `@nn.compact` beside the layer (`OptimizedLSTMCell_0`).

    Attributes:
      features: H, the number of units.
      time_major: Inputs and outputs are `[T, *B, ...]`.
      return_carry: Return `(carry, outputs)` in place of the outputs.
      reverse: Process each row from its last valid step to its first.
      keep_order: With reverse, return the outputs in the order of the inputs.
      unroll: Steps unrolled into one iteration of the loop.
      implementation: As in `flax_lstm.lstm`; None chooses.
      gate_fn: This and what follows as in `LSTMCell`.
      activation_fn: See `LSTMCell`.
      kernel_init: See `LSTMCell`.
      recurrent_kernel_init: See `LSTMCell`.
      bias_init: See `LSTMCell`.
      dtype: See `LSTMCell`.
      param_dtype: See `LSTMCell`.
      carry_init: See `LSTMCell`.
      forget_bias: See `LSTMCell`.
    """

    features: int
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1
    implementation: Implementation | None = None
    gate_fn: Activation = jax.nn.sigmoid
    activation_fn: Activation = jnp.tanh
    kernel_init: Initializer = glorot
    recurrent_kernel_init: Initializer = orthogonal
    bias_init: Initializer = zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32
    carry_init: Initializer = zeros
    forget_bias: float = 1.0

    def setup(self) -> None:
        """Makes the cell."""
        self.cell = LSTMCell(
            self.features,
            gate_fn=self.gate_fn,
            activation_fn=self.activation_fn,
            kernel_init=self.kernel_init,
            recurrent_kernel_init=self.recurrent_kernel_init,
            bias_init=self.bias_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            carry_init=self.carry_init,
            forget_bias=self.forget_bias,
        )

    def __call__(
        self,
        inputs: Any,
        *,
        initial_carry: Any = None,
        init_key: Array | None = None,
        seq_lengths: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        resets: Any = None,
    ) -> Any:
        """Runs the layer; arguments left None are those of the constructor.

        Args:
          inputs: `[*B, T, I]`, or `[T, *B, I]` where time_major.
          initial_carry: `(c, h)`, each `[*B, H]`.
          init_key: Key of the initial carry, for a carry_init that is random.
          seq_lengths: Valid steps of each row, int `[*B]`.
          return_carry: Return `(carry, outputs)`; the carry after each row's last
            valid step.
          time_major: See the class.
          reverse: See the class.
          keep_order: See the class.
          resets: bool `[*B, T]`, or `[T, *B]` where time_major: the state is set to
            zero before these steps.

        Returns:
          Outputs `[*B, T, H]`, or `[T, *B, H]` where time_major.
        """
        if time_major is None:
            time_major = self.time_major
        shape = jnp.shape(inputs)
        if initial_carry is None:
            batch_shape = shape[1:-1] if time_major else shape[:-2]
            key = jax.random.key(0) if init_key is None else init_key
            initial_carry = self.cell.initialize_carry(key, (*batch_shape, 0))
        carry, outputs = layers.run_layer(
            self.cell.fused(shape[-1]),
            inputs,
            initial_carry,
            seq_lengths=seq_lengths,
            resets=resets,
            time_major=time_major,
            reverse=self.reverse if reverse is None else reverse,
            keep_order=self.keep_order if keep_order is None else keep_order,
            dtype=self.dtype,
            implementation=self.implementation,
            unroll=self.unroll,
            activations=self.cell.activations,
        )
        if return_carry is None:
            return_carry = self.return_carry
        return (carry, outputs) if return_carry else outputs


def to_fused(params: Mapping[str, Any]) -> LSTMParams:
    """Turns the twelve leaves of a cell into `LSTMParams`."""
    return LSTMParams(
        jnp.concatenate([params[f"i{gate}"]["kernel"] for gate in "ifgo"], axis=-1),
        jnp.concatenate([params[f"h{gate}"]["kernel"] for gate in "ifgo"], axis=-1),
        jnp.concatenate([params[f"h{gate}"]["bias"] for gate in "ifgo"]),
    )


def from_fused(params: LSTMParams) -> dict[str, Any]:
    """Turns `LSTMParams` into the twelve leaves of a cell."""
    kernels, recurrents, biases = (jnp.split(p, 4, axis=-1) for p in params)
    leaves: dict[str, Any] = {}
    for gate, kernel, recurrent, bias in zip(
        "ifgo", kernels, recurrents, biases, strict=True
    ):
        leaves[f"i{gate}"] = {"kernel": kernel}
        leaves[f"h{gate}"] = {"kernel": recurrent, "bias": bias}
    return leaves


def to_nnx(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turns parameters of these modules into those of the modules of `flax_lstm.nnx`.

    Walks nested dicts; every cell in them is turned, all else stays.
    """
    if "ii" in params:
        kernel, recurrent, bias = to_fused(params)
        dense_h = {"kernel": recurrent, "bias": bias}
        return {"dense_i": {"kernel": kernel}, "dense_h": dense_h}
    return _each(to_nnx, params)


def from_nnx(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turns parameters of the modules of `flax_lstm.nnx` into those of these modules.

    Walks nested dicts; every cell in them is turned, all else stays.
    """
    if "dense_i" in params:
        dense_h = params["dense_h"]
        return from_fused(
            LSTMParams(params["dense_i"]["kernel"], dense_h["kernel"], dense_h["bias"])
        )
    return _each(from_nnx, params)


def _each(turn: Callable[..., Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Applies `turn` to the nested dicts directly in `params`."""
    return {
        name: turn(value) if isinstance(value, Mapping) else value
        for name, value in params.items()
    }
