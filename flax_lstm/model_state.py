"""The classifier and the training state that a configuration names.

Nothing here reads data: sizes come from the configuration and the vocabulary.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from flax_lstm.checkpoint import Checkpoints
from flax_lstm.config import Config, ModelConfig
from flax_lstm.train import TrainState, init_train_state, make_optimizer


def classifier(
    config: ModelConfig, vocabulary_size: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns `init` and `apply` of the library that the configuration names."""
    library = importlib.import_module(f"flax_lstm.{config.library}")
    return library.classifier_functions(config, vocabulary_size)


def initial_carry(config: Config) -> Any:
    """Returns the zero state that batches hand on, None where they do not."""
    if not config.training.carry_state:
        return None
    library = importlib.import_module(f"flax_lstm.{config.model.library}")
    return library.initial_state(config.model, config.data.batch_size)


def initial_state(
    config: Config, init: Callable[..., Any], key: PRNGKeyArray
) -> TrainState:
    """Returns the training state before the first step, drawn in one program."""
    optimizer = make_optimizer(config.training, 1)  # its state knows no total
    return jax.jit(
        lambda key: init_train_state(init, optimizer, key, carry=initial_carry(config))
    )(key)


def state_template(config: Config, init: Callable[..., Any]) -> TrainState:
    """Returns shapes and dtypes of the training state; computes nothing."""
    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(lambda key: initial_state(config, init, key), key)


def restore(
    checkpoints: Checkpoints, template: TrainState, config: Config, **how: Any
) -> tuple[TrainState, dict[str, Any]]:
    """Restores the checkpoint that the configuration wants tested.

    Args:
      checkpoints: Of the run.
      template: From `state_template`.
      config: Configuration of the run.
      how: `check` and `cast_dtype` of `Checkpoints.restore_last`.
    """
    if config.training.test_with == "best":
        return checkpoints.restore_best(template, **how)
    return checkpoints.restore_last(template, **how)
