"""Several Linen LSTM layers: both directions, and one after another."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jaxtyping import Array

from flax_lstm import layers
from flax_lstm.directions import Merge
from flax_lstm.initializers import InitializerName, weight_initializers
from flax_lstm.linen.recurrent import LSTM


def split(key: Array | None, number: int) -> Any:
    """Returns a key for each of several layers; None for each where there is none."""
    return [None] * number if key is None else jax.random.split(key, number)


class BidirectionalLSTM(nn.Module):
    """Two layers, one from each end, with their outputs merged.

    As `nn.Bidirectional` over two `LSTM`, and with its parameter names
    (`forward_rnn`, `backward_rnn`), but aware of resets.

    Attributes:
      features: H, the number of units of each direction.
      merge: "concat", "sum", "mean", "mul", or a function of the two outputs.
      time_major: Inputs and outputs are `[T, *B, ...]`.
      return_carry: Return `((forward, backward), outputs)` in place of the outputs.
      options: Further attributes of both `LSTM`.
    """

    features: int
    merge: Merge = "concat"
    time_major: bool = False
    return_carry: bool = False
    options: Mapping[str, Any] = FrozenDict()

    def __post_init__(self) -> None:
        """Freezes the options, so that the module can be hashed."""
        self.options = FrozenDict(self.options)
        layers.check_options(self.options)
        super().__post_init__()

    def setup(self) -> None:
        """Makes the two layers."""
        self.forward_rnn = LSTM(self.features, **self.options)
        self.backward_rnn = LSTM(self.features, **self.options)

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
        """Runs both layers; see `LSTM`. As in Flax, the order is always kept."""
        del reverse, keep_order
        keys = split(init_key, 2)
        carry, outputs = layers.run_both(
            partial(self.forward_rnn, init_key=keys[0]),
            partial(self.backward_rnn, init_key=keys[1]),
            inputs,
            initial_carry,
            merge=self.merge,
            seq_lengths=seq_lengths,
            resets=resets,
            time_major=self.time_major if time_major is None else time_major,
        )
        if return_carry is None:
            return_carry = self.return_carry
        return (carry, outputs) if return_carry else outputs


class StackedLSTM(nn.Module):
    """Layers one after another, with dropout on the outputs of each.

    The layers are `layer_0`, `layer_1`, …

    Attributes:
      features: Units of each layer.
      dropout: Share of every layer's outputs set to zero, anew at every step.
      variational: Draw one mask per sequence in place of one per step.
      residual: Add a layer's inputs to its outputs where their sizes are equal.
      bidirectional: Run every layer in both directions, outputs concatenated.
      initializer: As `flax_lstm.config.ModelConfig.initializer`.
      deterministic: No dropout unless a key is given.
      time_major: Inputs and outputs are `[T, *B, ...]`.
      return_carry: Return `(carries, outputs)` in place of the outputs.
      reverse: Run every layer from each row's last valid step to its first; changes
        nothing where all run in both directions, whose order is always kept.
      keep_order: With reverse, return the outputs in the order of the inputs.
      options: Further attributes of every `LSTM`.
    """

    features: Sequence[int] = (128, 64)
    dropout: float = 0.0
    variational: bool = False
    residual: bool = False
    bidirectional: bool = False
    initializer: InitializerName = "orthogonal"
    deterministic: bool = True
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    options: Mapping[str, Any] = FrozenDict()

    def __post_init__(self) -> None:
        """Freezes the options, so that the module can be hashed."""
        self.options = FrozenDict(self.options)
        layers.check_options(self.options)
        super().__post_init__()

    @nn.compact
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
        deterministic: bool | None = None,
        key: Array | None = None,
    ) -> Any:
        """Runs the layers.

        Args:
          inputs: `[*B, T, I]`, or `[T, *B, I]` where time_major.
          initial_carry: One carry for each layer.
          init_key: See `LSTM`.
          seq_lengths: Valid steps of each row, int `[*B]`.
          return_carry: Return `(carries, outputs)`, one carry for each layer.
          time_major: See the class.
          reverse: See the class.
          keep_order: See the class.
          resets: See `LSTM`.
          deterministic: False for dropout drawn from the rng `dropout` of `apply`;
            None for the attribute's value.
          key: Key of the masks, or keys `[*B]`, one for each row; implies dropout.

        Returns:
          Outputs of the last layer.
        """
        if time_major is None:
            time_major = self.time_major
        if deterministic is None:
            deterministic = self.deterministic
        if key is None and not deterministic and self.dropout > 0:
            key = self.make_rng("dropout")
        built = []
        input_size = jnp.shape(inputs)[-1]
        keys = split(init_key, len(self.features))
        for number, hidden in enumerate(self.features):
            kernel, recurrent = weight_initializers(
                self.initializer, input_size, hidden
            )
            inits: dict[str, Any] = {
                "kernel_init": kernel,
                "recurrent_kernel_init": recurrent,
            }
            options = inits | dict(self.options)
            name = f"layer_{number}"
            if self.bidirectional:
                layer = BidirectionalLSTM(hidden, options=options, name=name)
            else:
                layer = LSTM(hidden, **options, name=name)
            built.append(partial(layer, init_key=keys[number]))
            input_size = 2 * hidden if self.bidirectional else hidden
        carries, outputs = layers.run_stack(
            built,
            inputs,
            initial_carry,
            rate=self.dropout,
            key=key,
            variational=self.variational,
            residual=self.residual,
            time_major=time_major,
            reverse=self.reverse if reverse is None else reverse,
            keep_order=self.bidirectional
            or (self.keep_order if keep_order is None else keep_order),
            seq_lengths=seq_lengths,
            resets=resets,
        )
        if return_carry is None:
            return_carry = self.return_carry
        return (carries, outputs) if return_carry else outputs
