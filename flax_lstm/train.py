"""The training step and evaluation, as pure functions of arrays.

Axes     B rows of a batch (of this device's part of it, under an axis name), T tokens.
Means    All means are weighted sums over the whole batch divided by the sum of the
         weights: filler rows (weight 0) and the split over devices change nothing.
Dropout  Row r of step s draws from `fold_in(fold_in(key, s), r)`, r counted over the
         whole batch: the same masks on any number of devices.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int, PRNGKeyArray

from flax_lstm.config import TrainConfig
from flax_lstm.optim import (
    Optimizer,
    embedding_of,
    make_optimizer,
    update,
    used_rows,
    with_embedding,
)
from flax_lstm.parallel import Program, compile_steps, pad_batch
from flax_lstm.rows import (
    Batch,
    correct,
    count_tokens,
    in_parts,
    live_tokens,
    row_keys,
    row_losses,
    weighted_sum,
)

__all__ = [
    "Optimizer",
    "Program",
    "TrainState",
    "evaluate",
    "init_train_state",
    "make_eval_step",
    "make_optimizer",
    "make_train_step",
    "pad_batch",
    "parallelize",
    "reset_carry",
]

Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int32, number of steps taken.
      params: Parameters.
      optimizer_state: State of the optimiser.
      key: PRNG key of the run's dropout; the same at every step.
      carry: LSTM state of each layer after the last batch; None unless carried.
    """

    step: Int[Array, "..."]
    params: Any
    optimizer_state: Any
    key: PRNGKeyArray
    carry: Any = None


TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
EvalStep = Callable[[Any, Any, Any], tuple[Metrics, Any]]


def init_train_state(
    init: Callable[[PRNGKeyArray], Any],
    optimizer: Optimizer,
    key: PRNGKeyArray,
    *,
    carry: Any = None,
) -> TrainState:
    """Returns the state before the first step.

    Args:
      init: `init(key) -> params`.
      optimizer: From `make_optimizer`.
      key: PRNG key; consumed.
      carry: Zero LSTM state for a whole batch, where it is carried from each batch to
        the next; None where it is not.
    """
    params_key, dropout_key = jax.random.split(key)
    params = init(params_key)
    return TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params), dropout_key, carry
    )


def reset_carry(state: TrainState) -> TrainState:
    """Returns `state` with a zero LSTM state, as at the start of an epoch."""
    carry = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), state.carry
    )
    return state._replace(carry=carry)


def make_train_step(
    apply: Callable[..., tuple[Array, Any]],
    optimizer: Optimizer,
    config: TrainConfig,
    *,
    axis_name: str | None = None,
) -> TrainStep:
    """Builds `train_step(state, batch) -> (state, metrics)`, a pure function.

    Metrics are scalars: `loss` and `accuracy` (weighted means over the batch),
    `grad_norm` (before clipping), `count` (sum of the weights), `tokens` (those of rows
    with a weight, without the padding; with it where there are no lengths),
    `learning_rate`, and `finite`. Where the loss or the norm of the gradient is not
    finite, `finite` is False and the state returned is the state given.

    Args:
      apply: `apply(params, tokens, lengths, state=, key=) -> (logits, state)`, where
        `key` is one key for each row.
      optimizer: From `make_optimizer`.
      config: Loss, whether the LSTM state is carried, and in how many parts each device
        computes its rows.
      axis_name: Of the `jax.pmap` or `jax.shard_map` this step is for; each device then
        has an equal part of the batch. None where one program sees the whole batch.
    """

    def over_devices(tree: Any) -> Any:
        return tree if axis_name is None else lax.psum(tree, axis_name)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = jax.tree.map(jnp.asarray, batch)
        rows = batch.labels.shape[0]
        first = 0 if axis_name is None else lax.axis_index(axis_name) * rows
        keys = row_keys(jax.random.fold_in(state.key, state.step), first, rows)
        count = over_devices(batch.weights.sum())
        share = batch.weights / jnp.maximum(count, jnp.finfo(count.dtype).tiny)
        tokens, params, used = batch.tokens, state.params, None
        if optimizer.sparse:
            embedding = embedding_of(params)
            used = used_rows(tokens, live_tokens(batch), len(embedding), axis_name)
            tokens = used.slots
            params = with_embedding(params, embedding.at[used.ids].get(mode="clip"))

        def loss_of(params: Any, rows: tuple) -> tuple[Array, Any]:
            tokens, lengths, labels, weights, share, keys, carry = rows
            logits, carry = apply(params, tokens, lengths, state=carry, key=keys)
            loss = weighted_sum(row_losses(config.loss, logits, labels), share)
            return loss, (weighted_sum(correct(logits, labels), weights), carry)

        def sums_of(rows: tuple) -> tuple[Any, Any]:
            (loss, (hits, carry)), gradients = jax.value_and_grad(
                loss_of, has_aux=True
            )(params, rows)
            return (loss, hits, gradients), carry

        # Sums over rows of shares of the whole batch: parts of it simply add up.
        sums, carry = in_parts(
            sums_of,
            (
                *(tokens, batch.lengths, batch.labels, batch.weights),
                *(share, keys, state.carry),
            ),
            config.gradient_accumulation,
        )
        loss, hits, gradients = over_devices(sums)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        params, optimizer_state = update(
            optimizer,
            state.params,
            state.optimizer_state,
            gradients,
            used,
            norm=norm,
            apply_if=finite,
        )
        metrics = {
            "loss": loss,
            # Of a count: the same however the rows are split.
            "accuracy": hits / jnp.maximum(count, jnp.finfo(count.dtype).tiny),
            "grad_norm": norm,
            "count": count,
            "tokens": over_devices(count_tokens(batch)),
            "learning_rate": jnp.asarray(optimizer.learning_rate(state.step)),
            "finite": finite,
        }
        if state.carry is not None:
            carry = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), carry, state.carry
            )
        else:
            carry = None
        step = jnp.where(finite, optax.safe_increment(state.step), state.step)
        return (
            TrainState(step, params, optimizer_state, state.key, carry),
            metrics,
        )

    return train_step


def make_eval_step(
    apply: Callable[..., tuple[Array, Any]],
    config: TrainConfig,
    *,
    axis_name: str | None = None,
) -> EvalStep:
    """Builds `eval_step(params, batch, carry) -> (sums, carry)` for `evaluate`.

    Sums are weighted: `loss`, `correct`, `count`, and the confusion counts
    `true_negatives`, `false_positives`, `false_negatives`, `true_positives`. The carry
    goes in and out where the LSTM state is carried, and is None elsewhere.
    """

    def eval_step(params: Any, batch: Batch, carry: Any) -> tuple[Metrics, Any]:
        batch = jax.tree.map(jnp.asarray, batch)

        def sums_of(rows: tuple) -> tuple[Metrics, Any]:
            tokens, lengths, labels, weights, carry = rows
            logits, new_carry = apply(params, tokens, lengths, state=carry)
            score = jnp.round(jax.nn.sigmoid(logits))
            sums = {
                "loss": weighted_sum(row_losses(config.loss, logits, labels), weights),
                "correct": weighted_sum(correct(logits, labels), weights),
                "count": weights.sum(),
                "true_negatives": weighted_sum((1 - score) * (1 - labels), weights),
                "false_positives": weighted_sum(score * (1 - labels), weights),
                "false_negatives": weighted_sum((1 - score) * labels, weights),
                "true_positives": weighted_sum(score * labels, weights),
            }
            return sums, None if carry is None else new_carry

        sums, carry = in_parts(
            sums_of,
            (batch.tokens, batch.lengths, batch.labels, batch.weights, carry),
            config.gradient_accumulation,
        )
        return sums if axis_name is None else lax.psum(sums, axis_name), carry

    return eval_step


def evaluate(
    eval_step: EvalStep, params: Any, batches: Iterable[Any], *, carry: Any = None
) -> dict[str, float]:
    """Evaluates on all rows of `batches`, each counted by its weight.

    The sums of a batch are float32, their totals over the batches float64. Nothing is
    fetched from the device before the last batch has been handed to it.

    Args:
      eval_step: From `make_eval_step`, compiled; or that of a `Program`.
      params: Parameters.
      batches: Batches; the last ones may be filled up with rows of weight 0.
      carry: LSTM state before the first batch, where it is carried through them.

    Returns:
      `loss` and `accuracy` (means), `count`, and the confusion counts.

    Raises:
      ValueError: If the weights of all rows are 0, so that there is no mean.
    """
    parts = []
    for batch in batches:
        sums, carry = eval_step(params, batch, carry)
        parts.append(sums)
    parts = jax.device_get(parts)
    totals = {
        name: math.fsum(float(part[name]) for part in parts)
        for name in (parts[0] if parts else {"count": 0})
    }
    if not totals["count"] > 0:
        raise ValueError(
            "evaluate needs at least one row of weight above 0; got "
            f"{len(parts)} batches with none."
        )
    return {
        "loss": totals.pop("loss") / totals["count"],
        "accuracy": totals.pop("correct") / totals["count"],
        **totals,
    }


def parallelize(
    apply: Callable[..., tuple[Array, Any]],
    optimizer: Optimizer,
    config: TrainConfig,
    devices: Iterable[Any] | None = None,
) -> Program:
    """Compiles training and evaluation for one device or many, by `config.parallel`.

    Args:
      apply: As in `make_train_step`.
      optimizer: From `make_optimizer`.
      config: Settings.
      devices: Devices to use, all when None; of one process for "pmap". "jit" uses the
        first, where there is no mesh and one process.

    Raises:
      UserError: If the settings of the devices do not go together.
    """
    by_rows = TrainState._make([False] * 4 + [True])  # the carry alone
    return compile_steps(
        lambda axis: make_train_step(apply, optimizer, config, axis_name=axis),
        lambda axis: make_eval_step(apply, config, axis_name=axis),
        by_rows,
        config,
        tuple(jax.devices() if devices is None else devices),
    )
