"""NNX modules over `flax_lstm.lstm`: LSTMCell, LSTM, StackedLSTM, SentimentClassifier.

Axes       T time, *B any number of batch axes, I input size, H hidden size. Sequences
           are `[*B, T, I]`, or `[T, *B, I]` with `time_major=True`.
Parameters Those of `nnx.OptimizedLSTMCell`: `dense_i.kernel [I, 4H]`, `dense_h.kernel
           [H, 4H]` and `dense_h.bias [4H]`, gate order i f g o.
Randomness Comes in as an argument; no module keeps a random state, so that
           `nnx.split(module)` gives parameters and nothing else.

Different from Flax on purpose: a row of length 0 returns its initial carry, outputs in
the padding are zero, the forget bias starts at 1, and with dtype bfloat16 the outputs
are bfloat16 while c is carried in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
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
from flax_lstm.config import ModelConfig
from flax_lstm.layers import Activation, InitializerName, MergeName, initial_state
from flax_lstm.pooling import Pooling, check_pooling, pool, pooled_size
from flax_lstm.sequence import Implementation

__all__ = [
    "LSTM",
    "BidirectionalLSTM",
    "LSTMCell",
    "SentimentClassifier",
    "StackedLSTM",
    "classifier_functions",
    "from_fused",
    "initial_state",
    "to_fused",
]

Rngs = nnx.Rngs | nnx.RngStream
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
        bias_init: Initializer = jax.nn.initializers.zeros,
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
            kernel_init=layers.ByGate(kernel_init),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
        )
        self.dense_h = nnx.Linear(
            hidden_features,
            4 * hidden_features,
            kernel_init=layers.ByGate(recurrent_kernel_init),
            bias_init=layers.FusedBias(bias_init, forget_bias),
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
        if carry_init is not None:
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
        self.implementation = implementation
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
        merge: MergeName | Callable[[Array, Array], Array] = "concat",
        time_major: bool = False,
        return_carry: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.merge = merge
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
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.features = tuple(features)
        self.dropout = dropout
        self.variational = variational
        self.residual = residual
        self.deterministic = deterministic
        self.time_major = time_major
        self.return_carry = return_carry
        layer = BidirectionalLSTM if bidirectional else LSTM
        for number, hidden in enumerate(self.features):
            kernel, recurrent = layers.weight_initializers(
                initializer, in_features, hidden
            )
            inits = {"kernel_init": kernel, "recurrent_kernel_init": recurrent}
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
          rngs: Its stream `dropout` draws the masks where deterministic is False.
          resets: See `LSTM`.
          deterministic: False for dropout; None for the attribute's value.
          key: Key of the masks, or keys `[*B]`, one for each row; implies dropout.

        Returns:
          Outputs of the last layer, in the order of the inputs.

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
            rate=self.dropout,
            key=key,
            variational=self.variational,
            residual=self.residual,
            time_major=time_major,
            seq_lengths=seq_lengths,
            resets=resets,
            rngs=rngs,
        )
        if return_carry is None:
            return_carry = self.return_carry
        return (carries, outputs) if return_carry else outputs


class SentimentClassifier(nnx.Module):
    """Embedding, stacked LSTM, pooling over time, and a sigmoid readout.

    Args:
      vocabulary_size: V, the number of token ids.
      embedding_size: Size of a word vector.
      features: Units of each LSTM layer.
      pooling: "last", "mean", "max" or "concat"; see `flax_lstm.pooling`.
      dropout: Share of every layer's outputs set to zero in training.
      embedding_scale: Word vectors start uniform in [-scale, scale].
      dtype: Computation dtype; parameters are float32 at least.
      rngs: Source of the parameters' keys.
      **options: Further arguments of `StackedLSTM`.
    """

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int = 128,
        features: Sequence[int] = (128, 64),
        *,
        pooling: Pooling = "concat",
        dropout: float = 0.5,
        embedding_scale: float = 0.05,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        check_pooling(pooling)
        param_dtype = state_dtype(dtype)
        self.pooling = pooling
        self.dtype = jnp.dtype(dtype)
        self.embedding = nnx.Embed(
            vocabulary_size,
            embedding_size,
            embedding_init=layers.Uniform(embedding_scale),
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.stack = StackedLSTM(
            embedding_size,
            features,
            dropout=dropout,
            dtype=self.dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            **options,
        )
        size = 2 * features[-1] if options.get("bidirectional") else features[-1]
        self.readout = nnx.Linear(
            pooled_size(pooling, size),
            1,
            kernel_init=glorot,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        tokens: Any,
        lengths: Any = None,
        state: Any = None,
        *,
        key: Array | None = None,
        rngs: Rngs | None = None,
        deterministic: bool | None = None,
        per_step: bool = False,
        logits: bool = False,
    ) -> tuple[Array, Any]:
        """Scores texts: 1 is positive, 0 negative.

        Args:
          tokens: Ids, int `[B, T]`.
          lengths: Valid tokens of each text, int `[B]`; T when None.
          state: One LSTM state for each layer; zero when None.
          key: Key of the dropout masks, or keys `[B]`, one for each row.
          rngs: See `StackedLSTM`.
          deterministic: See `StackedLSTM`.
          per_step: Score every prefix: `[B, T]`, the score after each token. In the
            padding this stays at the score of the whole text.
          logits: Return the scores before the sigmoid.

        Returns:
          `(scores, state)`, scores `[B]` in float32 at least.
        """
        vectors = layers.embed(
            self.embedding.embedding[...], jnp.asarray(tokens).T, self.dtype
        )
        state, outputs = self.stack(
            vectors,
            initial_carry=state,
            seq_lengths=lengths,
            key=key,
            rngs=rngs,
            deterministic=deterministic,
            time_major=True,
            return_carry=True,
        )
        pooled = pool(outputs, lengths, pooling=self.pooling, per_step=per_step)
        scores = self.readout(pooled)[..., 0]
        scores = scores.T if per_step else scores
        return scores if logits else jax.nn.sigmoid(scores), state


def classifier_functions(
    config: ModelConfig, vocabulary_size: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the classifier as two pure functions.

    Args:
      config: Sizes and options; `library` is not looked at.
      vocabulary_size: V, the number of token ids.

    Returns:
      `init(key) -> params`, nested dicts of arrays with the word vectors `[V, E]` at
      `params["embedding"]["embedding"]`, and
      `apply(params, tokens, lengths, state=None, key=None, *, per_step=False) ->
      (logits, state)`: see `SentimentClassifier`. There is dropout where key is given.
      The number of word vectors is free at `apply`.
    """

    def build(key: Array) -> SentimentClassifier:
        return SentimentClassifier(
            vocabulary_size,
            config.embedding_size,
            config.features,
            pooling=config.pooling,
            dropout=config.dropout,
            embedding_scale=config.embedding_scale,
            initializer=config.initializer,
            forget_bias=config.forget_bias,
            dtype=config.dtype,
            implementation=config.implementation,
            rngs=nnx.Rngs(params=key),
        )

    graph = nnx.graphdef(nnx.eval_shape(build, jax.random.key(0)))

    def init(key: Array) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(build(key)))

    def apply(
        params: Mapping[str, Any],
        tokens: Array,
        lengths: Array | None,
        state: Any = None,
        key: Array | None = None,
        *,
        per_step: bool = False,
    ) -> tuple[Array, Any]:
        model = nnx.merge(graph, nnx.State(params))
        return model(tokens, lengths, state, key=key, per_step=per_step, logits=True)

    return init, apply


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
