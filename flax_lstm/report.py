"""What a person looks at: lines, tables and colours, made from plain values.

Functions return text or a rich renderable and print nothing; `LiveProgress` is the one
thing here that draws by itself. Colour never carries a meaning alone: the number stands
beside it, so that all of it can be read with `NO_COLOR`, in a pipe, or in a file.
"""

import collections
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.style import Style
from rich.text import Text

from flax_lstm.events import EpochDone, Finished, RunStarted, StepDone

RED, MIDDLE, GREEN = (226, 92, 78), (236, 224, 170), (104, 190, 106)
"""Colours of the scores 0, 1/2 and 1; black text is readable on all of them."""
LONGEST_WORD = 24
"""Columns of a word in a trace; what is longer ends in an ellipsis."""
WINDOW_S = 20.0
"""Time over which the speed shown is measured."""


def epoch_line(event: EpochDone) -> str:
    """Returns one epoch in the tutorial's format."""
    accuracy = event.validation_accuracy
    skipped = f" Skipped: {event.skipped}" if event.skipped else ""
    return (
        f"Epoch: {event.epoch}/{event.epochs} Batch: {event.batch}/{event.batches} "
        f"Train Loss: {event.train_loss:.3f} "
        f"Train Accuracy: {event.train_accuracy:.3f} "
        f"Val Accuracy: {'none' if accuracy is None else f'{accuracy:.3f}'}{skipped}"
    )


def accuracy_line(accuracy: float) -> str:
    """Returns the last word of a training run, in the tutorial's format.

    >>> accuracy_line(0.717)
    'Test Accuracy: 0.717'
    """
    return f"Test Accuracy: {accuracy:.3f}"


def score_color(score: float) -> tuple[int, int, int]:
    """Returns the colour of a score: red at 0, pale at 1/2, green at 1.

    >>> score_color(0.0) == RED, score_color(0.5) == MIDDLE, score_color(1.0) == GREEN
    (True, True, True)
    """
    low, high, share = (
        (RED, MIDDLE, 2 * score) if score < 0.5 else (MIDDLE, GREEN, 2 * score - 1)
    )
    red, green, blue = (
        round(a + (b - a) * share) for a, b in zip(low, high, strict=True)
    )
    return red, green, blue


def score_style(score: float) -> Style:
    """Returns black on the colour of the score."""
    red, green, blue = score_color(score)
    return Style.parse(f"black on rgb({red},{green},{blue})")


def label_of(score: float, label_names: tuple[str, str]) -> str:
    """Returns the name of the nearer label; 1/2 itself rounds to the first.

    >>> label_of(0.5, ("negative", "positive")), label_of(0.51, ("no", "yes"))
    ('negative', 'yes')
    """
    return label_names[score > 0.5]


def visible(text: str) -> str:
    r"""Returns `text` with control characters written out, safe for a terminal.

    >>> visible("ok\x1b[2J")
    'ok\\x1b[2J'
    """
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1]
        for character in text
    )


def trace_text(
    steps: Sequence[tuple[str, float]],
    label_names: tuple[str, str],
    width: int = 80,
) -> Text:
    """Draws the running score of a text: each word in colour, its score below it.

    Args:
      steps: Word and score after it, in order.
      label_names: Names of the labels 0 and 1, for the verdict in the last line.
      width: Columns to fill before a new row of words begins.

    >>> print(trace_text([("not", 0.25), ("bad", 0.9)], ("negative", "positive")))
    not   bad
    0.25  0.90
    = positive 0.90
    """
    text = Text(no_wrap=True, end="")
    if not steps:
        return text.append("(no words)")
    words, scores, column = Text(), Text(), 0

    def end_row() -> None:
        for line in (words, scores):
            line.rstrip()
            text.append(line).append("\n")

    for token, score in steps:
        word = visible(token)
        if cell_len(word) > LONGEST_WORD:
            word = set_cell_size(word, LONGEST_WORD - 1) + "…"
        cells = max(cell_len(word), 4) + 2
        if column and column + cells - 2 > width:
            end_row()
            text.append("\n")
            words, scores, column = Text(), Text(), 0
        words.append(word, score_style(score)).append(" " * (cells - cell_len(word)))
        scores.append(f"{score:.2f}".ljust(cells), "dim")
        column += cells
    end_row()
    last = steps[-1][1]
    text.append("= ")
    text.append(f"{label_of(last, label_names)} {last:.2f}", score_style(last))
    return text


def prediction_text(score: float, label: str, text: str) -> Text:
    """Returns one prediction as a line: score, label, and the text it is of.

    >>> print(prediction_text(0.973, "positive", "A joy."))
    0.973 positive A joy.
    """
    line = Text(no_wrap=True, end="")
    line.append(f"{score:.3f} {label}", score_style(score))
    return line.append(" ").append(visible(text))


def start_lines(event: RunStarted) -> list[str]:
    """Returns what is about to be trained, and on what."""
    data, model = event.config.data, event.config.model
    devices = [
        kind if count == 1 else f"{count} x {kind}"
        for kind, count in collections.Counter(event.devices).items()
    ]
    lines = [
        *data_lines(data.data, event.data),
        f"Model: {event.parameters:,} parameters, LSTM layers "
        f"{', '.join(map(str, model.features))}; on {', '.join(devices)}",
    ]
    if event.first_batch > 1:
        lines.append(
            f"Resumed in epoch {event.first_epoch}, after batch {event.first_batch - 1}"
        )
    elif event.first_epoch > 1:
        lines.append(f"Resumed after epoch {event.first_epoch - 1}")
    return lines


def data_lines(name: str, summary: Mapping[str, Any]) -> list[str]:
    """Returns what was read, and what a person should know of it before it is learned.

    Args:
      name: What was read.
      summary: Of the data, as a run keeps it; what it lacks is not told.
    """
    rows = summary.get("rows", {})
    parts = ", ".join(f"{part} {count:,}" for part, count in rows.items())
    lines = [f"Data: {name}" + (f" ({parts})" if parts else "")]
    if labels := summary.get("labels"):
        positive = labels["positive"]
        shares = [
            f"{part} {counts[positive] / max(rows[part], 1):.1%}"
            for part, counts in summary["classes"].items()
        ]
        names = [
            str(number) if label == str(number) else f"{label} = {number}"
            for number, label in enumerate([labels["negative"], positive])
        ]
        lines.append(f"Labels: {', '.join(names)} ({positive}: {', '.join(shares)})")
        if labels["rule"].startswith("alphabetical"):
            lines.append(f"Note: {positive} = 1 by {labels['rule']}")
    for part, earlier in summary.get("rows_also_in", {}).items():
        also = [f"{count:,} in {other}" for other, count in earlier.items() if count]
        if also:
            lines.append(
                f"Note: of the {rows[part]:,} {part} rows, {' and '.join(also)} as "
                "well, word for word"
            )
    for what, counts in (
        ("cut to --max-length", summary.get("truncated", {})),
        ("without any word", summary.get("empty_texts", {})),
    ):
        some = [f"{count:,} {part}" for part, count in counts.items() if count]
        if some:
            lines.append(f"Note: {', '.join(some)} rows {what}")
    if dropped := summary.get("dropped_empty"):
        lines.append(f"Note: {dropped:,} rows without any word left out")
    if groups := summary.get("groups_in_several_parts"):
        lines.append(f"Note: {groups:,} groups have rows in more than one part")
    return lines + [f"Note: {note}" for note in summary.get("notes", ())]


def finish_lines(event: Finished) -> list[str]:
    """Returns how training started and ended, and which epoch is tested."""
    how = "stopped early, no better for a while" if event.stopped_early else "done"
    lines = [
        f"Training {how}: {event.epochs_done} epochs in {clock(event.seconds)}. "
        f"Restored epoch {event.tested_epoch} for the test."
    ]
    if event.startup_seconds is not None:
        lines += [
            f"First step after {event.startup_seconds:.1f} s: imports "
            f"{event.startup_import_seconds:.1f} s, data "
            f"{event.startup_data_seconds:.1f} s, compilation "
            f"{event.startup_compile_seconds:.1f} s.",
            f"Input wait {event.wait_share:.1%} of the training time.",
        ]
    if event.skipped_steps:
        lines.append(
            f"Skipped {event.skipped_steps:,} steps whose loss or gradient was not "
            "finite."
        )
    return lines


def metrics_lines(metrics: Mapping[str, float]) -> list[str]:
    """Returns the numbers of an evaluation, a name and a number on each line.

    >>> metrics_lines({"accuracy": 0.75, "count": 4.0})
    ['accuracy         0.7500', 'count            4']
    """
    return [
        f"{name.replace('_', ' '):<16} "
        + (f"{value:.4f}" if name in ("loss", "accuracy") else f"{value:,.0f}")
        for name, value in metrics.items()
    ]


def compact(number: float | int) -> str:
    """Returns a count in three digits or so.

    >>> compact(950), compact(1_240), compact(12_345), compact(3_400_000)
    ('950', '1.2k', '12k', '3.4M')
    """
    if number < 1000:
        return f"{number:.0f}"
    if number < 1e6:
        return f"{number / 1e3:.{int(number < 1e4)}f}k"
    return f"{number / 1e6:.1f}M"


def clock(seconds: float | int) -> str:
    """Returns a duration as hours, minutes and seconds.

    >>> clock(5), clock(75), clock(3723)
    ('0:05', '1:15', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class LiveProgress:
    """One line at the foot of a terminal: epoch, bar, loss, accuracy, speed, time left.

    The speed is that of the last `WINDOW_S` seconds, validation included, so that the
    time left soon forgets what was compiled. Draws nothing where `console` is no
    terminal.
    """

    def __init__(self, console: Console):
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan"),
            TextColumn("{task.fields[numbers]}", style="default"),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
            # Results go to the standard output even where the bar is on the other.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task: TaskID = self.progress.add_task("Reading", total=None, numbers="")
        self._recent: collections.deque[tuple[float, int, int]] = collections.deque()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def phase(self, description: str) -> None:
        """Says what is being done where there is no number to show yet."""
        self.progress.update(
            self._task, description=description, total=None, numbers=""
        )

    def step(self, event: StepDone) -> None:
        """Shows the numbers of a training step."""
        self.progress.update(
            self._task,
            description=f"Epoch {event.epoch}/{event.epochs}",
            total=event.batches,
            completed=event.batch,
            numbers="  ".join(
                [
                    f"{event.batch}/{event.batches}",
                    f"loss {event.loss:.3f}",
                    f"accuracy {event.accuracy:.3f}",
                    *self._pace(event),
                ]
            ),
        )

    def _pace(self, event: StepDone) -> list[str]:
        """Returns speed and time left; nothing before there are two points in time."""
        done = (event.epoch - 1) * event.batches + event.batch
        self._recent.append((event.seconds, done, event.tokens))
        while event.seconds - self._recent[0][0] > WINDOW_S and len(self._recent) > 2:
            self._recent.popleft()
        start, first_done, first_tokens = self._recent[0]
        seconds = event.seconds - start
        if done <= first_done or seconds <= 0:
            return []
        left = (event.epochs * event.batches - done) * seconds / (done - first_done)
        return [
            f"{compact((event.tokens - first_tokens) / seconds)} tokens/s",
            f"{clock(left)} left",
        ]
