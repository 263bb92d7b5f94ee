"""Linen modules over `flax_lstm.lstm`: LSTMCell, LSTM, StackedLSTM and more.

Axes       T time, *B any number of batch axes, I input size, H hidden size. Sequences
           are `[*B, T, I]`, or `[T, *B, I]` with `time_major=True`.
Parameters The twelve leaves of `nn.OptimizedLSTMCell`: kernels `ii if ig io [I, H]`,
           kernels and biases `hi hf hg ho [H, H]` and `[H]`. They are put together
           once for a sequence, outside the loop.
Loading    `LSTM(H)` has the parameters of `nn.RNN(nn.OptimizedLSTMCell(H))`, below
           `cell`. Flax names that cell differently where it is made inside a
           `@nn.compact` method (`OptimizedLSTMCell_0`); move the leaves there.

Different from Flax on purpose: a row of length 0 returns its initial carry, outputs in
the padding are zero, the forget bias starts at 1, and with dtype bfloat16 the outputs
are bfloat16 while c is carried in float32.
"""

from collections.abc import Callable, Mapping, Sequence
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
from flax_lstm.config import ModelConfig
from flax_lstm.layers import Activation, InitializerName, MergeName, initial_state
from flax_lstm.pooling import Pooling, check_pooling, pool
from flax_lstm.sequence import Implementation

__all__ = [
    "LSTM",
    "BidirectionalLSTM",
    "LSTMCell",
    "SentimentClassifier",
    "StackedLSTM",
    "classifier_functions",
    "from_fused",
    "from_nnx",
    "initial_state",
    "to_fused",
    "to_nnx",
]

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
            *(jnp.concatenate(gates, axis=-1) for gates in (kernels, recurrents)),
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

    Takes the place of `nn.RNN(nn.OptimizedLSTMCell(H))`, whose parameters load
    unchanged, and goes into `nn.Bidirectional`.

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
    merge: MergeName | Callable[[Array, Array], Array] = "concat"
    time_major: bool = False
    return_carry: bool = False
    options: Mapping[str, Any] | None = None

    def setup(self) -> None:
        """Makes the two layers."""
        options = self.options or {}
        self.forward_rnn = LSTM(self.features, **options)
        self.backward_rnn = LSTM(self.features, **options)

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
        carry, outputs = layers.run_both(
            self.forward_rnn,
            self.backward_rnn,
            inputs,
            initial_carry,
            merge=self.merge,
            init_key=init_key,
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
    options: Mapping[str, Any] | None = None

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
          resets: See `LSTM`.
          deterministic: False for dropout drawn from the rng `dropout` of `apply`;
            None for the attribute's value.
          key: Key of the masks, or keys `[*B]`, one for each row; implies dropout.

        Returns:
          Outputs of the last layer, in the order of the inputs.
        """
        if time_major is None:
            time_major = self.time_major
        if deterministic is None:
            deterministic = self.deterministic
        if key is None and not deterministic and self.dropout > 0:
            key = self.make_rng("dropout")
        built = []
        input_size = jnp.shape(inputs)[-1]
        for number, hidden in enumerate(self.features):
            kernel, recurrent = layers.weight_initializers(
                self.initializer, input_size, hidden
            )
            inits = {"kernel_init": kernel, "recurrent_kernel_init": recurrent}
            options = inits | dict(self.options or {})
            name = f"layer_{number}"
            if self.bidirectional:
                built.append(BidirectionalLSTM(hidden, options=options, name=name))
            else:
                built.append(LSTM(hidden, **options, name=name))
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
            seq_lengths=seq_lengths,
            resets=resets,
            init_key=init_key,
        )
        if return_carry is None:
            return_carry = self.return_carry
        return (carries, outputs) if return_carry else outputs


class _Embedding(nn.Module):
    """Word vectors, named as `nn.Embed` names them."""

    vocabulary_size: int
    embedding_size: int
    scale: float
    param_dtype: Any
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Any) -> Array:
        """Returns `[*tokens.shape, E]`; see `flax_lstm.layers.embed`."""
        if self.has_variable("params", "embedding"):
            # Not by self.param, which would hold the table to vocabulary_size rows:
            # training passes the rows that a batch uses, and no others.
            table = self.get_variable("params", "embedding")
        else:
            shape = (self.vocabulary_size, self.embedding_size)
            init = layers.Uniform(self.scale)
            table = self.param("embedding", init, shape, self.param_dtype)
        return layers.embed(table, tokens, self.dtype)


class SentimentClassifier(nn.Module):
    """Embedding, stacked LSTM, pooling over time, and a sigmoid readout.

    Attributes:
      vocabulary_size: V, the number of token ids.
      embedding_size: Size of a word vector.
      features: Units of each LSTM layer.
      pooling: "last", "mean", "max" or "concat"; see `flax_lstm.pooling`.
      dropout: Share of every layer's outputs set to zero in training.
      embedding_scale: Word vectors start uniform in [-scale, scale].
      dtype: Computation dtype; parameters are float32 at least.
      variational: See `StackedLSTM`.
      residual: See `StackedLSTM`.
      bidirectional: See `StackedLSTM`.
      initializer: See `StackedLSTM`.
      deterministic: See `StackedLSTM`.
      options: Further attributes of every `LSTM`.
    """

    vocabulary_size: int
    embedding_size: int = 128
    features: Sequence[int] = (128, 64)
    pooling: Pooling = "concat"
    dropout: float = 0.5
    embedding_scale: float = 0.05
    dtype: Any = jnp.float32
    variational: bool = False
    residual: bool = False
    bidirectional: bool = False
    initializer: InitializerName = "orthogonal"
    deterministic: bool = True
    options: Mapping[str, Any] | None = None

    def setup(self) -> None:
        """Makes the three parts."""
        check_pooling(self.pooling)
        dtype = jnp.dtype(self.dtype)
        param_dtype = state_dtype(dtype)
        self.embedding = _Embedding(
            self.vocabulary_size,
            self.embedding_size,
            self.embedding_scale,
            param_dtype,
            dtype,
        )
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.stack = StackedLSTM(
            self.features,
            dropout=self.dropout,
            variational=self.variational,
            residual=self.residual,
            bidirectional=self.bidirectional,
            initializer=self.initializer,
            deterministic=self.deterministic,
            options=dtypes | dict(self.options or {}),
        )
        self.readout = nn.Dense(1, kernel_init=glorot, param_dtype=param_dtype)

    def __call__(
        self,
        tokens: Any,
        lengths: Any = None,
        state: Any = None,
        *,
        key: Array | None = None,
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
          deterministic: See `StackedLSTM`.
          per_step: Score every prefix: `[B, T]`, the score after each token. In the
            padding this stays at the score of the whole text.
          logits: Return the scores before the sigmoid.

        Returns:
          `(scores, state)`, scores `[B]` in float32 at least.
        """
        state, outputs = self.stack(
            self.embedding(jnp.asarray(tokens).T),
            initial_carry=state,
            seq_lengths=lengths,
            key=key,
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
    module = SentimentClassifier(
        vocabulary_size,
        config.embedding_size,
        config.features,
        pooling=config.pooling,
        dropout=config.dropout,
        embedding_scale=config.embedding_scale,
        initializer=config.initializer,
        dtype=config.dtype,
        options={
            "forget_bias": config.forget_bias,
            "implementation": config.implementation,
        },
    )

    def init(key: Array) -> dict[str, Any]:
        return module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def apply(
        params: Mapping[str, Any],
        tokens: Array,
        lengths: Array | None,
        state: Any = None,
        key: Array | None = None,
        *,
        per_step: bool = False,
    ) -> tuple[Array, Any]:
        return module.apply(
            {"params": params},
            tokens,
            lengths,
            state,
            key=key,
            per_step=per_step,
            logits=True,
        )

    return init, apply


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
