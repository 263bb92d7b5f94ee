"""One NNX LSTM layer: the cell, the cell over time, and its parameters."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from flax_lstm import layers
from flax_lstm.cell import Initializer, LSTMParams, LSTMState, glorot, orthogonal
from flax_lstm.choice import Implementation
from flax_lstm.initializers import ByGate, FusedBias
from flax_lstm.layers import Activation

Rngs = nnx.Rngs | nnx.RngStream
zeros = jax.nn.initializers.zeros
NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class LSTMCell(nnx.RNNCellBase):
    """One step of an LSTM; goes into `nnx.RNN` in place of `nnx.OptimizedLSTMCell`.

    Args:
      in_features: I, the size of one input vector.
      hidden_features: H, the number of units.
      gate_fn: Activation of the gates i, f and o.
      activation_fn: Activation of the candidate g and of the output.
      kernel_init: Initialiser of the four `[I, H]` input matrices, drawn one by one.
      recurrent_kernel_init: Initialiser of the four `[H, H]` matrices; drawn in
        float32 at least, then cast.
      bias_init: Initialiser of the bias `[4H]`.
      dtype: Computation dtype; the promotion of inputs and weights when None.
      param_dtype: Dtype of the parameters.
      carry_init: Initialiser of the carry; zeros when None.
      forget_bias: Added to the forget part of the bias when it is drawn.
      rngs: Source of the parameters' keys.
      kernel_metadata: Metadata of the input matrix, a sharding for instance.
      recurrent_kernel_metadata: The same of the recurrent matrix.
      bias_metadata: The same of the bias.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Activation = jax.nn.sigmoid,
        activation_fn: Activation = jnp.tanh,
        kernel_init: Initializer = glorot,
        recurrent_kernel_init: Initializer = orthogonal,
        bias_init: Initializer = zeros,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        carry_init: Initializer | None = None,
        forget_bias: float = 1.0,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        recurrent_kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.activations = layers.Activations(gate_fn, activation_fn)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.carry_init = carry_init
        self.dense_i = nnx.Linear(
            in_features,
            4 * hidden_features,
            use_bias=False,
            kernel_init=ByGate(kernel_init),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
        )
        self.dense_h = nnx.Linear(
            hidden_features,
            4 * hidden_features,
            kernel_init=ByGate(recurrent_kernel_init),
            bias_init=FusedBias(bias_init, forget_bias),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            kernel_metadata=recurrent_kernel_metadata,
            bias_metadata=bias_metadata,
        )

    def fused(self) -> LSTMParams:
        """Returns the weights as the functions of this package take them."""
        if self.dense_h.bias is None:
            raise ValueError("dense_h must have a bias; it was replaced by None.")
        return LSTMParams(
            self.dense_i.kernel[...], self.dense_h.kernel[...], self.dense_h.bias[...]
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
            self.fused(), carry, inputs, dtype=self.dtype, activations=self.activations
        )

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: Rngs | None = None,
        carry_init: Initializer | None = None,
    ) -> LSTMState:
        """Returns the carry before the first step, `[*B, H]` for inputs `[*B, I]`.

        Raises:
          ValueError: If there is a carry_init and no rngs to draw with.
        """
        carry_init = carry_init or self.carry_init
        keys = None
        if carry_init not in (None, zeros):
            if rngs is None:
                raise ValueError(
                    "rngs must be given to draw a carry with carry_init; got None."
                )
            stream = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
            keys = (stream(), stream())
        return layers.initial_carry(
            keys,
            tuple(input_shape[:-1]),
            self.hidden_features,
            carry_init=carry_init,
            dtype=self.dtype or self.param_dtype,
        )

    @property
    def num_feature_axes(self) -> int:
        """Number of axes of one input: 1."""
        return 1


class LSTM(nnx.Module):
    """One layer over time, called as `nnx.RNN` is, with its parameters below `cell`.

    Takes the place of `nnx.RNN(nnx.OptimizedLSTMCell(I, H, rngs=rngs))`, whose
    parameters load unchanged, and goes into `nnx.Bidirectional`.

    Args:
      in_features: I, the size of one input vector.
      hidden_features: H, the number of units.
      time_major: Inputs and outputs are `[T, *B, ...]`.
      return_carry: Return `(carry, outputs)` in place of the outputs.
      reverse: Process each row from its last valid step to its first.
      keep_order: With reverse, return the outputs in the order of the inputs.
      unroll: Steps unrolled into one iteration of the loop.
      implementation: As in `flax_lstm.lstm`; None chooses.
      rngs: Source of the parameters' keys.
      **cell_options: Further arguments of `LSTMCell`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
        **cell_options: Any,
    ):
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order
        self.unroll = unroll
        self.implementation: Implementation | None = implementation
        self.cell = LSTMCell(in_features, hidden_features, rngs=rngs, **cell_options)

    def __call__(
        self,
        inputs: Any,
        *,
        initial_carry: Any = None,
        seq_lengths: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: Rngs | None = None,
        resets: Any = None,
    ) -> Any:
        """Runs the layer; arguments left None are those of the constructor.

        Args:
          inputs: `[*B, T, I]`, or `[T, *B, I]` where time_major.
          initial_carry: `(c, h)`, each `[*B, H]`.
          seq_lengths: Valid steps of each row, int `[*B]`.
          return_carry: Return `(carry, outputs)`; the carry after each row's last
            valid step.
          time_major: See the class.
          reverse: See the class.
          keep_order: See the class.
          rngs: Draws the initial carry where there is a carry_init.
          resets: bool `[*B, T]`, or `[T, *B]` where time_major: the state is set to
            zero before these steps.

        Returns:
          Outputs `[*B, T, H]`, or `[T, *B, H]` where time_major.
        """
        if time_major is None:
            time_major = self.time_major
        if initial_carry is None:
            shape = jnp.shape(inputs)
            batch_shape = shape[1:-1] if time_major else shape[:-2]
            initial_carry = self.cell.initialize_carry((*batch_shape, 0), rngs)
        carry, outputs = layers.run_layer(
            self.cell.fused(),
            inputs,
            initial_carry,
            seq_lengths=seq_lengths,
            resets=resets,
            time_major=time_major,
            reverse=self.reverse if reverse is None else reverse,
            keep_order=self.keep_order if keep_order is None else keep_order,
            dtype=self.cell.dtype,
            implementation=self.implementation,
            unroll=self.unroll,
            activations=self.cell.activations,
        )
        if return_carry is None:
            return_carry = self.return_carry
        return (carry, outputs) if return_carry else outputs


def to_fused(params: Mapping[str, Any]) -> LSTMParams:
    """Turns the parameters of a cell, nested dicts, into `LSTMParams`."""
    dense_h = params["dense_h"]
    return LSTMParams(params["dense_i"]["kernel"], dense_h["kernel"], dense_h["bias"])


def from_fused(params: LSTMParams) -> dict[str, Any]:
    """Turns `LSTMParams` into the parameters of a cell."""
    return {
        "dense_i": {"kernel": params.kernel},
        "dense_h": {"kernel": params.recurrent_kernel, "bias": params.bias},
    }
