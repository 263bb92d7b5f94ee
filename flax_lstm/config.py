"""Every setting of a run, in frozen dataclasses: the only place with defaults.

What a class says of an attribute is its help text on the command line. Leaf names are
unique, so that each is a flag of its own (`--batch-size`, not `--data.batch-size`).
"""

import dataclasses
import json
import tomllib
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from flax_lstm.choice import Implementation


class UserError(ValueError):
    """A request that cannot be met as it was given.

    The message says what was given, what was expected and what to do; the command
    line prints it without a traceback and exits with 2.
    """


MOST_JSON_BYTES = 2**28
"""Of a file of settings, of a tokenizer, or of what a checkpoint says of itself. A
vocabulary of five million words fits; nothing beyond it is read into memory."""


def read_limited(path: str | Path) -> str:
    """Reads a UTF-8 file of `MOST_JSON_BYTES` at the most, and no further.

    Raises:
      OSError: If it cannot be read.
      ValueError: If it is larger, or not UTF-8.
    """
    content = bytearray()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            content += piece
            if len(content) > MOST_JSON_BYTES:
                raise ValueError(
                    f"it is larger than {MOST_JSON_BYTES // 2**20} MiB, the most that "
                    "is read"
                )
    return content.decode("utf-8")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes batches.

    Attributes:
      data: Text with labels: `demo`, a csv, tsv, json, jsonl or parquet file, a folder
        in aclImdb form, or the name of a Hugging Face dataset (`stanfordnlp/imdb`).
      test_data: The test part, where it is a file of its own.
      text_column: Column of the text; found by its name when not given.
      label_column: Column of the label; found by its name when not given.
      group_column: Rows with one value here stay in one part of a split (reviews of one
        film).
      validation_fraction: Share of the rows held out for validation, where the source
        has no such part.
      test_fraction: Share of the rows held out for the test, where the source has no
        such part.
      pipeline: `words`: lower case, words and punctuation, vocabulary from the training
        part, right padding in length buckets. `tutorial`: the eleven steps of the
        tutorial, vocabulary from all rows, left padding to max_length, remainder
        dropped.
      vocabulary_size: Most frequent words kept; the others become the unknown word.
      min_count: Words seen fewer times than this in training become the unknown word.
      max_length: Tokens kept of one text.
      buckets: Number of padded lengths at the most; each compiles once.
      batch_size: Texts in one training step.
    """

    data: str = "demo"
    test_data: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    pipeline: Literal["words", "tutorial"] = "words"
    vocabulary_size: int = 30_000
    min_count: int = 2
    max_length: int = 400
    buckets: int = 8
    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The classifier: embedding, stacked LSTM, pooling, sigmoid readout.

    Attributes:
      library: Which Flax API holds the parameters; the numbers are the same.
      embedding_size: Size of a word vector.
      embedding_scale: Word vectors start uniform in [-scale, scale].
      features: Units of each LSTM layer.
      pooling: How the outputs over time become one vector; `concat` is all three.
      dropout: Share of each layer's outputs set to zero in training, anew at every
        step.
      forget_bias: Initial bias of the forget gates.
      initializer: `orthogonal`: Glorot-uniform input and orthogonal recurrent matrices,
        gate by gate. `glorot`: Glorot-uniform over the stacked [I+H, 4H], as TensorFlow
        1.
      dtype: Computation dtype; parameters and cell state stay in float32 at least.
      implementation: How the recurrence runs; the fastest that can when not given.
    """

    library: Literal["nnx", "linen"] = "nnx"
    embedding_size: int = 128
    embedding_scale: float = 0.05
    features: tuple[int, ...] = (128, 64)
    pooling: Literal["last", "mean", "max", "concat"] = "concat"
    dropout: float = 0.5
    forget_bias: float = 1.0
    initializer: Literal["orthogonal", "glorot"] = "orthogonal"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    implementation: Implementation | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Loss, optimiser and the loop.

    Attributes:
      epochs: Passes over the training part.
      loss: Mean squared error of the scores, or binary cross-entropy.
      optimizer: AdamW, or Adadelta.
      learning_rate: Peak learning rate.
      schedule: Learning rate after the warm-up: constant, or falling to 0 along a
        cosine.
      warmup_fraction: Share of all steps over which the learning rate rises from 0.
      weight_decay: AdamW's decoupled decay of the matrices; biases and word vectors
        have none.
      clip_norm: Largest global norm of a gradient; None leaves it as it is.
      rho: Adadelta's decay rate.
      epsilon: Added inside the optimiser's denominators.
      sparse_embedding: Update only the word vectors that a batch uses, as TensorFlow
        does.
      carry_state: Start each batch from the final LSTM state of the one before (the
        tutorial).
      patience: Epochs without a better validation accuracy, or an equal one with a
        lower loss, before training stops early.
      test_with: The checkpoint that is tested at the end.
      save_every: Steps between checkpoints within an epoch; there is one at the end
        of each epoch anyway.
      save_minutes: Minutes after which a checkpoint is made within an epoch.
      skip_nonfinite: Leave out, and count, the steps whose loss or gradient is not
        finite, instead of stopping there.
      parallel: `jit`: one device, or the mesh where there is one or there are several
        processes. `sharded`: `jax.jit` over a mesh of all devices. `pmap`: `jax.pmap`
        over the devices of one process.
      mesh: `data=N` or `data=N,model=M`: N devices share the rows of each batch, and M
        the word vectors and the units of the LSTMs. All devices share the rows when
        not given.
      gradient_accumulation: Parts that each device computes its rows of a batch in, one
        after the other, for batches beyond its memory; the same step to rounding.
      seed: Seed of the split, the order of the rows, the parameters and the dropout.
    """

    epochs: int = 10
    loss: Literal["mse", "bce"] = "mse"
    optimizer: Literal["adamw", "adadelta"] = "adamw"
    learning_rate: float = 2e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_fraction: float = 0.05
    weight_decay: float = 1e-2
    clip_norm: float | None = 1.0
    rho: float = 0.95
    epsilon: float = 1e-8
    sparse_embedding: bool = True
    carry_state: bool = False
    patience: int | None = 3
    test_with: Literal["best", "last"] = "best"
    save_every: int | None = None
    save_minutes: float | None = 10.0
    skip_nonfinite: bool = False
    parallel: Literal["jit", "pmap", "sharded"] = "jit"
    mesh: str | None = None
    gradient_accumulation: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainConfig = TrainConfig()

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain values, as written to `config.json`."""
        return dataclasses.asdict(self)

    def checked(self) -> "Config":
        """Returns the same, each setting of its type: dataclasses take anything.

        Raises:
          UserError: If a setting is of another type, or none of its choices.
        """
        return Config.from_dict(self.to_dict())

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], base: "Config | None" = None
    ) -> "Config":
        """Builds a configuration from nested plain values over those of `base`.

        Raises:
          UserError: If a section, a name or a type is not one of this configuration.
        """
        base = base or cls()
        sections = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
        for section, settings in values.items():
            if section not in sections:
                raise UserError(
                    f"configuration section {section!r} is unknown; "
                    f"sections are {sorted(sections)}."
                )
            if not isinstance(settings, dict):
                raise UserError(
                    f"configuration section {section!r} must be a table of settings; "
                    f"got {settings!r}."
                )
            sections[section] = _replaced(section, sections[section], settings)
        return cls(**sections)

    @classmethod
    def load(cls, path: str | Path, base: "Config | None" = None) -> "Config":
        """Reads a `.json` or `.toml` file in the form of `to_dict`.

        Raises:
          UserError: If the file is missing, does not parse, or holds unknown settings.
        """
        path = Path(path)
        try:
            text = read_limited(path)
            if path.suffix == ".toml":
                values = tomllib.loads(text)
            else:
                values = json.loads(text, object_pairs_hook=object_once)
            if not isinstance(values, dict):
                raise UserError(f"expected tables of settings; got {values!r:.80}.")
            return cls.from_dict(values, base)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read configuration {path}: {error}") from error


def object_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object, whose keys must differ (Python's own takes the last).

    Raises:
      ValueError: If a key stands more than once.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r:.80} more than once")
    return found


def _replaced(section: str, defaults: Any, settings: dict[str, Any]) -> Any:
    """Returns the dataclass `defaults` with `settings` in place, types checked."""
    known = {f.name: f.type for f in dataclasses.fields(defaults)}
    values = {}
    for name, value in settings.items():
        if name not in known:
            raise UserError(
                f"setting {section}.{name} is unknown; settings are {sorted(known)}."
            )
        try:
            values[name] = _fitted(known[name], value)
        except TypeError:
            raise UserError(
                f"setting {section}.{name} must be {_described(known[name])}; "
                f"got {value!r}."
            ) from None
    return dataclasses.replace(defaults, **values)


def _fitted(kind: Any, value: Any) -> Any:
    """Returns `value`, as JSON or TOML gives it, in the type `kind` of a field.

    Raises:
      TypeError: If it does not fit. A boolean is no number; a whole number is a float,
        and so is NumPy's; a path is a string.
    """
    origin, choices = get_origin(kind), get_args(kind)
    if origin is Literal:
        if isinstance(value, str) and value in choices:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_fitted(choices[0], item) for item in value)
    elif origin in (Union, UnionType):
        for choice in choices:
            try:
                return _fitted(choice, value)
            except TypeError:
                continue
    elif kind is float and (type(value) is int or isinstance(value, float)):
        return float(value)
    elif kind is str and isinstance(value, Path):
        return str(value)
    elif type(value) is kind:
        return value
    raise TypeError


def _described(kind: Any) -> str:
    """Returns the type of a field in words."""
    origin, choices = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, choices))
    if origin is tuple:
        return f"a list of {choices[0].__name__}"
    if origin in (Union, UnionType):
        return " or ".join(_described(choice) for choice in choices)
    return "null" if kind is type(None) else kind.__name__


TUTORIAL = Config(
    data=DataConfig(pipeline="tutorial", max_length=244, batch_size=256),
    model=ModelConfig(
        embedding_size=300,
        embedding_scale=1.0,
        features=(128, 64),
        pooling="last",
        dropout=0.5,
        forget_bias=1.0,
        initializer="glorot",
    ),
    training=TrainConfig(
        # Of seeds 0 to 2 the one whose log is nearest to the published: the recipe
        # keeps the batches in one order, which makes validation depend on the seed.
        seed=1,
        epochs=50,
        loss="mse",
        optimizer="adadelta",
        learning_rate=0.1,
        schedule="constant",
        warmup_fraction=0.0,
        weight_decay=0.0,
        clip_norm=None,
        rho=0.95,
        epsilon=1e-8,
        sparse_embedding=True,
        carry_state=True,
        patience=None,
        test_with="last",
    ),
)
"""The recipe of "Introduction to LSTMs with TensorFlow", constant by constant."""

PRESETS = {"default": Config(), "tutorial": TUTORIAL}
