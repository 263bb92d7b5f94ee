"""Several NNX LSTM layers: both directions, and one after another."""

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array

from flax_lstm import layers
from flax_lstm.directions import Merge
from flax_lstm.initializers import InitializerName, weight_initializers
from flax_lstm.nnx.recurrent import LSTM, Rngs


class BidirectionalLSTM(nnx.Module):
    """Two layers, one from each end, with their outputs merged.

    As `nnx.Bidirectional` over two `LSTM`, and with its parameter names
    (`forward_rnn`, `backward_rnn`), but aware of resets.

    Args:
      in_features: I, the size of one input vector.
      hidden_features: H, the number of units of each direction.
      merge: "concat", "sum", "mean", "mul", or a function of the two outputs.
      time_major: Inputs and outputs are `[T, *B, ...]`.
      return_carry: Return `((forward, backward), outputs)` in place of the outputs.
      rngs: Source of the parameters' keys.
      **options: Further arguments of `LSTM`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        merge: Merge = "concat",
        time_major: bool = False,
        return_carry: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        layers.check_options(options)
        self.merge: Merge = merge
        self.time_major = time_major
        self.return_carry = return_carry
        self.forward_rnn = LSTM(in_features, hidden_features, rngs=rngs, **options)
        self.backward_rnn = LSTM(in_features, hidden_features, rngs=rngs, **options)

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
        """Runs both layers; see `LSTM`. As in Flax, the order is always kept."""
        del reverse, keep_order
        carry, outputs = layers.run_both(
            self.forward_rnn,
            self.backward_rnn,
            inputs,
            initial_carry,
            merge=self.merge,
            seq_lengths=seq_lengths,
            resets=resets,
            time_major=self.time_major if time_major is None else time_major,
            rngs=rngs,
        )
        if return_carry is None:
            return_carry = self.return_carry
        return (carry, outputs) if return_carry else outputs


class StackedLSTM(nnx.Module):
    """Layers one after another, with dropout on the outputs of each.

    `module.train()` switches the dropout on and `module.eval()` off, as for
    `nnx.Dropout`; it is off at first. The layers are `layer_0`, `layer_1`, …

    Args:
      in_features: I, the size of one input vector.
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
      rngs: Source of the parameters' keys.
      **options: Further arguments of `LSTM`.
    """

    def __init__(
        self,
        in_features: int,
        features: Sequence[int] = (128, 64),
        *,
        dropout: float = 0.0,
        variational: bool = False,
        residual: bool = False,
        bidirectional: bool = False,
        initializer: InitializerName = "orthogonal",
        deterministic: bool = True,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.in_features = in_features
        self.features = tuple(features)
        self.dropout = dropout
        self.variational = variational
        self.residual = residual
        self.bidirectional = bidirectional
        self.deterministic = deterministic
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order
        layer = BidirectionalLSTM if bidirectional else LSTM
        for number, hidden in enumerate(self.features):
            kernel, recurrent = weight_initializers(initializer, in_features, hidden)
            inits: dict[str, Any] = {
                "kernel_init": kernel,
                "recurrent_kernel_init": recurrent,
            }
            built = layer(in_features, hidden, rngs=rngs, **(inits | options))
            setattr(self, f"layer_{number}", built)
            in_features = 2 * hidden if bidirectional else hidden

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
        deterministic: bool | None = None,
        key: Array | None = None,
    ) -> Any:
        """Runs the layers.

        Args:
          inputs: `[*B, T, I]`, or `[T, *B, I]` where time_major.
          initial_carry: One carry for each layer.
          seq_lengths: Valid steps of each row, int `[*B]`.
          return_carry: Return `(carries, outputs)`, one carry for each layer.
          time_major: See the class.
          reverse: See the class.
          keep_order: See the class.
          rngs: Its stream `dropout` draws the masks where deterministic is False.
          resets: See `LSTM`.
          deterministic: False for dropout; None for the attribute's value.
          key: Key of the masks, or keys `[*B]`, one for each row; implies dropout.

        Returns:
          Outputs of the last layer.

        Raises:
          ValueError: If dropout is asked for and there is nothing to draw it with.
        """
        if time_major is None:
            time_major = self.time_major
        if deterministic is None:
            deterministic = self.deterministic
        if key is None and not deterministic and self.dropout > 0:
            if rngs is None:
                raise ValueError(
                    "dropout needs randomness: pass key or rngs, or "
                    "deterministic=True for none."
                )
            key = (rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs)()
        carries, outputs = layers.run_stack(
            [getattr(self, f"layer_{n}") for n in range(len(self.features))],
            inputs,
            initial_carry,
            input_size=self.in_features,
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
            rngs=rngs,
        )
        if return_carry is None:
            return_carry = self.return_carry
        return (carries, outputs) if return_carry else outputs
