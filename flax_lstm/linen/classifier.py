"""The sentiment classifier in Linen, and as two pure functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from flax_lstm import layers
from flax_lstm.cell import glorot, state_dtype
from flax_lstm.config import ModelConfig
from flax_lstm.initializers import InitializerName, Uniform
from flax_lstm.linen.stack import StackedLSTM
from flax_lstm.pooling import Pooling, check_pooling, pool


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
            init = Uniform(self.scale)
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
        lengths = None if lengths is None else jnp.asarray(lengths)
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
        return dict(module.init(key, jnp.zeros((1, 1), jnp.int32))["params"])

    def apply(
        params: Mapping[str, Any],
        tokens: Any,
        lengths: Any,
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
