"""`evaluate`, `predict` and `trace`: what a trained run answers."""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from flax_lstm import report
from flax_lstm.commands.arguments import Evaluate, Predict, Trace
from flax_lstm.commands.terminal import Screen
from flax_lstm.commands.texts import chunks, texts_of
from flax_lstm.config import DataConfig, UserError

if TYPE_CHECKING:
    from flax_lstm.trained import Prediction, Run


def evaluate(command: Evaluate) -> None:
    """Tests a run."""
    columns = (command.text_column, command.label_column)
    if command.data is None and columns != (None, None):
        raise UserError("--text-column and --label-column are for --data.")
    if command.part is not None and columns != (None, None):
        raise UserError(
            "the run's own data, of which --part is, has its own columns; leave "
            "--text-column and --label-column out."
        )
    run = _load(command.run)
    if command.data is None or command.part is not None:
        metrics = run.evaluate(command.part or "test", command.data)
    else:
        other = DataConfig(
            data=command.data,
            text_column=command.text_column,
            label_column=command.label_column,
        )
        metrics = run.evaluate(other)
    if command.format == "json":
        print(json.dumps(metrics, allow_nan=False))
    else:
        print("\n".join(report.metrics_lines(metrics)))


def predict(command: Predict) -> None:
    """Scores texts, a chunk at a time."""
    if command.texts and command.file is not None:
        raise UserError("give texts or --file, not both.")
    asked = _asked(command.run, command.texts, command.file)
    run = _load(command.run)
    console = Screen()
    for texts in asked:
        for prediction in run.predict(texts):
            if command.format == "jsonl":
                print(json_line(prediction))
            else:
                console.print(
                    report.prediction_text(
                        prediction.score, prediction.label, prediction.text
                    )
                )
        sys.stdout.flush()  # whoever sent these may wait for the answers


def trace(command: Trace) -> None:
    """Shows running scores."""
    asked = _asked(command.run, command.texts, None)
    run = _load(command.run)
    for texts in asked:
        show_traces(Screen(), run, texts)
        sys.stdout.flush()


def show_traces(console: Console, run: "Run", texts: Iterable[str]) -> None:
    """Prints the running score of each text."""
    for text in texts:
        console.print()
        console.print(
            report.trace_text(run.trace(text), run.label_names, console.width)
        )


def json_line(prediction: "Prediction") -> str:
    """Returns a prediction as JSON; `tokens` is the number of words read."""
    return json.dumps(
        {
            "text": prediction.text,
            "score": prediction.score,
            "label": prediction.label,
            "tokens": len(prediction.tokens),
            "unknown": prediction.unknown,
        },
        ensure_ascii=sys.stdout.encoding.lower() not in ("utf-8", "utf8"),
        allow_nan=False,
    )


def _asked(
    folder: Path, given: Sequence[str], path: Path | None
) -> Iterator[list[str]]:
    """Yields the texts in chunks; what is wrong with the first is told before loading.

    Raises:
      UserError: If the folder holds no run, or the first texts cannot be read.
    """
    from flax_lstm.settings import recorded_config

    recorded_config(folder)
    found = chunks(texts_of(given, path))
    return itertools.chain([next(found)], found)


def _load(folder: Path) -> "Run":
    from flax_lstm.run import Run

    return Run.load(folder)
