"""A trained run: loaded from its folder, and what it answers.

`predict` and `trace` need nothing but the folder, `evaluate` reads the data again from
where it was.
"""

import dataclasses
import functools
import shlex
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_lstm import data
from flax_lstm import folder as files
from flax_lstm.batching import assemble
from flax_lstm.checkpoint import Checkpoints, CheckpointWarning
from flax_lstm.config import Config, DataConfig, UserError
from flax_lstm.environment import check_devices
from flax_lstm.history import History
from flax_lstm.model_state import classifier, initial_carry, restore, state_template
from flax_lstm.settings import (
    check_checkpoint,
    check_place,
    check_same_data,
    recorded_config,
    with_absolute_paths,
)
from flax_lstm.train import evaluate, make_eval_step

SUMMARISED = {"tokenizer", "label_names", "data", "result"}
"""What is needed of the summary of a run."""


class TrainingDataWarning(UserWarning):
    """A run is evaluated on all of what it was trained on."""


class UnfinishedRunWarning(UserWarning):
    """A run is used that was not trained to its end."""


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

        Warns:
          CheckpointWarning: If a checkpoint is damaged, or the one restored is not the
            one that was tested.
          UnfinishedRunWarning: If the run was not trained to its end.
        """
        if not isinstance(folder, str | Path) or folder == "":
            raise UserError(f"Run.load takes the folder of a run; got {folder!r:.80}.")
        check_devices()
        folder = Path(folder).resolve()
        config = recorded_config(folder)
        summary = files.read_json(folder / files.SUMMARY)
        if not isinstance(summary, dict) or not summary.keys() >= SUMMARISED:
            raise UserError(
                f"{folder / files.SUMMARY} is damaged: it needs "
                f"{', '.join(sorted(SUMMARISED))}; restore it, or train again."
            )
        remedy = (
            "Restore the file, or let `flax-lstm train --resume --out "
            f"{shlex.quote(str(folder))}` write it anew from the data."
        )
        try:
            tokenizer = data.TextTokenizer.load(folder / files.TOKENIZER)
        except UserError as error:
            raise UserError(f"{error} {remedy}") from error
        if tokenizer.fingerprint() != summary["tokenizer"]:
            raise UserError(
                f"{folder / files.TOKENIZER} is not the tokenizer this run was trained "
                f"with (its fingerprint is another). {remedy}"
            )
        init, _ = classifier(config.model, tokenizer.vocabulary_size)
        template = state_template(config, init)
        cast = summary.get("cast_dtype", False)

        def check(meta: dict[str, Any]) -> None:
            check_checkpoint(meta, config, summary["tokenizer"], folder, cast)

        path = folder / files.CHECKPOINTS
        with files.reading(folder), Checkpoints(path, read_only=True) as checkpoints:
            state, meta = restore(
                checkpoints, template, config, check=check, cast_dtype=cast
            )
            history = History.read(folder / files.METRICS, meta)
        result = summary["result"] or {}
        epoch = meta["progress"]["epoch"]
        if not _is_done(result, config):
            warnings.warn(
                f"the run in {folder} was stopped before it was done, or still trains; "
                f"its checkpoint after epoch {epoch} of {config.training.epochs} is "
                f"used. `flax-lstm train --resume --out {shlex.quote(str(folder))}` "
                "goes on.",
                UnfinishedRunWarning,
                stacklevel=2,
            )
        if (tested := result.get("tested_epoch", epoch)) != epoch:
            warnings.warn(
                f"the checkpoint of epoch {epoch} of {folder} is used, not that of "
                f"epoch {tested}, which was tested: it is gone or damaged, or the run "
                "went on since.",
                CheckpointWarning,
                stacklevel=2,
            )
        return cls(
            folder=folder,
            config=config,
            tokenizer=tokenizer,
            label_names=tuple(summary["label_names"]),
            metrics={**result, "epochs": history.records},
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

    def evaluate(
        self, source: str | DataConfig = "test", moved_to: str | None = None
    ) -> dict[str, float]:
        """Evaluates on data read again, each row counted once.

        Args:
          source: A part of the run's own data, "train", "validation" or "test", read
            from where it was and required to be what it was; or other data, all of
            it, with the run's own tokenizer.
          moved_to: Where the run's own data now lies, if elsewhere; for a part of it.

        Returns:
          `loss`, `accuracy`, `count`, and the confusion counts.

        Raises:
          UserError: If the data is gone, has changed, or has no rows, or other data is
            given with `moved_to`.

        Warns:
          TrainingDataWarning: If other data is what the run was trained on.
        """
        summary = files.read_json(self.folder / files.SUMMARY)
        if isinstance(source, DataConfig):
            if moved_to is not None:
                raise UserError(
                    f"moved_to={moved_to!r} is for a part of the run's own data; got "
                    f"other data, {source.data!r}."
                )
            source = with_absolute_paths(Config(data=source).checked()).data
            examples, _, found = data.load_all(source, self.tokenizer, self.label_names)
            own = summary["data"]["source"]["sha256"]
            if found["part"] is None and found["source"]["sha256"] == own:
                warnings.warn(
                    f"{source.data} is the data that the run in {self.folder} was "
                    "trained on, and all of it counts here; its own test part is what "
                    "--part test takes of it.",
                    TrainingDataWarning,
                    stacklevel=2,
                )
        else:
            own = self.config
            if moved_to is None:
                check_place(
                    own.data.data,
                    f"the data of the run in {self.folder}",
                    "put it back, or give its new place by --data beside "
                    f"--part {source}",
                )
            else:
                moved = dataclasses.replace(own.data, data=moved_to)
                own = with_absolute_paths(dataclasses.replace(own, data=moved))
            corpus = data.load(own.data, own.training.seed, self.tokenizer)
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

    def predict(self, texts: Iterable[str]) -> list[Prediction]:
        """Scores texts, in the order given; the empty text is a text too.

        Texts of like length share a batch. Needs nothing but the run's folder.

        Raises:
          UserError: If `texts` is one string, or holds something else than strings.
        """
        if isinstance(texts, Iterable) and not isinstance(texts, str):
            texts = list(texts)  # which can be gone through again, as an iterator not
        if not (isinstance(texts, list) and all(isinstance(one, str) for one in texts)):
            raise UserError(
                "predict takes a list of texts, as in predict(['so good']); got "
                f"{texts!r:.80}."
            )
        encoded = self.tokenizer.analyse(texts)
        examples = data.Examples.from_rows(
            [one.ids for one in encoded], [0.0] * len(encoded)
        ).check_ids(self.tokenizer.vocabulary_size)
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
        """Returns each word of a text with the score of the text up to it.

        Raises:
          UserError: If `text` is no string.
        """
        if not isinstance(text, str):
            raise UserError(
                f"trace takes one text, as in trace('so good'); got {text!r:.80}."
            )
        (encoded,) = self.tokenizer.analyse([text])
        count = len(encoded.ids)
        examples = data.Examples.from_rows([encoded.ids], [0.0])
        examples.check_ids(self.tokenizer.vocabulary_size)
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


def _is_done(result: dict[str, Any], config: Config) -> bool:
    """Says whether a result is that of all epochs; a run may have gone on since."""
    done = result.get("epochs_done", 0) >= config.training.epochs
    return done or result.get("stopped_early", False)
