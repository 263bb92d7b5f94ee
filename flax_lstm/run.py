"""A run: trains into a folder, and answers from the folder alone.

A run's folder holds `config.json` (the effective configuration), `tokenizer.json`,
`metrics.jsonl` (one line for each epoch), `environment.json`, `summary.json` (the data
and the result) and `checkpoints/`. It can be moved and copied: `Run.load` and `predict`
need nothing else, `evaluate` reads the data again from where it was.

>>> from flax_lstm import run
>>> from flax_lstm.config import Config
>>> result = run.train(Config())  # doctest: +SKIP
>>> result.predict(["not at all bad"])[0].label  # doctest: +SKIP
'positive'
"""

import dataclasses
import functools
import importlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from flax_lstm import data, environment
from flax_lstm import folder as files
from flax_lstm.batching import assemble
from flax_lstm.checkpoint import Checkpoints
from flax_lstm.config import Config, DataConfig, ModelConfig, UserError
from flax_lstm.environment import use_compilation_cache
from flax_lstm.epochs import Progress, Trainer
from flax_lstm.events import EpochDone, Event, Finished, RunStarted, StepDone
from flax_lstm.train import (
    TrainState,
    evaluate,
    init_train_state,
    make_eval_step,
    make_optimizer,
    parallelize,
)

__all__ = [
    "EpochDone",
    "Event",
    "Finished",
    "Prediction",
    "Run",
    "RunStarted",
    "StepDone",
    "train",
    "use_compilation_cache",
]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a run makes of one text.

    Attributes:
      text: The text as it was given.
      score: Between 0 (the first of the label names) and 1 (the second).
      label: The name of the nearer label.
      tokens: The words that were read, at most `max_length`.
      unknown: How many words of the text the run has no vector for.
    """

    text: str
    score: float
    label: str
    tokens: list[str]
    unknown: int


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained classifier, as its folder holds it.

    Attributes:
      folder: The run's folder.
      config: The effective configuration.
      tokenizer: The tokenizer, with its vocabulary.
      label_names: Names of the labels 0 and 1.
      metrics: `epochs` (the lines of `metrics.jsonl`) and, once the run has finished,
        `test`, `tested_epoch`, `best_epoch`, `stopped_early` and more.
      lengths: Bucket lengths that texts are padded to.
      params: Parameters of the tested checkpoint.
    """

    folder: Path
    config: Config
    tokenizer: data.TextTokenizer
    label_names: tuple[str, str]
    metrics: dict[str, Any]
    lengths: tuple[int, ...]
    params: Any = dataclasses.field(repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Reads a run from its folder, wherever that now is.

        Restores the best or the last checkpoint, as `test_with` says. May be called
        while the run still trains.

        Raises:
          UserError: If the folder holds no run, or its files do not fit together.
          CheckpointError: If no intact checkpoint is left.
        """
        folder = Path(folder).resolve()
        config = recorded_config(folder)
        summary = files.read_json(folder / files.SUMMARY)
        tokenizer = data.TextTokenizer.load(folder / files.TOKENIZER)
        if tokenizer.fingerprint() != summary["tokenizer"]:
            raise UserError(
                f"{folder / files.TOKENIZER} is not the tokenizer this run was trained "
                "with (its fingerprint is another); restore the file."
            )
        init, _ = classifier(config.model, tokenizer.vocabulary_size)
        template = state_template(config, init)
        with Checkpoints(folder / files.CHECKPOINTS, read_only=True) as checkpoints:
            state, meta = restore(checkpoints, template, config)
        return cls(
            folder=folder,
            config=config,
            tokenizer=tokenizer,
            label_names=tuple(summary["label_names"]),
            metrics={
                **(summary["result"] or {}),
                "epochs": meta["progress"]["history"],
            },
            lengths=tuple(summary["data"]["bucket_lengths"]),
            params=state.params,
        )

    @functools.cached_property
    def _apply(self) -> Callable[..., Any]:
        _, apply = classifier(self.config.model, self.tokenizer.vocabulary_size)

        @functools.partial(jax.jit, static_argnames="per_step")
        def scores(params: Any, tokens: Any, lengths: Any, *, per_step: bool) -> Any:
            logits, _ = apply(params, tokens, lengths, per_step=per_step)
            return jax.nn.sigmoid(logits)

        return scores

    def evaluate(self, source: str | DataConfig = "test") -> dict[str, float]:
        """Evaluates on data read again, each row counted once.

        Args:
          source: A part of the run's own data, "train", "validation" or "test", read
            from where it was and required to be what it was; or other data, all of
            it, with the run's own tokenizer.

        Returns:
          `loss`, `accuracy`, `count`, and the confusion counts.

        Raises:
          UserError: If the data is gone, has changed, or has no rows.
        """
        if isinstance(source, DataConfig):
            source = with_absolute_paths(Config(data=source)).data
            examples, _, _ = data.load_all(source, self.tokenizer, self.label_names)
        else:
            corpus = data.load(
                self.config.data, self.config.training.seed, self.tokenizer
            )
            summary = files.read_json(self.folder / files.SUMMARY)
            check_same_data(summary["data"], corpus.summary, self.folder)
            if source not in corpus.parts:
                raise UserError(
                    f"part {source!r} does not exist; parts are {list(corpus.parts)}."
                )
            examples = corpus.parts[source]
        if not len(examples):
            raise UserError(f"there are no rows to evaluate on in {source!r}.")
        _, apply = classifier(self.config.model, self.tokenizer.vocabulary_size)
        batches = data.batches(
            examples, self.lengths, self.config.data, seed=0, epoch=None
        )
        return evaluate(
            jax.jit(make_eval_step(apply, self.config.training)),
            self.params,
            data.prefetch(batches),
            carry=initial_carry(self.config),
        )

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Scores texts, in the order given; the empty text is a text too.

        Texts of like length share a batch. Needs nothing but the run's folder.

        Raises:
          UserError: If `texts` is one string, or holds something else than strings.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError(
                "predict takes a list of texts, as in predict(['so good']); got "
                f"{texts!r:.80}."
            )
        encoded = self.tokenizer.analyse(texts)
        examples = data.Examples.from_rows(
            [one.ids for one in encoded], [0.0] * len(encoded)
        )
        # Powers of two, so that requests of any size share a few compiled programs.
        size = 1 << max(len(encoded) - 1, 0).bit_length()
        settings = dataclasses.replace(
            self.config.data, batch_size=min(size, self.config.data.batch_size)
        )
        scores = np.zeros(len(encoded))
        for length, rows in data.batch_plan(
            examples, self.lengths, settings, seed=0, epoch=None
        ):
            batch = self._assemble(examples, rows, length, settings.batch_size)
            got = self._apply(self.params, batch.tokens, batch.lengths, per_step=False)
            scores[rows] = np.asarray(got, np.float64)[: len(rows)]
        return [
            Prediction(
                text=text,
                score=float(score),
                label=self.label_names[int(score > 0.5)],
                tokens=one.words,
                unknown=one.unknown,
            )
            for text, score, one in zip(texts, scores, encoded, strict=True)
        ]

    def trace(self, text: str) -> list[tuple[str, float]]:
        """Returns each word of a text with the score of the text up to it."""
        (encoded,) = self.tokenizer.analyse([text])
        count = len(encoded.ids)
        examples = data.Examples.from_rows([encoded.ids], [0.0])
        ((length, rows),) = data.batch_plan(
            examples, self.lengths, self.config.data, seed=0, epoch=None
        )
        batch = self._assemble(examples, rows, length, 1)
        got = self._apply(self.params, batch.tokens, batch.lengths, per_step=True)
        (scores,) = np.asarray(got, np.float64)
        first = 0 if batch.lengths is not None else length - count
        return [
            (word, float(score))
            for word, score in zip(
                encoded.words, scores[first : first + count], strict=True
            )
        ]

    def _assemble(self, examples: Any, rows: Any, length: int, size: int) -> data.Batch:
        left = self.config.data.pipeline == "tutorial"
        return assemble(examples, rows, length, size, left=left)


def train(
    config: Config,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> Run:
    """Trains, saves, restores what it saved, and tests it.

    Args:
      config: All settings.
      folder: The run's folder; the first unused of `runs/NAME-1`, … when None.
      resume: Goes on from the newest intact checkpoint in `folder`, exactly: the
        parameters at the end are those of a run that was never interrupted. The
        configuration must be the recorded one, but `epochs` may grow; a schedule is
        then stretched over the new number from where the run goes on.
      on_event: Called with each event of `flax_lstm.events`.

    Returns:
      The run, with the parameters that were tested.

    Raises:
      UserError: If the request cannot be met: bad settings or data, a folder that
        holds a run (or none, with `resume`), or one that another process writes.
      NonFiniteLossError: If a loss is not finite; earlier checkpoints stay.
      CheckpointError: If a checkpoint cannot be written or read.
    """
    check_settings(config)
    config = with_absolute_paths(config)
    if folder is None:
        if resume:
            raise UserError("resume needs the folder of the run to go on with.")
        name = Path(config.data.data).stem or "run"
        folder = files.unused(Path("runs"), name)
    folder = Path(folder).resolve()
    if resume and not files.holds_run(folder):
        raise UserError(
            f"nothing to resume: {folder} holds no run (no {files.CONFIG}); start one "
            "there without --resume."
        )
    with files.writing(folder):
        if resume:
            check_same_config(recorded_config(folder), config, folder)
        elif files.holds_run(folder):
            raise UserError(
                f"{folder} already holds a run; continue it with --resume, or give "
                "another folder. Nothing was changed."
            )
        return _train(config, folder, resume, on_event or (lambda event: None))


def _train(
    config: Config, folder: Path, resume: bool, on_event: Callable[[Event], None]
) -> Run:
    """Trains with the folder's lock held."""
    corpus = data.load(config.data, config.training.seed)
    if resume:
        recorded = files.read_json(folder / files.SUMMARY)
        check_same_data(recorded["data"], corpus.summary, folder)
    lengths = corpus.bucket_lengths
    batches = data.batch_count(corpus.parts["train"], lengths, config.data)
    init, apply = classifier(config.model, corpus.tokenizer.vocabulary_size)
    optimizer = make_optimizer(config.training, batches * config.training.epochs)
    program = parallelize(apply, optimizer, config.training)
    template = state_template(config, init)
    summary = {
        "data": corpus.summary,
        "label_names": list(corpus.label_names),
        "tokenizer": corpus.tokenizer.fingerprint(),
        "batches": batches,
        "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(template.params)),
        "result": None,
    }
    with Checkpoints(folder / files.CHECKPOINTS) as checkpoints:
        progress = Progress()
        if resume:
            if not checkpoints.steps():
                raise UserError(
                    f"nothing to resume: no checkpoint was saved in {folder}; start "
                    "again in another folder."
                )
            state, meta = checkpoints.restore_last(template)
            progress = Progress(**meta["progress"])
        else:
            corpus.tokenizer.save(folder / files.TOKENIZER)
            state = initial_state(config, init, jax.random.key(config.training.seed))
        files.write_json(
            folder / files.ENVIRONMENT, environment.describe(program.devices)
        )
        files.write_json(folder / files.SUMMARY, summary)
        files.write_json(folder / files.CONFIG, config.to_dict())
        meta = {"tokenizer": summary["tokenizer"]}
        if not resume:  # so that a run can be resumed from its first moment on
            checkpoints.save(
                0,
                state,
                {**meta, "progress": dataclasses.asdict(progress)},
                metric=math.nan,
            )
        on_event(
            RunStarted(
                folder=folder,
                config=config,
                data=corpus.summary,
                epochs=config.training.epochs,
                batches=batches,
                parameters=summary["parameters"],
                devices=tuple(d.device_kind for d in program.devices),
                first_epoch=progress.epoch + 1,
            )
        )
        began = time.perf_counter()
        with open(folder / files.METRICS, "w", encoding="utf-8") as metrics_file:
            for record in progress.history:
                files.write_line(metrics_file, record)
            trainer = Trainer(
                config=config,
                corpus=corpus,
                lengths=lengths,
                batches=batches,
                program=program,
                checkpoints=checkpoints,
                metrics_file=metrics_file,
                on_event=on_event,
                meta=meta,
            )
            placed = trainer.run(program.place_state(state), progress)
        del placed
        # What is tested is what is on disk.
        state, meta = restore(checkpoints, template, config)
        test = trainer.evaluate(program.place_state(state), "test")
        finished = Finished(
            folder=folder,
            test=test,
            tested_epoch=meta["progress"]["epoch"],
            best_epoch=progress.best_epoch,
            epochs_done=progress.epoch,
            stopped_early=progress.epoch < config.training.epochs,
            seconds=time.perf_counter() - began,
        )
    result = {
        name: value
        for name, value in dataclasses.asdict(finished).items()
        if name != "folder"
    }
    result["best_validation_accuracy"] = progress.best_accuracy
    files.write_json(folder / files.SUMMARY, {**summary, "result": result})
    on_event(finished)
    return Run(
        folder=folder,
        config=config,
        tokenizer=corpus.tokenizer,
        label_names=corpus.label_names,
        metrics={**result, "epochs": progress.history},
        lengths=lengths,
        params=state.params,
    )


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
    checkpoints: Checkpoints, template: TrainState, config: Config
) -> tuple[TrainState, dict[str, Any]]:
    """Restores the checkpoint that the configuration wants tested."""
    if config.training.test_with == "best":
        return checkpoints.restore_best(template)
    return checkpoints.restore_last(template)


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


def with_absolute_paths(config: Config) -> Config:
    """Makes local data paths absolute, so that the run's record names them."""
    paths = {
        name: str(Path(value).resolve())
        for name in ("data", "test_data")
        if (value := getattr(config.data, name)) and Path(value).exists()
    }
    if config.data.data == "demo":
        paths.pop("data", None)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **paths))


def check_same_config(recorded: Config, asked: Config, folder: Path) -> None:
    """Raises UserError where a run would be resumed with other settings."""
    for section, settings in recorded.to_dict().items():
        for name, old in settings.items():
            new = getattr(getattr(asked, section), name)
            if new == old or (name == "epochs" and new > old):
                continue
            why = "; epochs can only grow" if name == "epochs" else ""
            raise UserError(
                f"the run in {folder} has {section}.{name} = {old!r}, and was asked to "
                f"go on with {new!r}{why}. Resume with the recorded setting, or start "
                "a run in another folder."
            )


def check_same_data(
    recorded: dict[str, Any], found: dict[str, Any], folder: Path
) -> None:
    """Raises UserError where the data is no longer what the run was trained on."""
    for name in ("source", "test_source", "rows", "tokenizer", "bucket_lengths"):
        if recorded[name] != found[name]:
            raise UserError(
                f"the data has changed since the run in {folder} was trained: {name} "
                f"was {recorded[name]!r}, and is now {found[name]!r}. Put the old data "
                "back, or train again."
            )


def check_settings(config: Config) -> None:
    """Raises UserError where a number is outside its range."""
    model, training, source = config.model, config.training, config.data
    least_one = {
        "training.epochs": training.epochs,
        "data.batch_size": source.batch_size,
        "data.max_length": source.max_length,
        "data.buckets": source.buckets,
        "data.min_count": source.min_count,
        "data.vocabulary_size": source.vocabulary_size,
        "model.embedding_size": model.embedding_size,
        "model.features": min(model.features, default=0),
        "training.patience": 1 if training.patience is None else training.patience,
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
        "training.clip_norm": training.clip_norm or 0.0,
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
    if jax.dtypes.canonicalize_dtype(model.dtype).name != model.dtype:
        raise UserError(
            f"setting model.dtype = {model.dtype!r} needs JAX's 64-bit types; set "
            "JAX_ENABLE_X64=1 in the environment."
        )
