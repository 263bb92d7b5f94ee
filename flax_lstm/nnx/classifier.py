"""The sentiment classifier in NNX, and as two pure functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from flax_lstm import layers
from flax_lstm.cell import glorot, state_dtype
from flax_lstm.config import ModelConfig
from flax_lstm.initializers import Uniform
from flax_lstm.nnx.recurrent import Rngs
from flax_lstm.nnx.stack import StackedLSTM
from flax_lstm.pooling import Pooling, check_pooling, pool, pooled_size


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
        self.pooling: Pooling = pooling
        self.dtype = jnp.dtype(dtype)
        self.embedding = nnx.Embed(
            vocabulary_size,
            embedding_size,
            embedding_init=Uniform(embedding_scale),
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
        tokens: Any,
        lengths: Any,
        state: Any = None,
        key: Array | None = None,
        *,
        per_step: bool = False,
    ) -> tuple[Array, Any]:
        model = nnx.merge(graph, nnx.State(params))
        return model(tokens, lengths, state, key=key, per_step=per_step, logits=True)

    return init, apply
