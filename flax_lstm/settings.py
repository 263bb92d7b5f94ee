"""What a run may ask for: settings in their range, and on resumption the same ones."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from flax_lstm import folder as files
from flax_lstm.config import Config, UserError
from flax_lstm.host_memory import OutOfMemoryError, machine_bytes

PLACES = ("data", "test_data")
"""Where data lies. It may move: what counts is its SHA-256, see `check_same_data`."""
TOPOLOGY = ("parallel", "mesh", "gradient_accumulation")
"""What a resumed run may change: where it computes, which changes rounding alone."""


def recorded_config(folder: str | Path) -> Config:
    """Returns the configuration of the run in a folder.

    Raises:
      UserError: If the folder holds no run.
    """
    folder = Path(folder)
    if not files.holds_run(folder):
        raise UserError(
            f"{folder} holds no run (no {files.CONFIG}); give the folder that "
            "`flax-lstm train` wrote, such as runs/demo-1."
        )
    return Config.load(folder / files.CONFIG)


def check_place(place: str | None, what: str, remedy: str) -> None:
    """Raises UserError where a file or folder that a run read is no longer there.

    Args:
      place: As `with_absolute_paths` records it; None where there is none.
      what: Was read from there, for the message.
      remedy: What to do, likewise.
    """
    path = Path(place or "").expanduser()
    with contextlib.suppress(PermissionError):  # of which what reads it tells
        if path.is_absolute() and not path.exists():  # the Hub's names are not absolute
            raise UserError(f"{what} is no longer at {place}; {remedy}.")


def check_places(recorded: Config, asked: Config, folder: Path) -> None:
    """Raises UserError where data is to be read again from where it no longer is."""
    for name in PLACES:
        place = getattr(recorded.data, name)
        if place == getattr(asked.data, name):  # not given anew
            check_place(
                place,
                f"the {name.replace('_', ' ')} of the run in {folder}",
                f"put it back, or give its new place by --{name.replace('_', '-')}",
            )


def with_absolute_paths(config: Config) -> Config:
    """Makes local data paths absolute, so that the run's record names them."""
    paths = {
        name: str(Path(value).resolve())
        for name in PLACES
        if (value := getattr(config.data, name)) and Path(value).exists()
    }
    if config.data.data == "demo":
        paths.pop("data", None)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **paths))


MAY_CHANGE = {"save_every", "save_minutes", "skip_nonfinite", *TOPOLOGY, *PLACES}
"""Settings that may be others when a run goes on."""


def check_same_config(
    recorded: dict[str, Any], asked: Config, where: str, cast_dtype: bool = False
) -> None:
    """Raises UserError where a run would be gone on with under other settings.

    Args:
      recorded: The settings it was made with, as `Config.to_dict` gives them; those
        that are not there have their default.
      asked: What is asked for now.
      where: What has those settings, for the message: a run or a checkpoint.
      cast_dtype: Lets the computation dtype be another.
    """
    before = Config.from_dict(recorded).to_dict()
    for section, settings in asked.to_dict().items():
        for name, new in settings.items():
            old, advice = before[section][name], ""
            if new == old or name in MAY_CHANGE or (name == "epochs" and new > old):
                continue
            if name == "epochs":
                advice = "; epochs can only grow"
            if name == "dtype":
                if cast_dtype:
                    continue
                advice = "; --cast-dtype converts"
            raise UserError(
                f"{where} has {section}.{name} = {old!r}, and was asked to go on with "
                f"{new!r}{advice}. Use the recorded setting, or start a run in another "
                "folder."
            )


def check_checkpoint(
    meta: dict[str, Any],
    config: Config,
    tokenizer: str,
    folder: Path,
    cast_dtype: bool = False,
) -> None:
    """Raises UserError where a checkpoint is not one of the run it lies in.

    Args:
      meta: What the checkpoint says of itself.
      config: The configuration of the run.
      tokenizer: The fingerprint of the run's tokenizer.
      folder: Of the run.
      cast_dtype: Lets the computation dtype be another.
    """
    if "config" in meta:  # not in those of the first format
        where = f"a checkpoint in {folder}"
        check_same_config(meta["config"], config, where, cast_dtype)
    if meta["tokenizer"] != tokenizer:
        raise UserError(
            f"a checkpoint in {folder} was made with another vocabulary: its tokenizer "
            f"has fingerprint {meta['tokenizer']}, this run's has {tokenizer}. Put the "
            "run's own checkpoints or tokenizer back, or train again."
        )


def check_same_data(
    recorded: dict[str, Any], found: dict[str, Any], folder: Path
) -> None:
    """Raises UserError where the data is no longer what the run was trained on.

    It may lie elsewhere.
    """

    def content(summary: dict[str, Any], name: str) -> Any:
        told = summary[name]
        return told["sha256"] if told and name.endswith("source") else told

    for name in ("source", "test_source", "rows", "tokenizer", "bucket_lengths"):
        if content(recorded, name) != content(found, name):
            raise UserError(
                f"the data has changed since the run in {folder} was trained: {name} "
                f"was {recorded[name]!r}, and is now {found[name]!r}. Put the old data "
                "back, or train again."
            )


def least_bytes(config: Config) -> int:
    """Returns what training takes at the very least: one word, one step, float32.

    Weights, their gradients and two slots of the optimiser; of the activations the word
    vectors, gates and states of a batch of texts of one word, or of the length that the
    tutorial pads every text to. The true need is larger by the vocabulary and the
    length of the texts.
    """
    model = config.model
    inputs = (model.embedding_size, *model.features[:-1])
    layers = list(zip(inputs, model.features, strict=True))
    weights = model.embedding_size + sum(4 * h * (i + h + 1) for i, h in layers)
    activations = model.embedding_size + 6 * sum(model.features)
    steps = config.data.max_length if config.data.pipeline == "tutorial" else 1
    return 4 * (4 * weights + steps * config.data.batch_size * activations)


MOST_STEPS = 2**31 - 1
"""Of a run: its step is an int32, here and in optax."""


def check_steps(config: Config, batches: int) -> None:
    """Raises UserError where a run has more steps than can be counted."""
    steps = config.training.epochs * batches
    if steps > MOST_STEPS:
        raise UserError(
            f"{config.training.epochs:,} epochs of {batches:,} batches are {steps:,} "
            f"steps; at most {MOST_STEPS:,} can be counted. Lower training.epochs, or "
            "raise data.batch_size."
        )


@contextlib.contextmanager
def memory_errors(config: Config) -> Iterator[None]:
    """Says which settings to lower where there is not enough memory for them."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text:
            raise
        model = config.model
        raise OutOfMemoryError(
            f"out of memory ({first_line(text) or 'the system gave no more'}), with "
            f"data.batch_size {config.data.batch_size}, data.max_length "
            f"{config.data.max_length}, model.features {model.features} and "
            f"model.embedding_size {model.embedding_size}. Make one of them smaller; "
            "checkpoints made until here are kept."
        ) from error


@contextlib.contextmanager
def refusals_of_kernels() -> Iterator[None]:
    """Makes a UserError of what an implementation cannot do on this machine."""
    try:
        yield
    except NotImplementedError as error:
        raise UserError(f"setting model.{error}") from error


def check_implementation(
    config: Config, apply: Callable[..., Any], params: Any, length: int, devices: int
) -> None:
    """Raises UserError where an implementation cannot run on this machine.

    Args:
      config: Of the run.
      apply: Of the classifier.
      params: Shapes of its parameters.
      length: That the longest texts are padded to: kernels refuse what is too long.
      devices: That share the rows of a batch.
    """
    if config.model.implementation is None:
        return
    parts = devices * config.training.gradient_accumulation
    rows = -(-config.data.batch_size // parts)
    tokens = jax.ShapeDtypeStruct((rows, length), "int32")
    lengths = jax.ShapeDtypeStruct((rows,), "int32")
    with refusals_of_kernels():
        jax.eval_shape(apply, params, tokens, lengths)


def first_line(text: str, width: int = 120) -> str:
    """Returns the first line of a text, shortened."""
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= width else line[:width] + "…"


def check_settings(config: Config) -> None:
    """Raises UserError where a number is outside its range, or the memory's."""
    model, training, source = config.model, config.training, config.data
    least_one = {
        "training.epochs": training.epochs,
        "training.gradient_accumulation": training.gradient_accumulation,
        "data.batch_size": source.batch_size,
        "data.max_length": source.max_length,
        "data.buckets": source.buckets,
        "data.min_count": source.min_count,
        "data.vocabulary_size": source.vocabulary_size,
        "model.embedding_size": model.embedding_size,
        "model.features": min(model.features, default=0),
        "training.patience": 1 if training.patience is None else training.patience,
        "training.save_every": (
            1 if training.save_every is None else training.save_every
        ),
    }
    shares = {
        "data.validation_fraction": source.validation_fraction,
        "data.test_fraction": source.test_fraction,
        "model.dropout": model.dropout,
        "training.warmup_fraction": training.warmup_fraction,
        "training.rho": training.rho,
    }
    not_negative = {
        "training.learning_rate": training.learning_rate,
        "training.weight_decay": training.weight_decay,
        "training.epsilon": training.epsilon,
        "training.save_minutes": training.save_minutes or 0.0,
        "model.embedding_scale": model.embedding_scale,
    }
    for values, fits, words in (
        (least_one, lambda v: v >= 1, "at least 1"),
        (shares, lambda v: 0 <= v < 1, "at least 0 and below 1"),
        (not_negative, lambda v: 0 <= v < math.inf, "a number of 0 or more"),
    ):
        for name, value in values.items():
            if not fits(value):
                raise UserError(f"setting {name} must be {words}; got {value!r}.")
    clip = training.clip_norm
    if clip is not None and not 0 < clip < math.inf:
        raise UserError(
            "setting training.clip_norm must be a number above 0, or None for no "
            f"clipping; got {clip!r}."
        )
    if not math.isfinite(model.forget_bias):
        raise UserError(
            f"setting model.forget_bias must be finite; got {model.forget_bias!r}."
        )
    if not 0 <= training.seed < 2**32:  # what JAX's keys tell apart
        raise UserError(
            "setting training.seed must be at least 0 and at most 4294967295; got "
            f"{training.seed}."
        )
    if source.batch_size % training.gradient_accumulation:
        raise UserError(
            f"data.batch_size {source.batch_size} cannot be computed in "
            f"{training.gradient_accumulation} equal parts; make it a multiple of "
            "--gradient-accumulation."
        )
    least, there_is = least_bytes(config), machine_bytes()
    if there_is is not None and least > there_is:
        raise UserError(
            f"training needs {least / 2**30:,.0f} GiB of memory at the least, for "
            f"model.features {model.features}, model.embedding_size "
            f"{model.embedding_size}, data.batch_size {source.batch_size} and "
            f"data.max_length {source.max_length}; this machine has "
            f"{there_is / 2**30:,.0f} GiB. Make one of them smaller."
        )
    if jax.dtypes.canonicalize_dtype(model.dtype).name != model.dtype:
        raise UserError(
            f"setting model.dtype = {model.dtype!r} needs JAX's 64-bit types; set "
            "JAX_ENABLE_X64=1 in the environment."
        )
