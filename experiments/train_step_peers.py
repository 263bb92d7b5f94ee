"""The tutorial's model and training step as users of PyTorch and of Flax write them."""

# pyright: reportMissingImports=false

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import linen as nn

from flax_lstm import convert, data
from flax_lstm.config import Config

VOCABULARY = 32_000


class Candidate(NamedTuple):
    """Somebody's training step.

    Attributes:
      name: For the table.
      step: `step(batch) -> loss`, waited for.
      compile_s: What had to be compiled before the first step, in seconds.
    """

    name: str
    step: Callable[[data.Batch], float]
    compile_s: float


class PlainTorch(torch.nn.Module):
    """The model in PyTorch."""

    def __init__(self, params: Any, config: Config):
        super().__init__()
        model = config.model
        self.embedding = torch.nn.Embedding(VOCABULARY, model.embedding_size)
        self.first = torch.nn.LSTM(
            model.embedding_size, model.features[0], batch_first=True
        )
        self.second = torch.nn.LSTM(
            model.features[0], model.features[1], batch_first=True
        )
        self.dropout = torch.nn.Dropout(model.dropout)
        self.readout = torch.nn.Linear(model.features[1], 1)
        given = {
            "embedding.weight": params["embedding"]["embedding"],
            "readout.weight": np.asarray(params["readout"]["kernel"]).T,
            "readout.bias": params["readout"]["bias"],
        }
        for name, layer in zip(("first.", "second."), layers(params), strict=True):
            given |= convert.to_torch([(layer,)], prefix=name)
        self.load_state_dict(
            {name: torch.tensor(np.array(value)) for name, value in given.items()}
        )

    def forward(self, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        outputs, _ = self.first(self.embedding(tokens))
        outputs, _ = self.second(self.dropout(outputs))
        outputs = self.dropout(outputs)
        outputs = outputs[torch.arange(len(last)), last]
        return torch.sigmoid(self.readout(outputs)).squeeze(-1)


def in_torch(params: Any, config: Config) -> Candidate:
    model = PlainTorch(params, config)
    model.train(config.model.dropout > 0)
    training = config.training
    optimizer = torch.optim.Adadelta(
        model.parameters(), training.learning_rate, training.rho, training.epsilon
    )

    def step(batch: data.Batch) -> float:
        tokens = torch.from_numpy(batch.tokens).long()
        scores = model(tokens, torch.from_numpy(last_word(batch)))
        loss = torch.nn.functional.mse_loss(scores, torch.from_numpy(batch.labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Candidate("torch", step, 0.0)


class PlainFlax(nn.Module):
    """The model in Flax."""

    config: Any

    @nn.compact
    def __call__(self, tokens: Any, last: Any, *, deterministic: bool) -> Any:
        x = nn.Embed(VOCABULARY, self.config.embedding_size)(tokens)
        for size in self.config.features:
            x = nn.RNN(nn.OptimizedLSTMCell(size))(x)
            x = nn.Dropout(self.config.dropout)(x, deterministic=deterministic)
        x = x[jnp.arange(len(last)), last]
        return nn.sigmoid(nn.Dense(1)(x))[:, 0]


def in_flax(params: Any, config: Config, batch: data.Batch) -> Candidate:
    model = PlainFlax(config.model)
    first, second = (convert.to_linen(layer) for layer in layers(params))
    weights = {
        "Embed_0": params["embedding"],
        "OptimizedLSTMCell_0": first,
        "OptimizedLSTMCell_1": second,
        "Dense_0": params["readout"],
    }
    training = config.training
    optimizer = optax.adadelta(training.learning_rate, training.rho, training.epsilon)

    def train_step(params, state, key, tokens, last, labels):
        key, mask_key = jax.random.split(key)

        def loss_of(params):
            scores = model.apply(
                {"params": params},
                tokens,
                last,
                deterministic=config.model.dropout == 0,
                rngs={"dropout": mask_key},
            )
            return jnp.mean(jnp.square(scores - labels))

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, key, loss

    weights = jax.tree.map(jnp.array, weights)  # copies: the step takes them
    carried: Any = (weights, optimizer.init(weights), jax.random.key(0))

    def inputs(batch: data.Batch) -> tuple[Any, ...]:
        return jnp.asarray(batch.tokens), jnp.asarray(last_word(batch)), batch.labels

    start = time.perf_counter()
    compiled = (
        jax.jit(train_step, donate_argnums=(0, 1, 2))
        .lower(*carried, *inputs(batch))
        .compile()
    )
    spent = time.perf_counter() - start

    def step(batch: data.Batch) -> float:
        nonlocal carried
        *carried, loss = compiled(*carried, *inputs(batch))
        jax.block_until_ready(carried)
        return float(loss)

    return Candidate("Flax and optax", step, spent)


def layers(params: Any) -> list[Any]:
    """Returns the two LSTM layers of a Linen classifier's parameters."""
    stack = params["stack"]
    return [convert.from_linen(stack[name]["cell"]) for name in sorted(stack)]


def last_word(batch: data.Batch) -> np.ndarray:
    """Returns where the last word of each row is."""
    if batch.lengths is None:
        return np.full(len(batch.labels), batch.tokens.shape[1] - 1)
    return np.maximum(batch.lengths.astype(np.int64) - 1, 0)
